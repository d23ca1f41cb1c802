"""``vistok eval`` and ``eval.py``: measure models and write reports."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vistok.cli.hydra_app import command_line, run


def main() -> None:
    """Run the command line."""
    run("eval", task)


def task(config: DictConfig) -> dict[str, Any]:
    """Evaluate one composed config; Hydra's folder of the job receives the report."""
    from hydra.core.hydra_config import HydraConfig

    from vistok.evaluation.run import evaluate_models

    return evaluate_models(config, Path(HydraConfig.get().runtime.output_dir), command_line())


if __name__ == "__main__":
    main()
