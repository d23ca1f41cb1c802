"""``vistok train`` and ``train.py``: train a tokenizer by Hydra overrides."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vistok.cli.hydra_app import command_line, run


def main() -> None:
    """Run the command line."""
    refuse_existing_folder()
    run("train", task)


def task(config: DictConfig) -> dict[str, Any]:
    """Train one composed config; Hydra's working folder of the job is the run folder."""
    # Imported late, so that `--help` and a mistyped override are answered at once.
    from hydra.core.hydra_config import HydraConfig

    from vistok.training.callbacks import TrainingInterrupted

    if config.prior:
        from vistok.prior.run import train_prior as train
    else:
        from vistok.training.run import train

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return train(config, folder, command_line())
    except TrainingInterrupted as interruption:
        resume = f"{command_line(without='ckpt')} {shlex.quote(f'ckpt={interruption.checkpoint}')}"
        sys.stderr.write(f"\n{interruption}\nresume with: {resume}\n")
        sys.exit(interruption.exit_code)


def refuse_existing_folder() -> None:
    """Refuse ``hydra.run.dir`` of an earlier run before Hydra writes into it; the ranks of one run share it.

    ``ckpt=auto`` continues the run in its folder.
    """
    if "ckpt=auto" in sys.argv[1:]:
        return
    given = [
        argument.split("=", 1)[1].strip("'\"") for argument in sys.argv[1:] if argument.startswith("hydra.run.dir=")
    ]
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if given and rank == "0" and (Path(given[-1]) / "run.json").exists():
        last = Path(given[-1]) / "checkpoints" / "last.ckpt"
        hint = f"resume that run with ckpt={last}" if last.exists() else "it has no checkpoint to resume from"
        sys.stderr.write(f"error: {given[-1]} holds a run already: choose another hydra.run.dir; {hint}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
