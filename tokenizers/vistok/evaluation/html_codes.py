"""The section of the report on codes: how codebooks, scales and bits are used, and what codebooks have in common."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from vistok.evaluation.html_parts import plot, table
from vistok.evaluation.plots import (
    draw_bits,
    draw_codebook,
    draw_positions,
    draw_shared,
    draw_shares,
    draw_usage,
)
from vistok.evaluation.result import Evaluation

# Longer tables are folded.
MAX_ROWS = 8


def codes_section(evaluation: Evaluation) -> str:
    """Usage, entropies and maps of the codebooks; empty where there are no codes."""
    if not evaluation.usage:
        return ""
    metrics = evaluation.metrics
    text = (
        f"{metrics['utilisation']:.1%} of {sum(evaluation.codebook_sizes):,} codes occur "
        f"in {metrics['tokens']:,.0f} tokens (uniform draws would use {metrics['expected_uniform_utilisation']:.1%}); "
        f"perplexity {metrics['perplexity']:,.1f}, entropy {metrics['entropy_bits']:.2f} bits, "
        f"{metrics['dead_codes']:,.0f} dead codes."
    )
    if "train_utilisation" in metrics:
        text += f" In training: utilisation {metrics['train_utilisation']:.1%}."
    if "dead_bits" in metrics:
        text += f" {metrics['dead_bits']:.0f} of {len(evaluation.per_bit['ones'])} bits never change."
    plots = _usage_plots(evaluation)
    if not _are_bits(evaluation):
        plots = (
            plot("Occurrences of codes", partial(draw_usage, counts=evaluation.usage), (12.0, 3.2), wide=True) + plots
        )
    usage = f'<h2>Codebook usage</h2><p>{text}</p><div class="plots">{plots}</div>'
    return usage + _tables(evaluation) + _entropies(evaluation) + _maps(evaluation)


def _usage_plots(evaluation: Evaluation) -> str:
    bits = [math.log2(size) for size in evaluation.codebook_sizes]
    # The entropy of a scale is the mean over its codebooks.
    most = {"codebook": bits, "scale": [sum(bits) / len(bits)] * len(evaluation.per_scale.get("tokens", ()))}
    plots = ""
    for kind, columns in (("codebook", _per_codebook(evaluation)), ("scale", evaluation.per_scale)):
        if columns:
            pairs = zip(columns["entropy_bits"], most[kind], strict=True)
            shares = [entropy / limit if limit else 0.0 for entropy, limit in pairs]
            draw = partial(draw_shares, kind=kind, used=columns["utilisation"], entropy=shares)
            plots += plot(f"Usage by {kind}", draw)
    if evaluation.per_bit:
        plots += plot("Ones by bit", partial(draw_bits, ones=evaluation.per_bit["ones"]))
    return plots


def _are_bits(evaluation: Evaluation) -> bool:
    """Whether each codebook is one bit, so that what is said of bits is all there is to say."""
    return bool(evaluation.per_bit) and set(evaluation.codebook_sizes) == {2}


def _per_codebook(evaluation: Evaluation) -> Mapping[str, Sequence[float]]:
    return {} if _are_bits(evaluation) else evaluation.per_codebook


def _tables(evaluation: Evaluation) -> str:
    codebooks = _per_codebook(evaluation)
    if codebooks:
        codebooks = {"codes": [float(size) for size in evaluation.codebook_sizes]} | dict(codebooks)
    kinds = (("codebook", codebooks), ("scale", evaluation.per_scale), ("bit", evaluation.per_bit))
    return "".join(_columns(kind, columns) for kind, columns in kinds if columns)


def _columns(kind: str, columns: Mapping[str, Sequence[float]]) -> str:
    body = [
        [str(position), *(_short(name, value) for name, value in zip(columns, values, strict=True))]
        for position, values in enumerate(zip(*columns.values(), strict=True))
    ]
    shown = table([kind, *(name.replace("_", " ") for name in columns)], body)
    return shown if len(body) <= MAX_ROWS else f"<details><summary>{len(body)} {kind}s</summary>{shown}</details>"


def _short(name: str, value: float) -> str:
    if name.endswith("utilisation"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _entropies(evaluation: Evaluation) -> str:
    plots, texts, entropy, shared = "", [], evaluation.position_entropy, evaluation.shared_bits
    if entropy.numel():
        plots += plot("Entropy by position", partial(draw_positions, entropy=entropy))
        texts.append(
            f"Entropy of the codes at each position, from {entropy.min():.2f} to {entropy.max():.2f} bits; "
            "no position can show more than log2 of the number of images or videos."
        )
    if len(shared):
        plots += plot("Bits that codebooks share", partial(draw_shared, shared=shared))
        texts.append(
            "Bits that the codes of two codebooks at one position tell about each other, beyond what codes paired at "
            f"random seem to: 0 where codebooks are independent{_left_out(evaluation, len(shared))}."
        )
    return f'<p>{" ".join(texts)}</p><div class="plots">{plots}</div>' if plots else ""


def _maps(evaluation: Evaluation) -> str:
    maps, several = "", len(evaluation.codebook_maps) > 1
    for position, points in enumerate(evaluation.codebook_maps):
        if len(points):
            draw = partial(draw_codebook, points=points, counts=evaluation.usage[position])
            name = f"codebook {position}" if several else ""
            maps += plot(f"Map of {name or 'the codebook'}", draw, (4.8, 3.4), caption=name)
    text = (
        "Codes on their two principal components, coloured by their occurrences; hollow: never used"
        f"{_left_out(evaluation, len(evaluation.codebook_maps))}."
    )
    return f'<p>{text}</p><div class="plots maps">{maps}</div>' if maps else ""


def _left_out(evaluation: Evaluation, shown: int) -> str:
    count = len(evaluation.codebook_sizes)
    return f"; of {count} codebooks the first {shown}" if shown < count else ""
