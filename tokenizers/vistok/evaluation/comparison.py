"""Several models on the same images, side by side: ``comparison.json``, ``comparison.md`` and ``comparison.html``."""

import json
from collections.abc import Mapping
from pathlib import Path

from vistok.evaluation.html import comparison_page
from vistok.evaluation.report import markdown_table, text_of, write_text
from vistok.evaluation.result import Evaluation
from vistok.evaluation.table import differences, notes, rows, shared_protocol, without_empty_columns


def write_comparison(
    evaluations: Mapping[str, Evaluation],
    folder: str | Path,
    command: str,
    failed: Mapping[str, str] | None = None,
) -> Path:
    """Write the three files; the report of each model lies in the folder of its name.

    Args:
        evaluations: By name.
        folder: Created if need be.
        command: Command line that reproduces the numbers.
        failed: Models that could not be measured, and why.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {name: evaluation.to_json()["metrics"] for name, evaluation in evaluations.items()}
    write_text(folder / "comparison.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    lines = ["# Comparison", "", *markdown_table(*without_empty_columns(rows(evaluations)))]
    for note in (*notes(evaluations), differences(evaluations)):
        lines += ["", note] if note else []
    if failed:
        lines += ["", "## Not measured", "", *markdown_table(["", ""], list(failed.items()))]
    protocol = {name: text_of(value) for name, value in shared_protocol(evaluations).items()}
    lines += ["", "## Protocol", "", *markdown_table(["", ""], list(protocol.items()))]
    lines += ["", "## Reproduce", "", *(f"    {line}" for line in command.split("\n")), ""]
    write_text(folder / "comparison.md", "\n".join(lines))
    write_text(folder / "comparison.html", comparison_page(evaluations, command, failed or {}))
    return folder
