"""``vistok train`` and ``train.py``: train a tokenizer by Hydra overrides."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vistok.cli.hydra_app import command_line, run, similar


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

    check_optimizer(config.optimizer.get("opt"))
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return train(config, folder, command_line())
    except TrainingInterrupted as interruption:
        resume = f"{command_line(without='ckpt')} {shlex.quote(f'ckpt={interruption.checkpoint}')}"
        sys.stderr.write(f"\n{interruption}\nresume with: {resume}\n")
        sys.exit(interruption.exit_code)


def check_optimizer(name: str | None) -> None:
    """Raise a ValueError if timm has no optimiser of that name; None is one of another library."""
    from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

    known = [str(each) for each in list_optimizers()]
    # `lookahead_adamw` is adamw with look-ahead.
    if name is not None and name.lower().rpartition("_")[2] not in known:
        raise ValueError(f"timm has no optimizer.opt={name}: see timm.optim.list_optimizers(){similar(name, known)}")


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
        from vistok.training.run import refuse_existing_run

        try:
            refuse_existing_run(Path(given[-1]))
        except FileExistsError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)


if __name__ == "__main__":
    main()
