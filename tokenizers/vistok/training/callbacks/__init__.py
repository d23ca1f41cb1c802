"""Callbacks of training."""

from vistok.training.callbacks.bad_samples import BadSamples
from vistok.training.callbacks.collapse_watch import CollapseWatch
from vistok.training.callbacks.kept_settings import KeptSettings
from vistok.training.callbacks.last_checkpoint import LastCheckpoint, TrainingInterrupted
from vistok.training.callbacks.pictures import Pictures
from vistok.training.callbacks.progress import Progress
from vistok.training.callbacks.throughput import Throughput
from vistok.training.callbacks.weight_ema import WeightEMA

__all__ = [
    "BadSamples",
    "CollapseWatch",
    "KeptSettings",
    "LastCheckpoint",
    "Pictures",
    "Progress",
    "Throughput",
    "TrainingInterrupted",
    "WeightEMA",
]
