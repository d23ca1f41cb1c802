"""``vistok compare``: saved evaluations side by side, also after a sweep."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CompareRuns(Callback):
    """Hydra callback: after ``-m`` prints the runs of the sweep beside each other and writes ``comparison.json``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read every ``metrics.json`` below the sweep folder."""
        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.glob("*/metrics.json"), key=_in_order)
        if not paths:
            return
        from vistok.evaluation.result import read_evaluation
        from vistok.evaluation.table import print_table

        evaluations = {path.parent.name: read_evaluation(path) for path in paths}
        print_table(evaluations)
        metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
        (folder / "comparison.json").write_text(json.dumps(metrics, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("vistok compare", description="Show saved evaluations side by side.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="metrics.json, or the folder that holds it")
    paths = [Path(path) for path in parser.parse_args().paths]
    from vistok.evaluation.result import read_evaluation
    from vistok.evaluation.table import print_table

    try:
        evaluations = [read_evaluation(path) for path in paths]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    print_table(dict(zip(names_of(paths), evaluations, strict=True)))


def _in_order(path: Path) -> tuple[int, str]:
    """By the number that Hydra calls a job's folder, or by the name a user gave it."""
    name = path.parent.name
    number = name.split("_")[0]
    return (int(number) if number.isdecimal() else sys.maxsize, name)


def names_of(paths: list[Path]) -> list[str]:
    """A name for each path: what differs between the folders of the evaluations, or renamed files."""
    folders = [path.parent if path.name == "metrics.json" else path for path in map(Path.resolve, paths)]
    if len(set(folders)) == 1:
        return [folder.name for folder in folders]
    common = os.path.commonpath(folders)
    return [os.path.relpath(folder, common) for folder in folders]


if __name__ == "__main__":
    main()
