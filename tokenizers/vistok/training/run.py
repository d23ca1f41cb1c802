"""One training run: from a config to a run folder with checkpoints, numbers, pictures and a bundle."""

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

import vistok
from vistok.data import DataModule
from vistok.data.module import refuse_native
from vistok.evaluation.evaluate import evaluate
from vistok.evaluation.report import write_report
from vistok.evaluation.table import print_table
from vistok.hub.files import atomic_write
from vistok.loss import AdversarialLoss
from vistok.metric.codebook_usage import CodebookUsage
from vistok.training.callbacks import KeptSettings, Throughput, WeightEMA
from vistok.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from vistok.training.loggers import MetricsCSV, SafeLogger
from vistok.training.module import TokenizerModule
from vistok.training.pretrained import fill_discriminator, origin, take_over
from vistok.training.sharded import ShardedStrategy, ShardedTokenizerModule

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
        folder: Run folder; it must not hold another run, unless ``ckpt=auto`` continues that one.
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
    continues = config.ckpt == "auto"
    if not continues and not getattr(rank_zero_only, "rank", 0):  # the other processes of one run share its folder
        refuse_existing_run(folder)
    checkpoint = find_checkpoint(config.ckpt, folder)
    check_final(config)
    check_trainer(config)
    lightning.seed_everything(config.seed, verbose=False)
    data: DataModule = instantiate(config.data, _convert_="all")
    refuse_native(data)
    start = take_over(config)
    tokenizer = build_tokenizer(config, data)
    if start is not None:
        start.fill(tokenizer)
    compile_networks(tokenizer, config.trainer.compile)
    trainer = make_trainer(config, folder, checkpoint)
    global_batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    adversarial = build_adversarial(config)
    if config.pretrained.discriminator is not None:
        fill_discriminator(adversarial, config.pretrained.discriminator)
    text_encoder = instantiate(config.text_encoder)
    sharded = config.trainer.strategy == "fsdp"
    module = (ShardedTokenizerModule if sharded else TokenizerModule)(
        tokenizer,
        loss=instantiate(config.loss),
        optimizer=instantiate(config.optimizer, _convert_="all"),  # checkpoints hold plain lists only
        scheduler=instantiate(config.scheduler, global_batch=global_batch, _convert_="all"),
        adversarial=adversarial,
        text_encoder=text_encoder,
        **OmegaConf.to_container(config.module, resolve=True),  # type: ignore[arg-type]
    )
    if trainer.is_global_zero:
        size = "x".join(map(str, tokenizer.default_size or ()))
        log.info(
            "%s with %s codes per position, %.2f M parameters, %s images, run folder %s",
            type(tokenizer.quantizer).__name__,
            " x ".join(map(str, tokenizer.quantizer.codebook_sizes)) or "continuous",
            sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6,
            size,
            folder,
        )
    with recorded(trainer, config, folder, command):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightEMA):
            callback.apply(module)
    if module.skipped_steps:
        log.warning("%d steps were skipped because their gradient was not finite", module.skipped_steps)
    tokenizer = module.whole_tokenizer()
    if not trainer.is_global_zero:
        return {}
    return finish(config, folder, tokenizer, data, trainer, command, started, text_encoder)


def finish(
    config: DictConfig,
    folder: Path,
    tokenizer: vistok.Tokenizer,
    data: DataModule,
    trainer: lightning.Trainer,
    command: str | None,
    started: float,
    text_encoder: nn.Module | None,
) -> dict[str, Any]:
    """Evaluate the trained tokenizer, write its bundle and report, print the table."""
    # Saved at once, so that nothing that follows can lose it; what is measured is what users will load.
    bundle = vistok.save(tokenizer, folder / "bundle", origin=origin(config), overwrite=config.ckpt == "auto")
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
        text_encoder=text_encoder,
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
    vistok.save(tokenizer, bundle, measured=measured, origin=origin(config), overwrite=True)
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
    for size in (tokenizer.default_size, data.size_of(data.eval_size), *data.train_sizes):
        tokenizer.grid(size)
    return tokenizer


def compile_networks(tokenizer: vistok.Tokenizer, compile: bool | str) -> None:
    """Compile encoder and decoder by `torch.compile`; the quantizer, whose work depends on its state, stays as it is.

    Args:
        tokenizer: Changed in place; names and values of its state stay the same.
        compile: Whether to, or the name of the backend, such as ``"inductor"``, which True stands for.
    """
    if compile:
        backend = "inductor" if compile is True else compile
        if backend not in torch._dynamo.list_backends(exclude_tags=()):
            raise ValueError(
                f"trainer.compile must be true, false or a backend of torch.compile, got {backend!r}: choose one of "
                + ", ".join(torch._dynamo.list_backends(exclude_tags=()))
            )
        tokenizer.encoder.compile(backend=backend)
        tokenizer.decoder.compile(backend=backend)


def build_adversarial(config: DictConfig) -> AdversarialLoss | None:
    """Build the discriminator of a composed config with its losses; None for ``discriminator=none``."""
    if not config.discriminator:
        return None
    node: Any = OmegaConf.to_container(config.discriminator, resolve=True)
    settings = node.pop("adversarial")
    return instantiate(settings, discriminator=instantiate(node, _convert_="all"), _convert_="all")


def make_trainer(config: DictConfig, folder: Path, checkpoint: Path | None = None) -> lightning.Trainer:
    """Trainer with the callbacks and loggers of the config; everything it writes goes to `folder`.

    Args:
        config: Composed from ``configs/train.yaml``.
        folder: Run folder.
        checkpoint: Where the run goes on from; None: it begins.
    """
    settings = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(settings, dict)
    torch.set_float32_matmul_precision(settings.pop("float32_matmul_precision"))
    settings.pop("compile")
    batches = settings["max_steps"] * settings["accumulate_grad_batches"]
    interval = settings["val_check_interval"]
    if settings["max_steps"] > 0 and isinstance(interval, int) and interval > batches:
        log.info("trainer.val_check_interval=%d is longer than the training: validating once, at its end", interval)
        settings["val_check_interval"] = batches
    if settings["strategy"] == "fsdp":
        settings["strategy"] = ShardedStrategy()
    callbacks: list[Callback] = [instantiate(callback) for callback in config.callbacks.values() if callback]
    callbacks.append(KeptSettings(config))
    loggers = make_loggers(config, checkpoint)
    if not loggers:
        # Lightning's monitor refuses to run without a logger.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning would save a checkpoint of its own and requeue the job, beside what `LastCheckpoint` does.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return instantiate(
        settings,
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        default_root_dir=str(folder),
        plugins=plugins,
    )


def make_loggers(config: DictConfig, checkpoint: Path | None = None) -> list[SafeLogger]:
    """Loggers of the config. One that cannot start is reported and left out: no logger stops a run.

    Args:
        config: Composed from ``configs/train.yaml``.
        checkpoint: Where the run goes on from: ``metrics.csv`` begins with the rows of before it.
    """
    previous, step = None, 0
    if checkpoint is not None:
        previous = checkpoint.parent.parent / "metrics.csv"
        step = read_checkpoint(checkpoint, "ckpt")["global_step"]
    loggers: list[SafeLogger] = []
    for name, node in (config.logger or {}).items():
        try:
            logger = instantiate(node)
            if isinstance(logger, MetricsCSV):
                logger.start(previous, step)
            elif isinstance(logger, TensorBoardLogger):
                logger._kwargs["purge_step"] = step  # hides what the same folder has of later steps
        except Exception as error:  # whatever a logging service raises
            log.warning("logger %s could not start and is left out: %s", name, error)
        else:
            loggers.append(SafeLogger(logger, str(name)))
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
    # Frozen networks of losses stay in evaluation mode on purpose.
    warnings.filterwarnings("ignore", "Found .* module\\(s\\) in eval mode at the start of training")
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


def check_trainer(config: DictConfig) -> None:
    """Raise a ValueError for settings of the trainer that training cannot keep to."""
    settings = config.trainer
    strategy = str(settings.strategy)
    if not strategy.startswith(("auto", "ddp", "single_device")) and strategy != "fsdp":
        raise ValueError(
            f"trainer.strategy={strategy} divides parameters among processes, but codebook updates and the gradient's "
            "norm need whole ones: use trainer.strategy=fsdp, which divides encoder and decoder only, or ddp"
        )
    if strategy == "fsdp" and config.callbacks.get("ema"):
        raise ValueError(
            "trainer.strategy=fsdp divides parameters among processes, and their average would be whole on each of "
            "them: set callbacks.ema=null, or trainer.strategy=ddp"
        )
    if strategy == "fsdp" and settings.compile:
        raise ValueError(
            "trainer.strategy=fsdp and trainer.compile exclude each other: set trainer.compile=false, or "
            "trainer.strategy=ddp"
        )
    if str(settings.precision) in ("16-mixed", "16") and config.optimizer.get("fused"):
        raise ValueError(
            f"trainer.precision={settings.precision} and optimizer.fused=true exclude each other: a fused optimiser "
            "scales the gradients back by itself, so they cannot be clipped before. Use trainer.precision=bf16-mixed "
            "or optimizer.fused=false"
        )


def find_checkpoint(ckpt: str | None, folder: Path) -> Path | None:
    """Path of the checkpoint to go on from, once it is known to load; None to begin.

    Args:
        ckpt: A checkpoint, or a run folder for its last one; ``"auto"`` for the last one in `folder`, if there is one.
        folder: Run folder.

    Raises:
        FileNotFoundError: If `ckpt` is a path and there is no checkpoint.
        ValueError: If it cannot be loaded without executing code.
    """
    if not ckpt:
        return None
    path = folder if ckpt == "auto" else Path(ckpt).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        if ckpt == "auto":
            return None
        raise FileNotFoundError(
            f"ckpt={path} is not a file: pass a run folder or one of its checkpoints, or leave ckpt out to start anew"
        )
    read_checkpoint(path, "ckpt")
    return path


@contextmanager
def recorded(trainer: lightning.Trainer, config: DictConfig, folder: Path, command: str | None) -> Iterator[None]:
    """Write the record of a run before it trains; one that is refused before its first step leaves the folder free."""
    first = not (folder / RECORD_FILE).exists()
    if trainer.is_global_zero:
        write_record(config, folder, command)
    try:
        yield
    except ValueError:
        if trainer.is_global_zero and first and not trainer.global_step:
            (folder / RECORD_FILE).unlink()
        raise


def write_record(config: DictConfig, folder: Path, command: str | None) -> None:
    """Write the resolved config and what is needed to repeat the run: command, commit, versions, machine.

    A run that continues in its folder keeps the records of before under ``continues``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RECORD_FILE
    before = [json.loads(file.read_text())] if file.exists() else []
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
        "continues": [*(before[0].pop("continues") if before else []), *before],
    }
    atomic_write(file, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


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
