"""Side-by-side table of the runs of a sweep."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CompareRuns(Callback):
    """Hydra callback: after ``-m`` prints the runs of the sweep beside each other and writes ``comparison.json``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read every ``metrics.json`` below the sweep folder."""
        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.glob("*/metrics.json"), key=lambda path: int(path.parent.name.split("_")[0]))
        if not paths:
            return
        from vistok.evaluation.result import read_evaluation
        from vistok.evaluation.table import print_table

        evaluations = {path.parent.name: read_evaluation(path) for path in paths}
        print_table(evaluations)
        metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
        (folder / "comparison.json").write_text(json.dumps(metrics, indent=2) + "\n")
