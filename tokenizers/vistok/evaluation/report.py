"""Write an evaluation as a folder: ``metrics.json``, ``report.md`` and ``report.html``."""

import json
from collections.abc import Sequence
from pathlib import Path

from vistok.evaluation.html import html_page
from vistok.evaluation.pictures import reconstruction_grid
from vistok.evaluation.plots import plot_usage
from vistok.evaluation.result import Evaluation
from vistok.evaluation.table import rows, without_empty_columns

__all__ = ["plot_usage", "reconstruction_grid", "write_report"]

LONG_ENTRIES = ("per_image",)


def write_report(evaluation: Evaluation, folder: str | Path, title: str, command: str) -> Path:
    """Write the three files, each complete or not at all.

    Args:
        evaluation: What `evaluate` returned.
        folder: Created if need be; files of an earlier report are replaced.
        title: Name of the tokenizer, as the heading.
        command: Command line that reproduces the numbers.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", _json(evaluation, title, command))
    write_text(folder / "report.md", _markdown(evaluation, title, command))
    write_text(folder / "report.html", html_page(evaluation, title, command))
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    # Renaming is atomic, so that a reader or a crash never sees half a file.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _json(evaluation: Evaluation, title: str, command: str) -> str:
    data = {"title": title, "command": command, **evaluation.to_json()}
    # One line for the columns of all images, readable lines for the rest.
    entries = [
        f"  {json.dumps(name)}: " + json.dumps(value, indent=None if name in LONG_ENTRIES else 2, allow_nan=False)
        for name, value in data.items()
    ]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _markdown(evaluation: Evaluation, title: str, command: str) -> str:
    lines = [f"# {_cell(title)}", "", "## Numbers", ""]
    lines += markdown_table(*without_empty_columns(rows({"tokenizer": evaluation})))
    lines += ["", "## All metrics", ""]
    lines += markdown_table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in evaluation.metrics.items()])
    for heading, entries in (
        ("Notes", evaluation.notes),
        ("Not measured", evaluation.missing),
        ("Protocol", {name: text_of(value) for name, value in evaluation.protocol.items()}),
    ):
        if entries:
            lines += [
                "",
                f"## {heading}",
                "",
                *markdown_table(["", ""], [[name, value] for name, value in entries.items()]),
            ]
    lines += ["", f"Unreadable samples: {evaluation.bad}", ""]
    lines += ["## Reproduce", "", *(f"    {line}" for line in command.split("\n"))]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, ["---"] * len(head), *body)]


def _cell(text: str) -> str:
    for character, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(character, escaped)
    return text


def text_of(value: object) -> str:
    """An entry of a protocol in a cell of a table."""
    return value if isinstance(value, str) else json.dumps(value)
