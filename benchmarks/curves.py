"""Draw logged numbers of runs, side by side.

    python benchmarks/curves.py OUTPUT.png LABEL=RUN [LABEL=RUN ...]

Each line is the ``metrics.csv`` of a run folder; that of a resumed run begins with the rows of before it.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

METRICS = (
    "train/l2",
    "train/lpips",
    "train/weighted/adversarial",
    "train/adaptive_weight",
    "train/discriminator",
    "train/discriminator_accuracy",
    "train/grad_norm",
    "val/psnr",
    "val/lpips",
)
# Logged rows that a point of a training curve is the mean of.
WINDOW = 5


def curve(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a logged number; those of training are running means."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [(float(row["step"]), float(row[metric])) for row in csv.DictReader(file) if row.get(metric)]
    if not rows:
        return np.empty(0), np.empty(0)
    steps, values = np.array(rows).T
    if metric.startswith("train/") and len(values) >= WINDOW:
        window = np.ones(WINDOW) / WINDOW
        steps, values = (np.convolve(each, window, mode="valid") for each in (steps, values))
    return steps, values


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    parser.add_argument("--mark", type=float, nargs="*", default=[], help="steps that get a vertical line")
    options = parser.parse_args(arguments)
    columns = 3
    height = -(-len(options.metrics) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * height))
    axes = figure.subplots(height, columns, squeeze=False)
    for axis, metric in zip(axes.flat, options.metrics, strict=False):
        for run in options.runs:
            label, _, folder = run.partition("=")
            axis.plot(*curve(Path(folder), metric), label=label, linewidth=1)
        for step in options.mark:
            axis.axvline(step, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(metric, fontsize=9)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
