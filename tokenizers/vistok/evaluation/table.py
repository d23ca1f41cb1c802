"""Tables of evaluations: in the terminal, and as rows for the report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vistok.evaluation.result import Evaluation


class Column(NamedTuple):
    """A column: its title, the metric it shows and the format of its numbers."""

    title: str
    metric: str
    form: str


COLUMNS = (
    Column("PSNR dB", "psnr", ".2f"),
    Column("SSIM", "ssim", ".4f"),
    Column("MS-SSIM", "ms_ssim", ".4f"),
    Column("LPIPS", "lpips", ".4f"),
    Column("LPIPS vgg", "lpips_vgg", ".4f"),
    Column("LPIPS alex", "lpips_alex", ".4f"),
    Column("rFID", "rfid", ".2f"),
    Column("sFID", "sfid", ".2f"),
    Column("KID", "kid", ".5f"),
    Column("precision", "precision", ".1%"),
    Column("recall", "recall", ".1%"),
    Column("rIS", "inception_score", ".1f"),
    Column("FDD", "fdd", ".1f"),
    Column("CMMD", "cmmd", ".3f"),
    Column("FVD", "fvd", ".1f"),
    Column("utilisation training", "train_utilisation", ".1%"),
    Column("utilisation held-out", "utilisation", ".1%"),
    Column("perplexity", "perplexity", ",.1f"),
    Column("bits/ pixel", "bits_per_pixel", ".4g"),
    Column("coded bits/ pixel", "coded_bits_per_pixel", ".4g"),
    Column("training images/s", "train_images_per_second", ",.0f"),
    Column("encode images/s", "encode_images_per_second", ",.0f"),
    Column("decode images/s", "decode_images_per_second", ",.0f"),
    Column("reconstruct images/s", "reconstruct_images_per_second", ",.0f"),
)
# Of what is not a terminal, and of a table as wide as it likes.
MIN_WIDTH, MAX_WIDTH = 120, 10_000
TITLES = ("", *(column.title for column in COLUMNS))
# What two evaluations may differ in without being less comparable.
INCIDENTAL = ("device", "versions", "throughput", "peak_memory", "precision")


def print_table(evaluations: Evaluation | Mapping[str, Evaluation], console: Console | None = None) -> None:
    """Print tokenizers and references side by side.

    Args:
        evaluations: One evaluation, or several by name, as `read_evaluation` gives them from saved files. If they
            were not measured alike, a line below the table says in what they differ.
        console: Where to print; default: the terminal.
    """
    # A file has no width; Rich would fold the cells as in a terminal of 80 columns.
    console = console or Console()
    if console.width < MIN_WIDTH and not console.is_terminal:
        console.width = MIN_WIDTH
    named = {"tokenizer": evaluations} if isinstance(evaluations, Evaluation) else dict(evaluations)
    titles, body = without_empty_columns(rows(named))
    table = _table(titles, body)
    if console.measure(table, options=console.options.update(max_width=MAX_WIDTH)).maximum > console.width:
        # Where that does not fit there is one line per metric, and a column per tokenizer and reference.
        titles, *body = (list(line) for line in zip(titles, *body, strict=True))
        table = _table(titles, body)
    console.print(table)
    for note in notes(named):
        console.print(note, markup=False, highlight=False)
    if warning := differences(named):
        console.print(warning, markup=False, highlight=False)


def _table(titles: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(titles[0], overflow="fold")
    for title in titles[1:]:
        table.add_column(escape(title).replace(" ", "\n"), justify="right", overflow="fold")
    for row in body:
        table.add_row(*map(escape, row))
    return table


def rows(named: Mapping[str, Evaluation]) -> list[list[str]]:
    """Cells of the tokenizers, then of the references, each reference once."""
    tokenizers, references = [], {}
    for name, evaluation in named.items():
        tokenizers.append([name, *_cells(evaluation.metrics)])
        for reference in evaluation.references:
            sample = f" ({reference.images} images)" if reference.images is not None else ""
            row = [reference.name + sample, *_cells(vars(reference))]
            references[tuple(row)] = row
    return tokenizers + list(references.values())


def without_empty_columns(body: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows without the columns that have no number in any row."""
    kept = [i for i in range(len(TITLES)) if i == 0 or any(row[i] != "-" for row in body)]
    return [TITLES[i] for i in kept], [[row[i] for i in kept] for row in body]


def notes(named: Mapping[str, Evaluation]) -> list[str]:
    """What a reader of the table must know."""
    return [
        f"{name}: {metric} {note}" for name, evaluation in named.items() for metric, note in evaluation.notes.items()
    ]


def differences(named: Mapping[str, Evaluation]) -> str:
    """A warning that evaluations were not measured alike; empty if they were."""
    different = differing_protocols(named)
    warning = f"Not measured alike, they differ in: {', '.join(different)}" if different else ""
    if "protocol" in different:
        names = [str(evaluation.protocol.get("protocol", "none")) for evaluation in named.values()]
        warning += f" ({', '.join(names)}). Numbers of different protocols are not comparable"
    return warning


def differing_protocols(named: Mapping[str, Evaluation]) -> list[str]:
    """Entries of the protocol that are not the same in all evaluations."""
    protocols = [evaluation.protocol for evaluation in named.values()]
    names = dict.fromkeys(name for protocol in protocols for name in protocol if name not in INCIDENTAL)
    return [name for name in names if any(protocol.get(name) != protocols[0].get(name) for protocol in protocols)]


def missing(named: Mapping[str, Evaluation]) -> dict[str, list[str]]:
    """What was not measured and why, in words, with the names of the models that lack it."""
    lacking: dict[str, list[str]] = {}
    for name, evaluation in named.items():
        for reason, metrics in evaluation.missing_by_reason().items():
            lacking.setdefault(f"no {', '.join(metrics)}: {reason}", []).append(name)
    return lacking


def shared_protocol(named: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Entries of the protocol that are the same in all evaluations."""
    first, *others = (evaluation.protocol for evaluation in named.values())
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def number(value: float | None, form: str) -> str:
    """A formatted number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def _cells(metrics: Mapping[str, Any]) -> list[str]:
    return [number(metrics.get(column.metric), column.form) for column in COLUMNS]
