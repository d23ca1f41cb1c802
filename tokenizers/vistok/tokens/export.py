"""Whole data sets to tokens: files that any number of processes write, and that a killed export leaves in order.

Each file holds the tokens of a fixed share of the pictures and takes its name when it is complete. So an export that
was killed goes on with the files that are missing, and processes need not talk to each other: each writes every n-th
file, and the one that finds all of them there writes the manifest.
"""

import copy
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import Float, Int
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from vistok.config import config_of
from vistok.data import BadSample, DataModule, WebDatasetData, to_model_range, to_uint8
from vistok.data.bad_samples import BadSampleLog
from vistok.data.collate import Batch, Sample
from vistok.data.module import refuse_native
from vistok.evaluation.run import pick_device
from vistok.hub.bundle import WEIGHTS_FILE, find_bundle, load
from vistok.hub.files import atomic_write, sha256
from vistok.metric.image import psnr
from vistok.tokenizer import Tokenizer
from vistok.tokens.dataset import TokenDataset, encode_keys, keys_of, read_metadata, read_shard
from vistok.tokens.layouts import check_layout, write_layout
from vistok.tokens.manifest import Layout, Manifest, smallest_dtype

log = logging.getLogger(__name__)

VIEWS = {
    "center": ("center",),
    "flip": ("center", "center_flipped"),
    "ten_crop": tuple(
        f"{place}{suffix}"
        for suffix in ("", "_flipped")
        for place in ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    ),
}
# Settings of the data that do not change what is exported.
INDIFFERENT = (
    "num_workers",
    "batch_size",
    "eval_batch_size",
    "shuffle_buffer",
    "max_bad",
    "max_bad_share",
    "worker_timeout",
    "worker_restarts",
)
NUM_CHECKED = 8


class Share(Dataset):
    """Some items of a data set, by their number.

    Args:
        dataset: The whole, whose items are asked for by ``(epoch, number)``.
        items: These of the share.
    """

    def __init__(self, dataset: Any, items: Sequence[tuple[int, int]]) -> None:
        self.dataset = dataset
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: tuple[int, int]) -> Sample | BadSample:
        sample = self.dataset[self.items[item[1]]]
        # Training puts another picture in the place of one that it cannot read, which would be exported twice.
        replaced = () if isinstance(sample, BadSample) else sample.get("bad", ())
        return replaced[0] if replaced else sample


@dataclass(frozen=True)
class Export:
    """What is exported: everything that the tokens depend on.

    Args:
        tokenizer: In evaluation mode.
        data: Its evaluation pictures are exported; for ``train`` views random crops of its training pictures.
        views: ``center`` | ``flip``: the picture and its mirror image | ``ten_crop``: corners and centre of a larger
            picture, and their mirror images, in torchvision's order, as LlamaGen has them | ``train``: `num_views`
            random crops, as training has them.
        num_views: Number of ``train`` views.
        shard_size: Pictures of a file; a tar file of pictures always becomes one file.
        identity: What else identifies the tokens, such as the hash of the weights: files of another export are refused.
    """

    tokenizer: Tokenizer
    data: DataModule
    views: str
    num_views: int
    shard_size: int
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.views not in (*VIEWS, "train"):
            raise ValueError(f"views must be {', '.join(VIEWS)} or train, got {self.views!r}")
        if self.views != "train" and self.num_views != 1:
            raise ValueError(f"num_views={self.num_views} has no effect on views={self.views}: write num_views=1")
        if min(self.num_views, self.shard_size) < 1:
            raise ValueError(f"num_views and shard_size must be at least 1, got {self.num_views}, {self.shard_size}")
        if not isinstance(self.data, WebDatasetData) and isinstance(self.data.eval_dataset, IterableDataset):
            raise ValueError(
                f"{type(self.data).__name__} cannot be divided into files: export a folder or tar files of pictures, "
                "one data set after the other"
            )
        if self.views == "train" and isinstance(self.data, WebDatasetData):
            raise ValueError(
                "views=train needs pictures that can be asked for by number, which shards cannot: choose views=flip or "
                "ten_crop"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Size of the views in pixels."""
        return self.data.image_size, self.data.image_size

    @property
    def layout(self) -> Layout:
        """Of the tokens of a view."""
        return Layout.of(self.tokenizer, self.size)

    @property
    def view_names(self) -> tuple[str, ...]:
        """Names of the views of a picture."""
        return VIEWS.get(self.views) or tuple(f"train{number}" for number in range(self.num_views))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens are in which file."""
        if isinstance(self.data, WebDatasetData):
            shards = [Path(shard) for shard in self.data.val_shards]
            pictures: Any = [(path.name, path.stat().st_size if path.is_file() else None) for path in shards]
        else:
            pictures = getattr(getattr(self._dataset, "source", None), "fingerprint", len(self._dataset))
        described = [asdict(self.layout), self.view_names, self.shard_size, self.identity, pictures]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def file(self, number: int) -> str:
        """Name of a file of tokens."""
        return f"tokens-{number:05d}.safetensors"

    @property
    def num_files(self) -> int:
        """How many files there will be."""
        if isinstance(self.data, WebDatasetData):
            return len(self.data.val_shards)
        return -(-len(self._dataset) // self.shard_size)

    @property
    def _dataset(self) -> Any:
        return self.data.train_dataset if self.views == "train" else self.data.eval_dataset

    def batches(self, number: int, batch_size: int, num_workers: int | None = None) -> Iterator[Batch]:
        """Pictures of a file, in their order, as batches of at most `batch_size` views; images are uint8.

        Args:
            number: Of the file.
            batch_size: Views of a batch; a batch has all views of at least one picture.
            num_workers: Loading processes; None: as the data says.
        """
        # The evaluation loader of the same data with fewer pictures.
        data: Any = copy.copy(self.data)
        pictures = max(1, batch_size // len(self.view_names))
        data.eval_batch_size = pictures * self.num_views
        data.num_workers = data.num_workers if num_workers is None else num_workers
        if isinstance(data, WebDatasetData):
            data.val_shards = [data.val_shards[number]]
        else:
            numbers = range(len(self._dataset))[number * self.shard_size :][: self.shard_size]
            items = [(epoch, index) for index in numbers for epoch in range(self.num_views)]
            data.eval_dataset = Share(self._dataset, items)
        yield from data.make_eval_loader(0, 1, raw=True)

    def views_of(self, batch: Batch, device: torch.device) -> Float[Tensor, "n c s s"]:
        """Views in [-1, 1] of the pictures of a batch, made on the device."""
        return self.cut(to_model_range(batch["images"].to(device, non_blocking=True)))

    def cut(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "n c s s"]:
        """Views of pictures, those of a picture one after the other."""
        if self.views == "flip":
            return torch.stack([images, images.flip(-1)], 1).flatten(0, 1)
        if self.views == "ten_crop":
            return torch.stack(F.ten_crop(images, list(self.size)), 1).flatten(0, 1)
        return images

    def encode(self, batch: Batch, batch_size: int, device: torch.device) -> Int[Tensor, "b views length"]:
        """Tokens of all views of the pictures of a batch."""
        views = self.views_of(batch, device)
        labels = self.tokenizer.labels_of(batch)
        if labels is not None:
            labels = labels.to(device).repeat_interleave(len(views) // len(labels))
        parts = [
            self.tokenizer.flatten(
                self.tokenizer.encode(
                    views[start : start + batch_size], None if labels is None else labels[start : start + batch_size]
                ).indices
            )
            for start in range(0, len(views), batch_size)
        ]
        return torch.cat(parts).unflatten(0, (-1, len(self.view_names)))

    def write(self, number: int, folder: Path, batch_size: int) -> int:
        """Write a file; returns its number of pictures.

        Raises:
            ValueError: If only some of its pictures have labels.
            OSError: If a picture could be read for some of its views only.
        """
        tokens, labels, keys, bad = [], [], [], []
        bad_log = BadSampleLog()
        device = next(self.tokenizer.parameters()).device
        dtype = smallest_dtype(self.tokenizer.vocab_size)
        for batch in self.batches(number, batch_size):
            for start in range(0, len(batch["bad"]), self.num_views):
                views = batch["bad"][start : start + self.num_views]
                if [sample.key for sample in views] != [views[0].key] * self.num_views:
                    raise OSError(f"{views[0].key} could be read for some of its views only: run the export again")
                bad.append([views[0].key, views[0].kind])
            bad_log.add(batch["bad"])
            if not len(batch["images"]):
                continue
            tokens.append(self.encode(batch, batch_size, device).to(dtype).cpu())
            names = batch["keys"][:: self.num_views]
            keys += names
            if "labels" in batch:
                labels.append(batch["labels"][:: self.num_views])
        count = len(keys)
        shape = (0, len(self.view_names), self.layout.length)
        tensors = {
            "tokens": torch.cat(tokens) if tokens else torch.zeros(shape, dtype=dtype),
            "keys": encode_keys(keys),
        }
        if labels:
            tensors["labels"] = torch.cat(labels)
            if len(tensors["labels"]) != count:
                raise ValueError(
                    f"{len(tensors['labels'])} of {count} pictures of {self.file(number)} have a class label: "
                    "give all of them one, or none"
                )
        # One entry: the order of several is not fixed, and equal files should have equal checksums.
        metadata = {"vistok": json.dumps({"fingerprint": self.fingerprint, "bad": bad})}
        atomic_write(folder / self.file(number), lambda path: save_file(tensors, path, metadata))
        return count

    def is_written(self, number: int, folder: Path) -> bool:
        """Whether a file is there.

        Raises:
            ValueError: If it is one of another export.
        """
        path = folder / self.file(number)
        if not path.exists():
            return False
        if read_metadata(path).get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{path} has tokens of another tokenizer, other views or other pictures (the data may have changed "
                "since): choose another out=, or delete it to begin anew"
            )
        return True


def export(
    work: Export, folder: Path, batch_size: int, rank: int = 0, world_size: int = 1, bundle: Path | None = None
) -> Manifest | None:
    """Write the tokens of a data set, or what is missing of them.

    Args:
        work: What is exported.
        folder: Where the files go; the processes of an export share it.
        batch_size: Views that are encoded at once.
        rank: Number of this process.
        world_size: Number of processes.
        bundle: Where the tokenizer came from.

    Returns:
        The manifest, or None if other processes are still at work.

    Raises:
        ValueError: If the folder holds other tokens, or the pictures cannot be exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(rank, work.num_files, world_size)
    waiting = [number for number in mine if not work.is_written(number, folder)]
    if len(waiting) < len(mine):
        log.info("%d of %d files are written already", len(mine) - len(waiting), len(mine))
    started, pictures = time.perf_counter(), 0
    with torch.inference_mode():
        for done, number in enumerate(waiting, 1):
            pictures += work.write(number, folder, batch_size)
            seconds = time.perf_counter() - started
            log.info(
                "%s: %d of %d files, %.1f pictures/s, %.0f s to go",
                work.file(number),
                done,
                len(waiting),
                pictures / seconds,
                seconds / done * (len(waiting) - done),
            )
    if not all(work.is_written(number, folder) for number in range(work.num_files)):
        log.info("this process is done; the last one to finish writes the manifest")
        return None
    return finish(work, folder, bundle)


def finish(work: Export, folder: Path, bundle: Path | None) -> Manifest:
    """Write the manifest of files that are complete, after decoding a sample of them."""
    shards, num_bad, largest, labelled = [], 0, -1, set()
    for number in range(work.num_files):
        path = folder / work.file(number)
        tensors = read_shard(path)
        num_bad += len(read_metadata(path)["bad"])
        count = len(tensors["tokens"])
        if count:
            labelled.add("labels" in tensors)
            largest = max(largest, int(tensors["labels"].max()) if "labels" in tensors else -1)
        shards.append({"file": path.name, "num_pictures": count, "sha256": sha256(path)})
    if not labelled:
        raise ValueError(f"none of the {num_bad} pictures could be read, so there is nothing to export")
    if len(labelled) > 1:
        raise ValueError("some files have class labels and some have none: give all pictures a label, or none")
    manifest = Manifest(
        layout=work.layout,
        dtype=str(smallest_dtype(work.tokenizer.vocab_size)).removeprefix("torch."),
        views=list(work.view_names),
        num_pictures=sum(shard["num_pictures"] for shard in shards),
        num_bad=num_bad,
        labels=labelled == {True},
        num_classes=largest + 1,
        shards=shards,
        tokenizer={
            "bundle": str(bundle.resolve()) if bundle else None,
            "sha256": work.identity.get("weights"),
            "config": config_of(work.tokenizer),
        },
        data=work.identity.get("data", {}),
        check=check_sample(work, folder),
    )
    manifest.write(folder)
    return manifest


@torch.inference_mode()
def check_sample(work: Export, folder: Path) -> dict[str, float]:
    """Decode the first stored tokens and compare them with their pictures, which are loaded again.

    Writes ``sample.png``: a row of pictures and one of what their tokens decode to.

    Returns:
        ``num_images``, their mean ``psnr`` in dB, and ``equal_tokens``, the share that encoding again gives (batches of
        another size may round a few tokens to another code).
    """
    number = next(n for n in range(work.num_files) if len(read_shard(folder / work.file(n))["tokens"]))
    batch = next(batch for batch in work.batches(number, NUM_CHECKED, num_workers=0) if len(batch["images"]))
    device = next(work.tokenizer.parameters()).device
    images = work.views_of(batch, device)[:NUM_CHECKED]
    # By name, since several loading processes of a tar file give its pictures in another order.
    tensors = read_shard(folder / work.file(number))
    places = {key: place for place, key in enumerate(keys_of(tensors["keys"]))}
    rows = [places[key] for key in keys_of(encode_keys(batch["keys"][:: work.num_views]))]
    stored = tensors["tokens"][rows].flatten(0, 1)[: len(images)].long().to(device)
    again = work.encode(batch, NUM_CHECKED, device).flatten(0, 1)[: len(images)]
    size = work.size
    decoded = work.tokenizer.decode_indices(work.tokenizer.unflatten(stored, size), size)
    check: dict[str, float] = {
        "num_images": len(images),
        "equal_tokens": (stored == again).float().mean().item(),
    }
    if work.tokenizer.output == "images":
        check["psnr"] = psnr(decoded, images).mean().item()
        both = to_uint8(torch.cat([images, decoded])).cpu()[:, :3]
        picture = F.to_pil_image(make_grid(both, nrow=len(images), padding=2, pad_value=255))
        atomic_write(folder / "sample.png", lambda path: picture.save(path, format="PNG"))
    return check


def check_counts(config: Any, *names: str) -> None:
    """Raise a ValueError if a setting is not an integer of at least 1."""
    for name in names:
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def export_from_config(config: Any) -> Manifest | None:
    """Export as ``configs/export_tokens.yaml`` says; several processes under ``torchrun`` share the work.

    Raises:
        ValueError: If the config asks for something impossible.
    """
    layouts = [config.layouts] if isinstance(config.layouts, str) else list(config.layouts or [])
    for layout in layouts:
        check_layout(layout)
    check_counts(config, "batch_size", "num_views", "shard_size", *(["size"] if config.size is not None else []))
    scale = config.ten_crop_scale
    if not isinstance(scale, int | float) or scale < 1:
        raise ValueError(f"ten_crop_scale must be a number of at least 1, got {scale!r}")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if config.device == "auto" and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    bundle = find_bundle(config.bundle)
    tokenizer = load(bundle, device=device)
    settings: Any = OmegaConf.to_container(config.data, resolve=True)
    side = tokenizer.default_size[-1] if config.size is None and tokenizer.default_size else config.size
    if side is None:
        raise ValueError("the tokenizer does not say its training size: set size=256, in pixels")
    # Ten crops are cut from a picture that is a little larger, rounded down as LlamaGen and RAR do.
    enlarged = int(side * config.ten_crop_scale) if config.views == "ten_crop" else side
    settings |= {"image_size": side, "eval_size": enlarged, "channels": tokenizer.channels}
    data: DataModule = instantiate(settings, _convert_="all")
    refuse_native(data)
    identity = {
        "weights": sha256(bundle / WEIGHTS_FILE),
        "data": {key: value for key, value in settings.items() if key not in INDIFFERENT},
    }
    work = Export(tokenizer, data, config.views, config.num_views, config.shard_size, identity)
    folder = Path(config.out).expanduser()
    manifest = export(work, folder, config.batch_size, rank, world_size, bundle)
    if manifest is not None:
        dataset = TokenDataset(folder)
        written = [str(write_layout(dataset, layout)) for layout in layouts]
        log.info(
            "%d pictures x %d views of %d tokens (%s) in %s; %d could not be read; the sample decodes to %.2f dB%s",
            manifest.num_pictures,
            len(manifest.views),
            manifest.layout.length,
            manifest.dtype,
            folder,
            manifest.num_bad,
            manifest.check.get("psnr", float("nan")),
            "".join(f"; also {path}" for path in written),
        )
    return manifest
