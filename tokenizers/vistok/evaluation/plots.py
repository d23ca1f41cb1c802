"""Plots of an evaluation, drawn with explicit figures so that no global state of matplotlib is touched."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vistok.evaluation.result import Evaluation


class Theme(NamedTuple):
    """Colours of a plot: text and axes, series, and the background of a saved file."""

    ink: str
    main: str
    other: str
    paper: str


LIGHT = Theme(ink="#3a3f47", main="#1f6feb", other="#8a6d1a", paper="#ffffff")
DARK = Theme(ink="#c3c9d1", main="#6cb0ff", other="#d9b64a", paper="#15181d")
SERIES = ("#1f6feb", "#d1495b", "#2a9d6f", "#b07d00", "#7d5ba6", "#00868b", "#8c564b", "#6b7280")
# A line of more points than the plot has pixels only makes the file larger.
MAX_POINTS = 1000
# Of a larger codebook every n-th code is drawn.
MAX_CODES = 20_000


def plot_usage(counts: Int[Tensor, " _"] | Sequence[Int[Tensor, " _"]], path: str | Path) -> None:
    """Write a PNG of how often each code occurs, most frequent first, on a logarithmic axis.

    Args:
        counts: Occurrences of each code, one tensor per codebook.
        path: File to write.
    """
    png = figure_png(lambda axes, theme: draw_usage(axes, theme, counts), LIGHT, transparent=False)
    Path(path).write_bytes(png)


def figure_png(
    draw: Callable[[Axes, Theme], None],
    theme: Theme,
    *,
    size: tuple[float, float] = (6.4, 3.4),
    transparent: bool = True,
) -> bytes:
    """PNG of a figure of one pair of axes.

    Args:
        draw: Draws into the axes.
        theme: Colours.
        size: Width and height in inches of 160 pixels.
        transparent: Whether the page shows through.
    """
    figure = Figure(figsize=size, layout="constrained", facecolor="none" if transparent else theme.paper)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(colors=theme.ink, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    axes.grid(color=theme.ink, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    draw(axes, theme)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, size=11)
    file = io.BytesIO()
    canvas.figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


def draw_usage(axes: Axes, theme: Theme, counts: Tensor | Sequence[Tensor]) -> None:
    """Occurrences of each code by rank; codes that never occur end the line."""
    codebooks = [counts] if isinstance(counts, Tensor) else list(counts)
    for position, codebook in enumerate(codebooks):
        used = codebook[codebook > 0].sort(descending=True).values
        if not len(used):
            continue
        rank = torch.linspace(0, len(used) - 1, min(len(used), MAX_POINTS)).round().long()
        color = theme.main if len(codebooks) == 1 else SERIES[position % len(SERIES)]
        x, y = (rank + 1).numpy(), used[rank].numpy()
        axes.plot(x, y, color=color, linewidth=1.6, label=f"codebook {position}", drawstyle="steps-mid")
        if len(codebooks) == 1:
            axes.fill_between(x, y, 0.5, color=color, alpha=0.2, step="mid")
    size = max(len(codebook) for codebook in codebooks)
    axes.set(yscale="log", xlim=(0.5, size + 0.5), xlabel=f"codes by rank, of {size:,}", ylabel="occurrences")
    if len(codebooks) > 1:
        # Lines that fall at different ranks are told apart.
        axes.set(xscale="log", xlim=(0.9, size * 1.1))
    axes.set_ylim(bottom=0.8)
    if 1 < len(codebooks) <= len(SERIES):
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)


def draw_shares(axes: Axes, theme: Theme, kind: str, used: Sequence[float], entropy: Sequence[float]) -> None:
    """Utilisation of codebooks or scales as bars, and their entropy in units of the most it can be as dots."""
    numbers = np.arange(len(used))
    axes.bar(numbers, used, width=0.7, color=theme.main, alpha=0.5, label="utilisation")
    axes.scatter(numbers, entropy, color=theme.other, s=26, zorder=3, label="entropy, of log2 of the codes")
    axes.set(xlabel=kind, ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=theme.ink, fontsize=9)


def draw_bits(axes: Axes, theme: Theme, ones: Sequence[float]) -> None:
    """Share of ones of each bit; a good bit is a fair coin."""
    axes.bar(np.arange(len(ones)), np.asarray(ones) - 0.5, bottom=0.5, width=0.7, color=theme.main, alpha=0.7)
    axes.axhline(0.5, color=theme.other, linewidth=1.2)
    axes.set(xlabel="bit", ylabel="share of ones", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_shared(axes: Axes, theme: Theme, shared: Tensor) -> None:
    """What codebooks tell about each other; the diagonal, their own entropy, is left blank."""
    axes.grid(visible=False)
    others = shared.clone().fill_diagonal_(float("nan")).numpy()
    shown = axes.imshow(others, cmap="viridis", interpolation="nearest", vmin=0)
    axes.set(xlabel="codebook", ylabel="codebook")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(shown, ax=axes)
    bar.set_label("bits", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)


def draw_positions(axes: Axes, theme: Theme, entropy: Tensor) -> None:
    """Entropy of each position: a map of a grid, frame below frame of a video, or a line of a sequence."""
    axes.grid(visible=False)
    if entropy.ndim == 1:
        axes.plot(entropy.numpy(), color=theme.main, linewidth=1.6, drawstyle="steps-mid")
        axes.set(xlabel="position in the sequence", ylabel="bits")
        axes.set_ylim(bottom=0)
        return
    shown = axes.imshow(entropy.flatten(0, -2).numpy(), cmap="viridis", interpolation="nearest")
    axes.set(xlabel="column of the grid", ylabel="row of the grid")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(shown, ax=axes)
    bar.set_label("bits", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)


def draw_codebook(axes: Axes, theme: Theme, points: Tensor, counts: Tensor) -> None:
    """Codes on their principal plane, coloured by how often they occur; those that never do are hollow."""
    shown = torch.linspace(0, len(points) - 1, min(len(points), MAX_CODES)).round().long()
    points, counts = points[shown], counts[shown]
    used = counts > 0
    axes.scatter(*points[~used].T.numpy(), s=8, facecolors="none", edgecolors=theme.ink, linewidths=0.4, alpha=0.5)
    if used.any():
        style = {"s": 9, "cmap": "viridis", "norm": LogNorm(1, max(2, int(counts.max())))}
        colors = axes.scatter(*points[used].T.numpy(), c=counts[used].numpy(), **style)
        bar = axes.figure.colorbar(colors, ax=axes)
        bar.set_label("occurrences", color=theme.ink)
        bar.ax.tick_params(colors=theme.ink)
    axes.set(xlabel="first principal component", ylabel="second principal component")


def draw_psnr(axes: Axes, theme: Theme, values: Sequence[float]) -> None:
    """Distribution of the PSNR of single images."""
    axes.hist(np.asarray(values), bins=min(40, max(5, round(len(values) ** 0.5))), color=theme.main, alpha=0.8)
    axes.axvline(float(np.mean(values)), color=theme.other, linewidth=1.6, linestyle="--")
    axes.set(xlabel="PSNR of an image, dB (dashed: mean)", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_comparison(axes: Axes, theme: Theme, evaluations: Mapping[str, Evaluation]) -> None:
    """PSNR against bits per pixel of several tokenizers, after entropy coding."""
    for position, (name, evaluation) in enumerate(evaluations.items()):
        rate, value = (evaluation.metrics.get(metric) for metric in ("coded_bits_per_pixel", "psnr"))
        if rate is None or value is None:
            continue
        color = SERIES[position % len(SERIES)]
        axes.scatter([rate], [value], c=color, s=60, zorder=3)
        axes.annotate(name, (rate, value), (8, -4), textcoords="offset points", color=color, fontsize=10)
    axes.set(xlabel="coded bits per pixel", ylabel="PSNR, dB")
    axes.margins(0.3, 0.2)


def draw_rates(axes: Axes, theme: Theme, evaluation: Evaluation) -> None:
    """PSNR against bits per pixel: the tokenizer, before and after entropy coding, and its references."""
    metrics = evaluation.metrics
    points = [("tokenizer", metrics.get("bits_per_pixel"), metrics.get("psnr"))]
    points += [("coded", metrics.get("coded_bits_per_pixel"), metrics.get("psnr"))]
    points += [(entry.name.split(",")[0], entry.bits_per_pixel, entry.psnr) for entry in evaluation.references]
    for name, rate, value in points:
        if rate is None or value is None:
            continue
        ours = name in ("tokenizer", "coded")
        color = theme.main if ours else theme.other
        style = {"s": 70, "marker": "o"} if ours else {"s": 40, "marker": "s"}
        fill = "none" if name == "coded" else color
        axes.scatter([rate], [value], c=fill, edgecolors=color, zorder=3, **style)
        # On opposite sides, because the tokenizer and the patch colour have the same rate; the coded rate lies close.
        offset, side = ((-9, -4), "right") if ours else ((9, -4), "left")
        if name == "coded":
            offset, side = (0, 8), "center"
        axes.annotate(name, (rate, value), offset, textcoords="offset points", color=color, fontsize=10, ha=side)
    axes.set(xlabel="bits per pixel", ylabel="PSNR, dB")
    axes.margins(0.3, 0.15)
