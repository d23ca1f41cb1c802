"""Evaluations from a config: load the models, measure each on the same data, write reports."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from vistok.data import BadSampleLog, DataModule
from vistok.evaluation.comparison import write_comparison
from vistok.evaluation.evaluate import evaluate
from vistok.evaluation.models import NamedModel, open_models
from vistok.evaluation.protocol import Protocol
from vistok.evaluation.report import write_report
from vistok.evaluation.result import Evaluation
from vistok.evaluation.table import print_table
from vistok.metric.feature_cache import default_folder
from vistok.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def evaluate_models(config: Any, folder: Path, command: str) -> dict[str, Any]:
    """Measure the models of a config on its data and write ``metrics.json``, ``report.md`` and ``report.html``.

    Args:
        config: Composed from ``configs/eval.yaml``.
        folder: Where the report of ``bundle=`` goes, or one folder for each of ``models=`` and their comparison; an
            earlier report there is not overwritten.
        command: What reproduces the numbers.

    Returns:
        The metrics of ``bundle=``, or those of each of ``models=`` by name.

    Raises:
        ValueError: If not exactly one of ``bundle=`` and ``models=`` is set, or a model cannot be loaded.
        FileExistsError: If `folder` holds a report already.
    """
    if (config.bundle is None) == (config.models is None):
        raise ValueError("set either bundle=runs/.../bundle or models=[runs/a,runs/b]")
    several = config.models is not None
    if any((folder / name).exists() for name in ("metrics.json", "comparison.json")):
        raise FileExistsError(f"{folder} holds a report already: choose another hydra.run.dir")
    device = pick_device(config.device)
    models = open_models(list(config.models) if several else [str(config.bundle)])
    if not models:
        raise ValueError("models=[] names no model: models=[runs/a,runs/b]")
    rules: Protocol = instantiate(config.protocol, _convert_="all")
    data: DataModule = instantiate(config.data, **data_settings(rules, config.data), _convert_="all")
    text_encoder = instantiate(config.text_encoder)
    if text_encoder is not None and not any(takes_texts(model) for model in models):
        raise ValueError("text_encoder= has no effect: none of the models decodes with the help of texts")
    evaluations: dict[str, Evaluation] = {}
    with ExitStack() as stack:
        cache = default_folder() if config.cache == "auto" else config.cache
        if cache is None and several:
            # Features of the originals are computed once for all models, also where none are kept.
            cache = stack.enter_context(TemporaryDirectory())
        for model in models:
            target = folder / model.name if several else folder
            evaluations[model.name] = _evaluate(config, model, data, rules, device, cache, target, text_encoder)
            write_report(evaluations[model.name], target, title=model.name, command=command)
    print_table(evaluations)
    for name, evaluation in evaluations.items():
        for reason, metrics in evaluation.missing_by_reason().items():
            log.info("%s: without %s: %s", name, ", ".join(metrics), reason)
    if not several:
        log.info("report: %s", folder / "report.html")
        return dict(evaluations[models[0].name].metrics)
    write_comparison(evaluations, folder, command)
    log.info("comparison: %s", folder / "comparison.html")
    return {name: dict(evaluation.metrics) for name, evaluation in evaluations.items()}


def _evaluate(
    config: Any,
    model: NamedModel,
    data: DataModule,
    rules: Protocol,
    device: torch.device,
    cache: str | Path | None,
    folder: Path,
    text_encoder: nn.Module | None,
) -> Evaluation:
    bad_samples = BadSampleLog()

    def batches() -> Iterator[Any]:
        for batch in data.eval_dataloader():
            bad_samples.add(batch["bad"])
            yield batch

    evaluation = evaluate(
        model.model,
        batches(),
        protocol=data.protocol,
        rules=rules,
        lpips=config.lpips,
        rfid=config.rfid,
        distances=None if config.distances is None else list(config.distances),
        fdd=config.fdd,
        cmmd=config.cmmd,
        fvd=config.fvd,
        weights=config.weights,
        device=device,
        references=config.references,
        examples=config.examples,
        cache=cache,
        text_encoder=text_encoder if takes_texts(model) else None,
    )
    if isinstance(model.model, nn.Module):
        model.model.cpu()  # the next one finds the GPU free
    if bad_samples.counts:
        folder.mkdir(parents=True, exist_ok=True)
        log.warning("%d unreadable pictures: %s; %s", len(bad_samples), bad_samples.counts, bad_samples.write(folder))
    return evaluation


def takes_texts(model: NamedModel) -> bool:
    """Whether a model is a tokenizer that decodes with the help of texts."""
    return isinstance(model.model, Tokenizer) and model.model.decoder.text_dim is not None


def data_settings(rules: Protocol, config: Any) -> dict[str, Any]:
    """Settings of the data that a protocol wants, as far as this kind of data has them; the others are warned of."""
    for name in sorted(set(rules.data) - set(config)):
        log.warning(
            "protocol %s wants %s=%s, which this data does not have: numbers are those of the protocol only if the "
            "pictures were prepared so",
            *(rules.name, name, rules.data[name]),
        )
    return {name: value for name, value in rules.data.items() if name in config}


def pick_device(name: str) -> torch.device:
    """Device of a name; ``auto`` is the first GPU, if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} cannot be used ({str(error).splitlines()[0]}): use auto or cpu") from error
    return device
