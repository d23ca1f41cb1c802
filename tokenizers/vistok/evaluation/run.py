"""One evaluation from a config: load a bundle, measure it, write the report."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from vistok.data import BadSampleLog, DataModule
from vistok.evaluation.evaluate import evaluate
from vistok.evaluation.protocol import Protocol
from vistok.evaluation.report import write_report
from vistok.evaluation.table import print_table
from vistok.hub import load
from vistok.hub.bundle import find_bundle

log = logging.getLogger(__name__)


def evaluate_bundle(config: Any, folder: Path, command: str) -> dict[str, Any]:
    """Measure the bundle of a config on its data and write ``metrics.json``, ``report.md`` and ``report.html``.

    Args:
        config: Composed from ``configs/eval.yaml``.
        folder: Where the report goes; an earlier report there is not overwritten.
        command: What reproduces the numbers.

    Returns:
        The metrics.

    Raises:
        FileExistsError: If `folder` holds a report already.
    """
    if (folder / "metrics.json").exists():
        raise FileExistsError(f"{folder} holds a report already: choose another hydra.run.dir")
    bundle = find_bundle(config.bundle)
    tokenizer = load(bundle, device=pick_device(config.device))
    rules: Protocol = instantiate(config.protocol, _convert_="all")
    data: DataModule = instantiate(config.data, **data_settings(rules, config.data), _convert_="all")
    bad_samples = BadSampleLog()

    def batches() -> Any:
        for batch in data.eval_dataloader():
            bad_samples.add(batch["bad"])
            yield batch

    evaluation = evaluate(
        tokenizer,
        batches(),
        protocol=data.protocol,
        rules=rules,
        lpips=config.lpips,
        rfid=config.rfid,
        distances=None if config.distances is None else list(config.distances),
        fdd=config.fdd,
        cmmd=config.cmmd,
        weights=config.weights,
        references=config.references,
        examples=config.examples,
    )
    if bad_samples.counts:
        log.warning("%d unreadable pictures: %s; %s", len(bad_samples), bad_samples.counts, bad_samples.write(folder))
    write_report(evaluation, folder, title=name_of(bundle), command=command)
    print_table({name_of(bundle): evaluation})
    for metric, reason in evaluation.missing.items():
        log.info("%s is missing: %s", metric, reason)
    log.info("report: %s", folder / "report.html")
    return dict(evaluation.metrics)


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


def name_of(bundle: Path) -> str:
    """A short name: that of the run folder for the bundle of a run."""
    return bundle.resolve().parent.name if bundle.name == "bundle" else bundle.resolve().name
