"""The real photographs that come inside installed packages: data that is there without a download."""

import importlib.util
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from vistok.data.collate import Sample
from vistok.data.decode import decode_image
from vistok.data.transforms import check_filter, random_crop, random_flip, resize, sample_generator

SKIMAGE = ("skimage", "scikit-image", "data")
SKLEARN = ("sklearn", "scikit-learn", "datasets/images")
MATPLOTLIB = ("matplotlib", "matplotlib", "mpl-data/sample_data")
TRAIN = {
    "hubble_deep_field.jpg": SKIMAGE,
    "ihc.png": SKIMAGE,
    "motorcycle_left.png": SKIMAGE,
    "motorcycle_right.png": SKIMAGE,
    "retina.jpg": SKIMAGE,
    "rocket.jpg": SKIMAGE,
    "china.jpg": SKLEARN,
    "flower.jpg": SKLEARN,
    "grace_hopper.jpg": MATPLOTLIB,
}
GRAY = dict.fromkeys(("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png"), SKIMAGE)
HELD_OUT = dict.fromkeys(("astronaut.png", "chelsea.png", "coffee.png"), SKIMAGE)


def photo_path(name: str) -> Path:
    """Where an installed package keeps the photograph; the package is found, not imported (that takes seconds).

    Raises:
        FileNotFoundError: If the package is not installed or came without the file.
    """
    module, distribution, folder = (TRAIN | GRAY | HELD_OUT)[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the photograph {name} comes with {distribution}, which is not installed: pip install {distribution}"
        )
    path = Path(spec.submodule_search_locations[0], folder, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{distribution} is installed without {name}, expected at {path}: reinstall it "
            "or train on your own pictures with data=image_folder data.root=FOLDER"
        )
    return path


class Photos(Dataset):
    """Random crops of the training photographs, or all tiles of the held-out ones.

    The split is by picture (both views of the motorcycle are in training), so no held-out pixel is ever trained on. So
    few photographs do not show all colours: the flower is in training because no other one is green, and a tokenizer
    that has never seen a colour cannot be expected to have codes for it.

    | file                     | pixels    | shows                | source, licence                                    |
    |--------------------------|-----------|----------------------|----------------------------------------------------|
    | hubble_deep_field.jpg    | 1000x872  | galaxies             | NASA, public domain                                |
    | ihc.png                  | 512x512   | stained tissue       | CMMI Gosselies, no known restrictions              |
    | motorcycle_left.png      | 741x500   | motorcycle, stereo   | Middlebury stereo 2014, terms of that benchmark    |
    | motorcycle_right.png     | 741x500   | the other view       | the same                                           |
    | retina.jpg               | 1411x1411 | back of an eye       | Wikimedia Commons, CC0                             |
    | rocket.jpg               | 640x427   | rocket launch        | SpaceX, public domain                              |
    | china.jpg                | 640x427   | temple               | danielbuechele (Flickr), CC BY 2.0                 |
    | flower.jpg               | 640x427   | flower               | vultilion (Flickr), CC BY 2.0                      |
    | grace_hopper.jpg         | 512x600   | portrait             | US Navy, public domain                             |
    | brick, grass, gravel.png | 512x512   | gray textures        | CC0Textures, CC0                                   |
    | camera.png               | 512x512   | gray, photographer   | L. Varshney, CC0                                   |
    | coins.png                | 384x303   | gray, Greek coins    | Brooklyn Museum, no known restrictions             |
    | moon.png                 | 512x512   | gray, lunar surface  | see scikit-image                                   |
    | held out: astronaut.png  | 512x512   | portrait             | NASA, public domain                                |
    | held out: chelsea.png    | 451x300   | cat                  | S. van der Walt, CC0                               |
    | held out: coffee.png     | 600x400   | cup of coffee        | R. Michetti, CC0                                   |

    Items are asked for by ``(epoch, index)``. A training item is a crop of a photograph chosen in proportion to its
    area, at its own resolution or, with `min_scale` below 1, randomly reduced (antialiased); a photograph smaller than
    the crop is enlarged. A held-out item is one tile, in raster order, photographs in alphabetical order.

    Args:
        split: ``"train"`` or ``"held-out"``.
        size: Side of the crops or tiles in pixels.
        samples_per_epoch: Crops per epoch; without effect on held-out tiles.
        min_scale: Smallest random reduction of a crop, in (0, 1].
        flip: Whether to mirror half of the crops.
        include_gray: Whether to train on the six gray photographs too.
        channels: 1, 3 or 4.
        seed: Seed of the crops.
        resize_filter: Filter of the reduction.

    Raises:
        FileNotFoundError: If a package or its file is missing.
        ValueError: If `min_scale` is not in (0, 1] or no held-out photograph has room for a tile.
    """

    def __init__(
        self,
        split: Literal["train", "held-out"],
        size: int,
        samples_per_epoch: int = 10_000,
        min_scale: float = 1.0,
        flip: bool = True,
        include_gray: bool = False,
        channels: int = 3,
        seed: int = 0,
        resize_filter: str = "bicubic",
    ) -> None:
        if not 0 < min_scale <= 1:
            raise ValueError(f"min_scale must lie in (0, 1], got {min_scale}")
        self.split = split
        self.size = size
        self.samples_per_epoch = samples_per_epoch
        self.min_scale = min_scale
        self.flip = flip
        self.seed = seed
        self.resize_filter = check_filter(resize_filter)
        names = HELD_OUT if split == "held-out" else TRAIN | GRAY if include_gray else TRAIN
        self.names = sorted(names)
        self.photos = [decode_image(photo_path(name), channels).contiguous() for name in self.names]
        self._areas = list(accumulate(photo[0].numel() for photo in self.photos))
        self._tiles = [
            (number, top, left) for number, photo in enumerate(self.photos) for top, left in tile_corners(photo, size)
        ]
        if split == "held-out" and not self._tiles:
            largest = max(min(photo.shape[1:]) for photo in self.photos)
            raise ValueError(
                f"eval_size={size}, but the largest square in the held-out photographs has {largest} "
                f"pixels: set data.eval_size to at most {largest}"
            )

    def __len__(self) -> int:
        return len(self._tiles) if self.split == "held-out" else self.samples_per_epoch

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        if self.split == "train":
            return self._crop(epoch, index)
        number, top, left = self._tiles[index]
        tile = self.photos[number][:, top : top + self.size, left : left + self.size]
        return {"image": tile, "key": f"{self.names[number]}@{left},{top}"}

    def _crop(self, epoch: int, index: int) -> Sample:
        generator = sample_generator(self.seed, epoch, index)
        pixel = int(torch.randint(self._areas[-1], (), generator=generator))
        number = bisect_right(self._areas, pixel)
        photo = self.photos[number]
        scale = self.min_scale + (1 - self.min_scale) * torch.rand((), generator=generator).item()
        side = min(round(self.size / scale), *photo.shape[1:])
        image = resize(random_crop(photo, side, generator), self.size, self.size, self.resize_filter)
        if self.flip:
            image = random_flip(image, generator)
        return {"image": image, "key": f"{self.names[number]}#{index}"}


def tile_corners(photo: UInt8[Tensor, "c h w"], size: int) -> list[tuple[int, int]]:
    """Top and left of all non-overlapping `size` x `size` tiles in raster order; the rest is cut on both sides."""
    height, width = photo.shape[1:]
    tops = range(height % size // 2, height - size + 1, size)
    lefts = range(width % size // 2, width - size + 1, size)
    return [(top, left) for top in tops for left in lefts]
