"""The report as one self-contained HTML page: no script, nothing loaded from elsewhere, light and dark."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape

from torch import Tensor

from vistok.data.transforms import OWN_SIZE
from vistok.evaluation.html_codes import codes_section
from vistok.evaluation.html_parts import plot, table
from vistok.evaluation.pictures import ERROR_GAIN, data_uri, error_map, to_rgb, worst_window
from vistok.evaluation.plots import draw_comparison, draw_psnr, draw_rates
from vistok.evaluation.result import Evaluation, Example
from vistok.evaluation.table import differences, missing, notes, number, rows, shared_protocol, without_empty_columns

# Pictures with a shorter side are enlarged by a whole number, without smoothing.
PICTURE_SIDE = 128
# Wider ones are reduced, so that three of them stand side by side.
MAX_WIDTH = 396
# Of the enlarged detail; larger in large pictures.
DETAIL_SIDE = 16
TILES = (
    ("psnr", "PSNR", ".2f", " dB"),
    ("ssim", "SSIM", ".4f", ""),
    ("lpips", "LPIPS", ".4f", ""),
    ("lpips_vgg", "LPIPS, VGG", ".4f", ""),
    ("lpips_alex", "LPIPS, AlexNet", ".4f", ""),
    ("rfid", "rFID", ".2f", ""),
    ("fvd", "FVD", ".1f", ""),
    ("sfid", "sFID", ".2f", ""),
    ("kid", "KID", ".5f", ""),
    ("precision", "precision", ".1%", ""),
    ("recall", "recall", ".1%", ""),
    ("inception_score", "rIS", ".1f", ""),
    ("fdd", "FDD", ".1f", ""),
    ("cmmd", "CMMD", ".3f", ""),
    ("train_utilisation", "utilisation, training", ".1%", ""),
    ("utilisation", "utilisation, held-out", ".1%", ""),
    ("perplexity", "perplexity", ",.0f", ""),
    ("bits_per_pixel", "bits per pixel", ".4g", ""),
    ("coded_bits_per_pixel", "bits per pixel, coded", ".4g", ""),
    ("encode_images_per_second", "encode, images/s", ",.0f", ""),
    ("decode_images_per_second", "decode, images/s", ",.0f", ""),
    ("reconstruct_images_per_second", "reconstruct, images/s", ",.0f", ""),
    ("peak_memory_mib", "peak memory", ",.0f", " MiB"),
)
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2127; --soft: #5b636e; --line: #d8dde3; --paper: #fff; --tile: #f4f6f8; --accent: #1f6feb;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --soft: #98a1ac; --line: #333941; --paper: #15181d; --tile: #1e2329; --accent: #6cb0ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1250px; padding: 24px;
  background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
p, figcaption, .soft { color: var(--soft); margin: 4px 0 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { background: var(--tile); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere;
}
.numbers th + th, .numbers td + td { text-align: right; padding: 6px 0 6px 12px; overflow-wrap: normal; }
.numbers td:first-child { white-space: nowrap; }
.first tbody tr:first-child td { font-weight: 600; color: var(--accent); }
.pairs th { width: 230px; font-weight: 500; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
.plots { margin-top: 16px; }
.plots figure, .examples figure { margin: 0; }
.plots img { width: 100%; height: auto; }
.plots figure { max-width: 760px; }
.plots .wide { grid-column: 1 / -1; max-width: none; }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); }
.examples { display: flex; flex-wrap: wrap; gap: 12px 10px; }
.row { display: flex; flex-wrap: wrap; gap: 3px; }
.row img { image-rendering: pixelated; max-width: 100%; }
.row .reduced { image-rendering: auto; }
pre { background: var(--tile); border-radius: 8px; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def html_page(evaluation: Evaluation, title: str, command: str) -> str:
    """The page of an evaluation.

    Args:
        evaluation: What `evaluate` returned.
        title: Heading.
        command: Command line that reproduces the numbers.
    """
    protocol = evaluation.protocol
    size = protocol.get("size", ())
    own = size == OWN_SIZE
    size = [] if own else list(size)
    what = f"{protocol.get('images', 0):,} images"
    if len(size) == 3:
        what = f"{protocol.get('images', 0) // size[0]:,} videos of {size.pop(0)} frames"
    pixels = "their own size" if own else f"{'x'.join(map(str, size))} pixels"
    subtitle = (
        f"{what} of {pixels}, {protocol.get('dataset')}, {protocol.get('split')}, "
        f"protocol {protocol.get('protocol', 'none')}"
    )
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>",
        _tiles(evaluation),
        _rates(evaluation),
        _examples("Worst reconstructions", evaluation.worst),
        _examples("Best reconstructions", evaluation.best),
        _examples("Random reconstructions", evaluation.random),
        codes_section(evaluation),
        _pairs("Not measured", evaluation.missing.items()),
        _pairs("Protocol", [(name, _text(value)) for name, value in protocol.items()]),
        f"<h2>Reproduce</h2><pre>{escape(command)}</pre>",
    ]
    return _document(title, parts)


def comparison_page(evaluations: Mapping[str, Evaluation], command: str, failed: Mapping[str, str]) -> str:
    """The page of several models measured on the same images.

    Args:
        evaluations: By name.
        command: Command line that reproduces the numbers.
        failed: Models that could not be measured, and why.
    """
    plots = ""
    if any("coded_bits_per_pixel" in evaluation.metrics for evaluation in evaluations.values()):
        plots = plot("PSNR against rate", partial(draw_comparison, evaluations=evaluations), (12.0, 3.2), wide=True)
    reasons = [(name, f"nothing: {reason}") for name, reason in failed.items()]
    reasons += [(", ".join(names), reason) for reason, names in missing(evaluations).items()]
    parts = [
        f"<h1>Comparison</h1><p>{escape(', '.join(evaluations))}</p>",
        table(*without_empty_columns(rows(evaluations)), first=True),
        "".join(f"<p>{escape(note)}</p>" for note in (*notes(evaluations), differences(evaluations)) if note),
        f'<div class="plots">{plots}</div>' if plots else "",
        _side_by_side(evaluations),
        _pairs("Not measured", reasons),
        _pairs("Protocol", [(name, _text(value)) for name, value in shared_protocol(evaluations).items()]),
        f"<h2>Reproduce</h2><pre>{escape(command)}</pre>",
    ]
    return _document("Comparison", parts)


def _side_by_side(evaluations: Mapping[str, Evaluation]) -> str:
    """The random examples, which are the same images for every model."""
    shown = [{example.key: example for example in evaluation.random} for evaluation in evaluations.values()]
    keys = [key for key in shown[0] if all(key in examples for examples in shown)]
    if not keys:
        return ""
    figures = []
    for key in keys:
        examples = [by_key[key] for by_key in shown]
        pictures = {"original": to_rgb(examples[0].original)}
        pictures |= {name: to_rgb(found.reconstruction) for name, found in zip(evaluations, examples, strict=True)}
        caption = ", ".join(f"{found.psnr:.2f} dB" for found in examples)
        figures.append(_figure(pictures, f"{key}: {caption}"))
    legend = f"<p>{escape('Original, ' + ', '.join(evaluations))}.</p>"
    return f'<h2>Random images</h2>{legend}<div class="examples">{"".join(figures)}</div>'


def _document(title: str, parts: Sequence[str]) -> str:
    # A page of its own has no icon, and a browser would ask its server for one.
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    head = f"<head>{meta}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body>\n{body}\n</body></html>\n'


def _tiles(evaluation: Evaluation) -> str:
    frames = "frames" if "videos" in evaluation.protocol else "images"
    tiles = [
        f'<div class="tile"><b>{number(evaluation.metrics[metric], form)}{unit}</b>'
        f"<span>{label.replace('images', frames)}</span></div>"
        for metric, label, form, unit in TILES
        if metric in evaluation.metrics
    ]
    notes = [f"{name}: {note}" for name, note in evaluation.notes.items()]
    if evaluation.bad:
        notes.append(f"{evaluation.bad} samples were unreadable and are not counted")
    return f'<div class="tiles">{"".join(tiles)}</div>' + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _rates(evaluation: Evaluation) -> str:
    notes = "".join(f"<p>{escape(f'{entry.name}: {entry.note}')}</p>" for entry in evaluation.references if entry.note)
    numbers = table(*without_empty_columns(rows({"tokenizer": evaluation})), first=True)
    return f"<h2>Rate and distortion</h2>{numbers}{notes}{_rate_plots(evaluation)}"


def _rate_plots(evaluation: Evaluation) -> str:
    plots = ""
    if evaluation.references:
        plots += plot("PSNR against rate", partial(draw_rates, evaluation=evaluation))
    if values := evaluation.per_image.get("psnr"):
        plots += plot("PSNR of single images", partial(draw_psnr, values=values))
    return f'<div class="plots">{plots}</div>' if plots else ""


def _examples(heading: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = []
    for example in examples:
        original, reconstruction = to_rgb(example.original), to_rgb(example.reconstruction)
        error = error_map(example.reconstruction, example.original)
        side = max(DETAIL_SIDE, min(error.shape) // 8)
        top, left = worst_window(error, side)
        pictures = {"original": original, "reconstruction": reconstruction, "error": error}
        details = {
            f"detail of the {name}": picture[:, top : top + side, left : left + side]
            for name, picture in (("original", original), ("reconstruction", reconstruction))
        }
        caption = f"{example.key}, {example.psnr:.2f} dB; details from row {top}, column {left}"
        figures.append(_figure(pictures | details, caption))
    legend = (
        f"<p>Original, reconstruction, absolute error times {ERROR_GAIN}; then the square of the largest error, of the "
        "original and of the reconstruction, enlarged.</p>"
    )
    return f'<h2>{heading}</h2>{legend}<div class="examples">{"".join(figures)}</div>'


def _figure(pictures: Mapping[str, Tensor], caption: str) -> str:
    """Pictures in a row, all as high as the first one is shown; a browser enlarges pixels without smoothing."""
    height, width = next(iter(pictures.values())).shape[-2:]
    shown_height = height * max(1, round(PICTURE_SIDE / min(height, width)))
    if width > MAX_WIDTH:
        shown_height = round(height * MAX_WIDTH / width)
    images = "".join(
        f'<img src="{data_uri(picture)}" width="{round(picture.shape[-1] * shown_height / picture.shape[-2])}" '
        f'height="{shown_height}" alt="{escape(name)}"{" class=reduced" if picture.shape[-2] > shown_height else ""}>'
        for name, picture in pictures.items()
    )
    return f'<figure><div class="row">{images}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _pairs(heading: str, pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<h2>{heading}</h2><table class="pairs">{lines}</table>' if lines else ""


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(entry)}" for name, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value)
