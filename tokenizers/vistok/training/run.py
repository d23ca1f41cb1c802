"""One training run: from a config to a run folder with checkpoints, numbers, pictures and a bundle."""

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

import vistok
from vistok.data import DataModule
from vistok.evaluation.evaluate import evaluate
from vistok.evaluation.report import write_report
from vistok.evaluation.table import print_table
from vistok.hub.files import atomic_write
from vistok.metric.codebook_usage import CodebookUsage
from vistok.training.callbacks import LastCheckpoint, Throughput, WeightEMA
from vistok.training.checkpoint import AtomicCheckpointIO
from vistok.training.module import TokenizerModule

log = logging.getLogger(__name__)

RECORD_FILE = "run.json"
# Bounds on the tokens that codebook usage is counted on after training: minutes on a CPU at most.
MAX_USAGE_TOKENS = 2**21
MAX_USAGE_IMAGES = 2**13
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "timm", "torchmetrics", "numpy", "pillow")


def train(config: DictConfig, folder: Path, command: str | None = None) -> dict[str, Any]:
    """Train a tokenizer and write everything about it into a run folder.

    Args:
        config: Composed from ``configs/train.yaml``.
        folder: Run folder; it must not hold another run.
        command: What reproduces the run, quoted in its record and model card.

    Returns:
        The metrics of the final evaluation, or an empty dict on ranks other than 0.

    Raises:
        ValueError: If the config asks for something impossible.
        FileExistsError: If `folder` holds a run already.
        TrainingInterrupted: After a signal, when the checkpoint is written.
    """
    started = time.perf_counter()
    quiet_libraries()
    if not getattr(rank_zero_only, "rank", 0):  # the other processes of one run share its folder
        refuse_existing_run(folder)
    check_checkpoint_path(config.ckpt)
    check_final(config)
    lightning.seed_everything(config.seed, verbose=False)
    data: DataModule = instantiate(config.data, _convert_="all")
    tokenizer = build_tokenizer(config, data)
    module = TokenizerModule(
        tokenizer,
        loss=instantiate(config.loss),
        optimizer=instantiate(config.optimizer, _convert_="all"),  # checkpoints hold plain lists only
        scheduler=instantiate(config.scheduler),
        **OmegaConf.to_container(config.module, resolve=True),  # type: ignore[arg-type]
    )
    trainer = make_trainer(config, folder)
    if trainer.is_global_zero:
        write_record(config, folder, command)
        size = "x".join(map(str, tokenizer.default_size or ()))
        log.info(
            "%s with %s codes per position, %.2f M parameters, %s images, run folder %s",
            type(tokenizer.quantizer).__name__,
            " x ".join(map(str, tokenizer.quantizer.codebook_sizes)) or "continuous",
            sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6,
            size,
            folder,
        )
    trainer.fit(module, data, ckpt_path=config.ckpt, weights_only=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightEMA):
            callback.apply(module)
    if module.skipped_steps:
        log.warning("%d steps were skipped because their gradient was not finite", module.skipped_steps)
    if not trainer.is_global_zero:
        return {}
    return finish(config, folder, module, data, trainer, command, started)


def finish(
    config: DictConfig,
    folder: Path,
    module: TokenizerModule,
    data: DataModule,
    trainer: lightning.Trainer,
    command: str | None,
    started: float,
) -> dict[str, Any]:
    """Evaluate the trained tokenizer, write its bundle and report, print the table."""
    # Saved at once, so that nothing that follows can lose it; what is measured is what users will load.
    bundle = vistok.save(module.tokenizer, folder / "bundle")
    tokenizer = vistok.load(bundle, device=trainer.strategy.root_device)
    data.trainer = None  # from here on this process looks at the whole data, not at a rank's share
    training_usage = usage_on_training_crops(tokenizer, data, config.final.usage_tokens_per_code)
    evaluation = evaluate(
        tokenizer,
        data.eval_dataloader(),
        protocol=data.protocol,
        lpips=config.final.lpips,
        rfid=config.final.rfid,
        train_usage=training_usage,
    )
    if training_usage:
        evaluation.notes["train_utilisation"] = (
            f"is counted over {training_usage['tokens']:,.0f} tokens of training crops that no step has seen; "
            f"uniform draws would use {training_usage['expected_uniform_utilisation']:.1%}"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    throughput = next((callback for callback in callbacks if isinstance(callback, Throughput)), None)
    if throughput is not None and throughput.seconds:
        evaluation.metrics["train_images_per_second"] = throughput.images_per_second
    evaluation.metrics["train_steps"] = trainer.global_step
    evaluation.metrics["train_seconds"] = round(time.perf_counter() - started, 1)
    usage = {name: getattr(evaluation, name) for name in ("per_codebook", "per_scale", "per_bit")}
    measured = {"metrics": evaluation.metrics, "usage": usage, "protocol": evaluation.protocol, "command": command}
    vistok.save(tokenizer, bundle, measured=measured, overwrite=True)
    write_report(evaluation, folder, title=str(config.name), command=command or "")
    print_table({str(config.name): evaluation})
    show_paths(folder, bundle)
    return dict(evaluation.metrics)


def build_tokenizer(config: DictConfig, data: DataModule) -> vistok.Tokenizer:
    """Build the tokenizer of a composed config, with the preprocessing of its data."""
    plain = OmegaConf.to_container(config.tokenizer, resolve=True)
    assert isinstance(plain, dict)
    tokenizer = vistok.build({**plain, "preprocessing": data.preprocessing})  # type: ignore[dict-item]
    # Found out now rather than at the first batch or the first validation.
    tokenizer.grid(tokenizer.default_size)
    tokenizer.grid((data.eval_size, data.eval_size))
    return tokenizer


def make_trainer(config: DictConfig, folder: Path) -> lightning.Trainer:
    """Trainer with the callbacks and loggers of the config; everything it writes goes to `folder`."""
    settings = config.trainer
    batches = settings.max_steps * settings.accumulate_grad_batches
    interval = settings.val_check_interval
    if settings.max_steps > 0 and isinstance(interval, int) and interval > batches:
        log.info("trainer.val_check_interval=%d is longer than the training: validating once, at its end", interval)
        settings.val_check_interval = batches
    callbacks: list[Callback] = [instantiate(callback) for callback in config.callbacks.values() if callback]
    callbacks.append(LastCheckpoint(folder / "checkpoints"))
    loggers = make_loggers(config, folder)
    if not loggers:
        # Lightning's monitor refuses to run without a logger.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    return instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        default_root_dir=str(folder),
        plugins=[AtomicCheckpointIO()],
    )


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Loggers of the config. One that cannot start is reported and left out: no logger stops a run."""
    loggers: list[Logger] = []
    for name, node in (config.logger or {}).items():
        try:
            loggers.append(instantiate(node))
        except Exception as error:  # whatever a logging service raises
            log.warning("logger %s could not start and is left out: %s", name, error)
    if config.ckpt is not None:
        for logger in loggers:
            if isinstance(logger, CSVLogger):
                continue_csv(logger, Path(config.ckpt))
    return loggers


def usage_on_training_crops(tokenizer: vistok.Tokenizer, data: DataModule, tokens_per_code: float) -> dict[str, float]:
    """Codebook usage on at least ``tokens_per_code * codebook_size`` tokens of training crops that no step has seen.

    Large codebooks get fewer: counting ends after 2**21 tokens or 2**13 crops. The result says how many there were.
    A held-out set is often too small to show every code, whatever the tokenizer: this count is large enough to tell.
    """
    usage = CodebookUsage.of(tokenizer.quantizer, sync_on_compute=False)
    if not tokens_per_code or usage is None:
        return {}
    wanted = min(tokens_per_code * tokenizer.quantizer.codebook_size, MAX_USAGE_TOKENS)
    device = next(tokenizer.parameters()).device
    loader = data.train_dataloader()
    # Crops are a function of the epoch: one that no training reaches gives new ones.
    loader.load_state_dict({"epoch": 10**6, "batch": 0})
    seen = crops = 0
    with torch.inference_mode():
        while seen < wanted and crops < MAX_USAGE_IMAGES:
            for batch in loader:
                labels = tokenizer.labels_of(batch)
                labels = labels.to(device) if labels is not None else None
                indices = tokenizer.encode(batch["images"].to(device), labels).indices
                usage.update(indices.cpu())
                seen += indices.numel() // tokenizer.quantizer.num_codebooks
                crops += len(indices)
                if seen >= wanted or crops >= MAX_USAGE_IMAGES:
                    break
    return {name: float(value) for name, value in usage.compute().items() if value.ndim == 0}


def quiet_libraries() -> None:
    """Leave out what libraries say about themselves; their warnings still come through, once."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        # Lightning brings a handler of its own, and Hydra's root handler would print everything a second time.
        logger.handlers.clear()
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck")
    warnings.filterwarnings("ignore", "The dirpath has changed from")  # a resumed run has a folder of its own
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")


def check_final(config: DictConfig) -> None:
    """Raise a ValueError for settings of the final evaluation that would only be missed after the training."""
    known = {"usage_tokens_per_code", "lpips", "rfid"}
    if unknown := set(config.final) - known:
        raise ValueError(f"no setting final.{min(map(str, unknown))}: final has {', '.join(sorted(known))}")
    if config.final.lpips not in (None, "vgg", "alex"):
        raise ValueError(f"final.lpips must be vgg, alex or null, got {config.final.lpips!r}")


def refuse_existing_run(folder: Path) -> None:
    """Raise a FileExistsError if `folder` holds a run."""
    if (folder / RECORD_FILE).exists():
        last = folder / "checkpoints" / "last.ckpt"
        resume = f"resume it with ckpt={last}" if last.exists() else "it has no checkpoint to resume from"
        raise FileExistsError(f"{folder} holds a run already: choose another hydra.run.dir; {resume}")


def check_checkpoint_path(path: str | None) -> None:
    """Raise a FileNotFoundError if `path` is given and is not a file."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"ckpt={path} is not a file: pass runs/.../checkpoints/last.ckpt, or leave ckpt out to start anew"
        )
    if path is not None:
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of pickle, zip or torch, in many forms
            reason = str(error).splitlines()[0]
            raise ValueError(f"ckpt={path} is not a checkpoint that loads without executing code: {reason}") from error


def write_record(config: DictConfig, folder: Path, command: str | None) -> None:
    """Write the resolved config and what is needed to repeat the run: command, commit, versions, machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    record = {
        "command": command or shlex.join(sys.argv),
        "git": git_state(),
        "vistok": vistok.__version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    atomic_write(folder / RECORD_FILE, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


def git_state() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has uncommitted changes; None outside a repository."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def package_version(name: str) -> str | None:
    """Installed version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def continue_csv(logger: CSVLogger, checkpoint: Path) -> None:
    """Copy the rows of the interrupted run up to its checkpoint, so that the resumed run's file is complete."""
    previous = checkpoint.parent.parent / "metrics.csv"
    if not previous.is_file():
        return
    import csv

    step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    with previous.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["step"]) < step]
    for row in rows:
        # As text, so that every number stays as it was written.
        logger.log_metrics({key: value for key, value in row.items() if value and key != "step"}, step=int(row["step"]))  # pyright: ignore
    logger.save()


def show_paths(folder: Path, bundle: Path) -> None:
    """Say where everything is."""
    best = next(iter(sorted((folder / "checkpoints").glob("best*.ckpt"))), None)
    paths = {
        "bundle": bundle,
        "report": folder / "report.html",
        "metrics": folder / "metrics.json",
        "curves": folder / "metrics.csv",
        "reconstructions": folder / "reconstructions",
        "codebook usage": folder / "codebook_usage.png",
        "last checkpoint": folder / "checkpoints" / "last.ckpt",
        "best checkpoint": best,
    }
    from rich.console import Console

    console = Console()
    for name, path in paths.items():
        if path is not None and path.exists():
            console.print(f"[bold]{name:>16}[/bold]  {path}", soft_wrap=True, highlight=False)
