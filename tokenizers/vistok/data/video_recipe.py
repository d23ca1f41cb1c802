"""What ``vistok shards --videos`` makes of a video."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vistok.data.convert import Conversion, Recipe
from vistok.data.decode import BadImageError, decode_image
from vistok.data.transforms import center_crop, check_resize, resize_by_mode
from vistok.data.video import frames_of, import_av, pictures_of, rates_of, upright

DEFAULT_CRF = 18


@dataclass(frozen=True)
class VideoRecipe(Conversion):
    """What becomes of each video; one whose frames cannot all be decoded is bad.

    Without a size a file is copied byte by byte, and so is a file that has the size already. Else it is encoded anew:
    H.264 in MP4, 4:2:0 chroma, a key frame every second so that clips are found fast, times of the frames as they
    were, without sound. A folder of numbered pictures becomes a ``zip`` of these without compression, each as `Recipe`
    makes it.

    Args:
        size: Short side in pixels, an even number; None: as it is. The long side is cut to an even number.
        resize_filter: One of `vistok.data.transforms.FILTERS`.
        resize_mode: One of `vistok.data.transforms.RESIZE_MODES`.
        crop: Whether to cut the centre square of `size` pixels.
        crf: Constant rate factor of x264, 0 (lossless but for the chroma) to 51, of videos that are encoded; None: 18.

    Raises:
        ValueError: If a value is impossible or a setting would have no effect.
    """

    size: int | None = None
    resize_filter: str = "bicubic"
    resize_mode: str = "short_side"
    crop: bool = False
    crf: int | None = None

    content = "videos"
    chunk = 1

    def __post_init__(self) -> None:
        check_resize(self.resize_mode, self.resize_filter)
        if self.size is not None and (self.size < 2 or self.size % 2):
            raise ValueError(f"the size of videos must be an even number of pixels, as H.264 needs it; got {self.size}")
        if self.size is None and self.crf is not None:
            raise ValueError("crf has no effect on copied files: choose a size")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ValueError(f"crf must lie between 0 (best) and 51, got {self.crf}")
        _ = self.of_pictures  # checks the rest

    @property
    def of_pictures(self) -> Recipe:
        """What becomes of numbered pictures."""
        return Recipe(self.size, self.resize_filter, self.resize_mode, self.crop)

    def apply(self, image: Path | bytes | Image.Image) -> tuple[str, bytes]:
        """Extension and bytes of the file to write.

        Raises:
            BadImageError: If a frame cannot be decoded, or the frames differ in size.
            OSError: If what was encoded has not as many frames as the video.
        """
        assert isinstance(image, Path)  # videos come from folders
        if image.is_dir():
            return "zip", self._archive(image)
        try:
            data = image.read_bytes()
        except OSError as error:
            raise BadImageError("unreadable", f"cannot open {image}: {error.strerror}") from error
        num_frames, sides = _look_at(data)
        cropped = self.crop and max(sides) != self.size
        if self.size is None or (min(sides) == self.size and not cropped):
            return image.suffix[1:].lower(), data
        data = self._encode(data)
        encoded, _ = _look_at(data)
        if encoded != num_frames:
            raise OSError(f"{image} has {num_frames} frames, of which {encoded} were encoded: convert without a size")
        return "mp4", data

    def _resized(self, pixels: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c h2 w2"]:
        """A frame of the size asked for; the sides are even."""
        assert self.size is not None
        pixels = resize_by_mode(pixels, self.size, self.resize_mode, self.resize_filter)
        if self.crop:
            return center_crop(pixels, self.size, self.resize_mode)
        height, width = (side // 2 * 2 for side in pixels.shape[1:])
        return pixels[:, :height, :width]

    def _encode(self, data: bytes) -> bytes:
        av = import_av()
        rate, time_base = rates_of(data)
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream: Any = None
            for time, frame in frames_of(data):
                pixels = self._resized(decode_image(upright(frame))).movedim(0, -1).numpy()
                if stream is None:
                    stream = container.add_stream("libx264", rate=rate)
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    crf = DEFAULT_CRF if self.crf is None else self.crf
                    stream.options = {"crf": str(crf), "g": str(max(1, round(rate)))}
                    stream.codec_context.time_base = time_base
                    # The bytes must not depend on the number of cores.
                    stream.codec_context.thread_count = 1
                small = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
                small.pts, small.time_base = round(time / time_base), time_base
                container.mux(stream.encode(small))
            container.mux(stream.encode())
        return file.getvalue()

    def _archive(self, folder: Path) -> bytes:
        file = io.BytesIO()
        sizes = set()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in pictures_of(folder):
                extension, data = self.of_pictures.apply(path)
                sizes.add(tuple(decode_image(data).shape))
                if len(sizes) > 1:
                    raise BadImageError("unreadable", "its frames differ in size")
                # Without its time, so that equal pictures make equal shards.
                archive.writestr(zipfile.ZipInfo(f"{path.stem}.{extension}"), data)
        return file.getvalue()


def _look_at(data: bytes) -> tuple[int, tuple[int, int]]:
    """Number of frames of a video file, all of which are decoded, and width and height of the first one.

    Raises:
        BadImageError: If one cannot be decoded, or there is none.
    """
    num_frames, sides = 0, (0, 0)
    for _, frame in frames_of(data):
        sides = sides if num_frames else upright(frame).size
        num_frames += 1
    if not num_frames:
        raise BadImageError("empty", "no frames")
    return num_frames, sides
