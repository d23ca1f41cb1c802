"""Sets of pictures that can be asked for by number: what folders, torchvision and Hugging Face sets have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vistok.data.bad_samples import BadSample
from vistok.data.collate import LazySamples, Sample
from vistok.data.decode import BadImageError, decode_image
from vistok.data.transforms import sample_generator


class Picture(NamedTuple):
    """An undecoded picture.

    Attributes:
        key: What the set calls it: a path below the root, or a number.
        image: Its file, the bytes of its file, or what another library has decoded already.
        label: Number of its class, where it has one.
        text: Its caption, where it has one.
    """

    key: str
    image: Path | bytes | Image.Image
    label: int | None = None
    text: str | None = None


class Pictures(ABC):
    """Undecoded pictures; the converter reads them as they are.

    Attributes:
        name: For messages and protocols.
        classes: Names of the labels, in their order; empty where there are none.
        fingerprint: Changes with the pictures or their order: an interrupted conversion goes on only from the same.
    """

    name: str
    classes: Sequence[str] = ()
    fingerprint: str


class PictureSource(Pictures):
    """Pictures by number; a `PictureDataset` decodes and transforms them."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def __getitem__(self, index: int) -> Picture:
        """One picture.

        Raises:
            BadImageError: If it is not there.
        """


class PictureStream(Pictures):
    """Pictures in sequence only, the same in every pass."""

    @abstractmethod
    def __iter__(self) -> Iterator[Picture | BadSample]:
        """One pass over all pictures; a `BadSample` stands for one that is not there."""


class PictureDataset(Dataset):
    """Decoded and transformed pictures of a source; items are asked for by ``(epoch, index)``.

    A picture that cannot be read is replaced by the next readable one in training, and given back as a `BadSample` in
    evaluation, where a stand-in would falsify the numbers.

    Args:
        source: Where the pictures come from.
        transform: From a uint8 picture ``(c h w)`` and a generator to ``(c s s)``.
        train: Whether to replace unreadable pictures.
        channels: 1, 3 or 4.
        background: RGB in [0, 255] behind transparent pixels, unless `channels` is 4.
        seed: Seed of the transform.
        max_bad: How many unreadable pictures in a row are put up with.
        reduced_size: Decode large JPEG files at a reduced size whose short side is at least this, see `decode_image`.

    Raises:
        ValueError: If the first `max_bad` pictures are all unreadable.
    """

    content = "pictures"

    def __init__(
        self,
        source: PictureSource,
        transform: Callable[[Tensor, torch.Generator], Tensor],
        train: bool = True,
        channels: int = 3,
        background: Sequence[int] = (255, 255, 255),
        seed: int = 0,
        max_bad: int = 64,
        reduced_size: int | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.train = train
        self.channels = channels
        self.background = tuple(background)
        self.seed = seed
        self.max_bad = max_bad
        self.reduced_size = reduced_size
        self._first_readable(0, 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Sample | BadSample:
        epoch, index = item
        return self._first_readable(epoch, index) if self.train else self._read(epoch, index)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> LazySamples:
        """A batch of samples, under the name that a `DataLoader` asks for."""
        return LazySamples(self.__getitem__, items)

    def _read(self, epoch: int, index: int) -> Sample | BadSample:
        key = str(index)
        try:
            picture = self.source[index]
            key = picture.key
            image = self._load(picture, index, sample_generator(self.seed, epoch, key))
        except BadImageError as error:
            return BadSample(key, error.kind, error.reason)
        return {"image": image, "key": key, "label": picture.label, "text": picture.text}

    def _load(self, picture: Picture, index: int, generator: torch.Generator) -> Tensor:
        image = decode_image(picture.image, self.channels, self.background, self.reduced_size)
        return self.transform(image, generator)

    def _first_readable(self, epoch: int, index: int) -> Sample:
        bad = []
        for offset in range(min(self.max_bad, len(self))):
            sample = self._read(epoch, (index + offset) % len(self))
            if not isinstance(sample, BadSample):
                return sample | {"bad": bad}
            bad.append(sample)
        listed = "; ".join(f"{sample.key}: {sample.kind} ({sample.reason})" for sample in bad[:3])
        raise ValueError(f"{len(bad)} {self.content} in a row of {self.source.name} are unreadable, such as {listed}")
