"""Evaluations from a config: load the models, measure each on the same data, write reports."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from vistok.data import BadSampleLog, DataModule
from vistok.evaluation.comparison import write_comparison
from vistok.evaluation.evaluate import MEBIBYTE, evaluate
from vistok.evaluation.models import NamedModel, open_models
from vistok.evaluation.protocol import Protocol
from vistok.evaluation.report import write_report
from vistok.evaluation.result import Evaluation
from vistok.evaluation.table import missing, print_table
from vistok.metric.feature_cache import FeatureCache, default_folder
from vistok.tokenizer import Tokenizer

log = logging.getLogger(__name__)
GIBIBYTE = 2**30
KINDS = {"rfid": bool, "references": bool, "examples": int, "cache_gib": float}
KIND_TEXTS = {bool: "true or false", int: "a whole number", float: "a number"}


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
        ValueError: If not exactly one of ``bundle=`` and ``models=`` is set, a setting is of another kind, a model
            cannot be loaded, or one of several cannot be measured; the others are then measured and written before.
        FileExistsError: If `folder` holds a report already.
    """
    if (config.bundle is None) == (config.models is None):
        raise ValueError("set either bundle=runs/.../bundle or models=[runs/a,runs/b]")
    several = config.models is not None
    if any((folder / name).exists() for name in ("metrics.json", "comparison.json")):
        raise FileExistsError(f"{folder} holds a report already: choose another hydra.run.dir")
    if several and (isinstance(config.models, str) or not isinstance(config.models, Sequence)):
        raise ValueError(f"models={config.models} must be a list: models=[runs/a,runs/b], or bundle=runs/a for one")
    check_kinds(config, KINDS)
    device = pick_device(config.device)
    bundle = config.bundle if isinstance(config.bundle, Mapping) else str(config.bundle)
    models = open_models(list(config.models) if several else [bundle])
    if not models:
        raise ValueError("models=[] names no model: models=[runs/a,runs/b]")
    rules: Protocol = instantiate(config.protocol, _convert_="all")
    settings = data_settings(rules, config.data)
    if settings and config.data.get("native") is not None:
        resizes = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ValueError(
            f"protocol={rules.name} resizes pictures ({resizes}), data.native={config.data.native} leaves them as they "
            "are: leave out one of them"
        )
    data: DataModule = instantiate(config.data, **settings, _convert_="all")
    text_encoder = instantiate(config.text_encoder)
    if text_encoder is not None and not any(takes_texts(model) for model in models):
        raise ValueError("text_encoder= has no effect: none of the models decodes with the help of texts")
    evaluations: dict[str, Evaluation] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        cache = _open_cache(config, several, stack)
        for model in models:
            target = folder / model.name if several else folder
            source = Source(data)
            try:
                evaluation = _evaluate(config, model, source, rules, device, cache, text_encoder)
            except Exception as error:
                # What fails in the data would fail for every model.
                if not several or source.failed:
                    raise
                failed[model.name] = f"{type(error).__name__}: {error}"
                # A mistake of the user says what to write instead; anything else is found by where it happened.
                expected = isinstance(error, ValueError | OSError)
                log.error("%s cannot be measured: %s", model.name, error, exc_info=None if expected else error)
                continue
            evaluations[model.name] = evaluation
            write_report(evaluation, target, title=model.name, command=command)
            source.bad_samples_to(target)
        if cache is not None:
            _tell(cache, config.cache_gib)
    if evaluations:
        print_table(evaluations)
    for reason, names in missing(evaluations).items():
        log.info("%s: %s", ", ".join(names), reason)
    if not several:
        log.info("report: %s", folder / "report.html")
        return dict(evaluations[models[0].name].metrics)
    if evaluations:
        write_comparison(evaluations, folder, command, failed)
        log.info("comparison: %s", folder / "comparison.html")
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        where = f"the others are in {folder}" if evaluations else "there are no others"
        raise ValueError(f"{len(failed)} of {len(models)} models cannot be measured: {reasons}; {where}")
    return {name: dict(evaluation.metrics) for name, evaluation in evaluations.items()}


class Source:
    """The batches of one evaluation, what in them was unreadable, and whether they ended in an error."""

    def __init__(self, data: DataModule) -> None:
        self.data, self.failed = data, False
        self._bad = BadSampleLog()

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.data.eval_dataloader():
                self._bad.add(batch["bad"])
                yield batch
        except Exception:
            self.failed = True
            raise

    def bad_samples_to(self, folder: Path) -> None:
        """Write the list of what was unreadable, if anything was."""
        if self._bad.counts:
            folder.mkdir(parents=True, exist_ok=True)
            log.warning("%d unreadable samples: %s; %s", len(self._bad), self._bad.counts, self._bad.write(folder))


def _evaluate(
    config: Any,
    model: NamedModel,
    source: Source,
    rules: Protocol,
    device: torch.device,
    cache: FeatureCache | None,
    text_encoder: nn.Module | None,
) -> Evaluation:
    try:
        return evaluate(
            model.model,
            source,
            protocol=source.data.protocol,
            rules=rules,
            lpips=config.lpips,
            rfid=config.rfid,
            distances=config.distances,
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
    finally:
        if isinstance(model.model, nn.Module):
            model.model.cpu()  # the next one finds the GPU free


def _open_cache(config: Any, several: bool, stack: ExitStack) -> FeatureCache | None:
    """Where features of the originals are kept: where the user says, and for several models as long as they run."""
    if config.cache_gib <= 0:
        raise ValueError(f"cache_gib must be positive, got {config.cache_gib}: cache=null keeps nothing")
    limit = int(config.cache_gib * GIBIBYTE)
    if config.cache is not None:
        return FeatureCache(default_folder() if config.cache == "auto" else config.cache, limit)
    return FeatureCache(stack.enter_context(TemporaryDirectory()), limit) if several else None


def _tell(cache: FeatureCache, limit: float) -> None:
    if not cache.hits + cache.misses:
        return
    # More than the images of the data, where several networks or models looked at them.
    log.info(
        "features of originals: %d found and %d computed; %s takes %.1f MiB of at most cache_gib=%g",
        *(cache.hits, cache.misses, cache.folder, cache.size() / MEBIBYTE, limit),
    )
    if cache.unkept:
        log.warning("%d of them were not kept and are computed again: raise cache_gib or free the disk", cache.unkept)


def takes_texts(model: NamedModel) -> bool:
    """Whether a model is a tokenizer that decodes with the help of texts."""
    return isinstance(model.model, Tokenizer) and model.model.decoder.text_dim is not None


def data_settings(rules: Protocol, config: Any) -> dict[str, Any]:
    """Settings of the data that a protocol wants, as far as this kind of data has them; the others are warned of."""
    for name in sorted(set(rules.data) - set(config)):
        log.warning(
            "protocol %s wants %s=%s, which this data does not have: numbers are those of the protocol only if the "
            "images or videos were prepared so",
            *(rules.name, name, rules.data[name]),
        )
    wanted = {name: value for name, value in rules.data.items() if name in config}
    for name, value in wanted.items():
        if config[name] != value:
            log.info("protocol %s sets data.%s=%s, in place of %s", rules.name, name, value, config[name])
    return wanted


def check_kinds(config: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuse a setting of another kind than it has to be: a command line takes any text.

    Raises:
        ValueError: If one is.
    """
    for name, kind in kinds.items():
        value = config[name]
        allowed = (int, float) if kind is float else kind
        # To Python true is a number.
        if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{name} must be {KIND_TEXTS[kind]}, got {value!r}")


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
