"""Evaluate tokenizers, compare them with trivial codecs and write reports."""

from vistok.evaluation.evaluate import evaluate
from vistok.evaluation.pictures import reconstruction_grid
from vistok.evaluation.plots import plot_usage
from vistok.evaluation.protocol import Protocol
from vistok.evaluation.report import write_report
from vistok.evaluation.result import Evaluation, Example, Reference, read_evaluation
from vistok.evaluation.table import print_table

__all__ = [
    "Evaluation",
    "Example",
    "Protocol",
    "Reference",
    "evaluate",
    "plot_usage",
    "print_table",
    "read_evaluation",
    "reconstruction_grid",
    "write_report",
]
