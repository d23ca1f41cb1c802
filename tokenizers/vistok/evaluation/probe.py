"""What the features or codes of a tokenizer tell of a picture's class: a linear probe and nearest neighbours."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vistok.data import DataModule
from vistok.data.module import refuse_native
from vistok.evaluation.examples import draw
from vistok.evaluation.models import device_of, open_models
from vistok.evaluation.report import write_text
from vistok.evaluation.run import Source, check_kinds, pick_device
from vistok.tokenizer import Tokenizer

log = logging.getLogger(__name__)
FEATURES = ("encoder", "codes")
POOLINGS = ("mean", "flatten")
KINDS = {"test_share": float, "c": float, "neighbours": int}


class Labelled(NamedTuple):
    """Rows of pictures, with their classes and keys."""

    rows: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    keys: list[str]


@torch.inference_mode()
def collect(
    tokenizer: Tokenizer, batches: Iterable[Mapping[str, Any]], features: str = "encoder", pooling: str = "mean"
) -> Labelled:
    """Rows of all pictures.

    Args:
        tokenizer: In evaluation mode.
        batches: Dicts with ``images`` ``(b c H W)`` in [-1, 1], ``labels`` and ``keys``.
        features: ``encoder``: what the encoder gives; ``codes``: what the quantizer makes of it.
        pooling: ``mean`` over all positions, or ``flatten``: all positions after each other.

    Raises:
        ValueError: If a choice is unknown, or there are no pictures or no labels.
    """
    for name, value, allowed in (("features", features, FEATURES), ("pooling", pooling, POOLINGS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    device = device_of(tokenizer)
    rows, labels, keys = [], [], []
    for batch in batches:
        if not len(batch["images"]):
            continue
        if "labels" not in batch:
            raise ValueError("these pictures have no labels: data=image_folder takes them from its first-level folders")
        images = batch["images"].to(device)
        found = tokenizer.encoder(images) if features == "encoder" else tokenizer.encode(images).codes
        found = found.flatten(2).float()
        rows.append((found.mean(2) if pooling == "mean" else found.flatten(1)).cpu())
        labels.append(batch["labels"])
        keys += batch["keys"]
    if not rows:
        raise ValueError("there was no picture: check the data source and split")
    return Labelled(torch.cat(rows), torch.cat(labels), keys)


def relabel(pictures: Labelled, classes: Sequence[str], fitted: Sequence[str]) -> Labelled:
    """Labels of one set in the numbers of another, whose classes may be more.

    Args:
        pictures: With labels that are positions in `classes`.
        classes: Names of the classes of the set, empty where it tells none.
        fitted: Likewise of the set that is fitted on.

    Raises:
        ValueError: If a class is not among those that are fitted on.
    """
    if not classes or not fitted or list(classes) == list(fitted):
        return pictures
    if unknown := sorted(set(classes) - set(fitted)):
        raise ValueError(
            f"the classes {', '.join(unknown)} are tested on and not among those that are fitted on, "
            f"{', '.join(fitted)}: name the folders of both sets alike"
        )
    numbers = torch.tensor([list(fitted).index(name) for name in classes])
    return pictures._replace(labels=numbers[pictures.labels])


def split(pictures: Labelled, test_share: float) -> tuple[Labelled, Labelled]:
    """Pictures to fit on and to test on, by a hash of their keys.

    Raises:
        ValueError: If the share is not between 0 and 1, or leaves nothing on a side.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
    tested = torch.tensor([draw(key) < test_share for key in pictures.keys])
    if tested.all() or not tested.any():
        raise ValueError(f"{len(tested)} pictures are too few for test_share={test_share}")
    sides = []
    for side in (~tested, tested):
        chosen = side.nonzero().flatten()
        keys = [pictures.keys[number] for number in chosen]
        sides.append(Labelled(pictures.rows[chosen], pictures.labels[chosen], keys))
    return sides[0], sides[1]


def probe(fitted: Labelled, tested: Labelled, *, c: float = 1.0, neighbours: int = 20) -> dict[str, float]:
    """Accuracies in [0, 1]: ``linear``, ``knn``, and ``majority``, that of always naming the most frequent class.

    Args:
        fitted: What the classifiers are fitted on.
        tested: What they are tested on.
        c: Inverse strength of the L2 penalty of the logistic regression, on standardised rows.
        neighbours: Number of nearest neighbours by cosine that vote; fewer if there are fewer pictures.

    Raises:
        ValueError: If there is only one class to fit on, or a setting is not positive.
    """
    if c <= 0 or neighbours < 1:
        raise ValueError(f"c must be positive and neighbours at least 1, got {c} and {neighbours}")
    (rows, labels), (test_rows, test_labels) = ((side.rows.numpy(), side.labels.numpy()) for side in (fitted, tested))
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least 2 classes to fit on, got {classes.tolist()}")
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(rows, labels)
    knn = KNeighborsClassifier(min(neighbours, len(rows)), metric="cosine").fit(rows, labels)
    return {
        "linear": float(linear.score(test_rows, test_labels)),
        "knn": float(knn.score(test_rows, test_labels)),
        "majority": float((test_labels == classes[counts.argmax()]).mean()),
    }


def _classes(data: DataModule) -> Sequence[str]:
    """Names of the labels, in their order; empty for a source that tells none."""
    return getattr(getattr(data.eval_dataset, "source", None), "classes", ())


def probe_bundle(config: Any, folder: Path, command: str) -> dict[str, float]:
    """Probe the tokenizer of a config; writes ``probe.json`` with the accuracies and how they were measured.

    Args:
        config: Composed from ``configs/probe.yaml``.
        folder: Where the file goes; an earlier one is not overwritten.
        command: What reproduces the numbers.

    Raises:
        ValueError: If the model is not a tokenizer, or as for `collect`, `split` and `probe`.
        FileExistsError: If the folder holds one already.
    """
    if (folder / "probe.json").exists():
        raise FileExistsError(f"{folder} holds a probe already: choose another hydra.run.dir")
    check_kinds(config, KINDS)
    [(name, tokenizer)] = open_models([config.bundle])
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{name} is no tokenizer of vistok: a probe needs features or codes")
    tokenizer.to(pick_device(config.device))
    data: DataModule = instantiate(config.data, _convert_="all")
    refuse_native(data)
    options = {"features": config.features, "pooling": config.pooling}
    source = Source(data)
    tested = collect(tokenizer, source, **options)
    source.bad_samples_to(folder)
    protocol: dict[str, Any] = {"tested_on": data.protocol, **options}
    if config.fit is None:
        fitted, tested = split(tested, config.test_share)
        protocol |= {"fitted_on": "the other pictures of the same set, by a hash of their keys"}
        protocol |= {"test_share": config.test_share}
    else:
        fit_data: DataModule = instantiate(config.fit, _convert_="all")
        fit_source = Source(fit_data)
        fitted = collect(tokenizer, fit_source, **options)
        fit_source.bad_samples_to(folder / "fit")
        tested = relabel(tested, _classes(data), _classes(fit_data))
        protocol |= {"fitted_on": fit_data.protocol}
    accuracies = probe(fitted, tested, c=config.c, neighbours=config.neighbours)
    protocol |= {
        "fitted_images": len(fitted.keys),
        "tested_images": len(tested.keys),
        "classes": len(fitted.labels.unique()),
        "dimensions": fitted.rows.shape[1],
        "linear": f"logistic regression of scikit-learn on standardised rows, L2, C={config.c:g}",
        "knn": f"{min(config.neighbours, len(fitted.keys))} neighbours by cosine, equal votes",
    }
    record = {"title": name, "command": command, "accuracy": accuracies, "protocol": protocol}
    write_text(folder / "probe.json", json.dumps(record, indent=2) + "\n")
    summary = ", ".join(f"{kind} {value:.1%}" for kind, value in accuracies.items())
    log.info("%s: %s of %d pictures, fitted on %d", name, summary, len(tested.keys), len(fitted.keys))
    log.info("protocol: %s", folder / "probe.json")
    return accuracies
