"""Lightning data modules of videos."""

from pathlib import Path
from typing import Any, Literal

from vistok.data.module import DataModule, ImageFolderData, WebDatasetData, at_least
from vistok.data.video import Clip, VideoDataset, VideoFolder, VideoShards, find_videos, is_readable, read_video_list


class ClipData(DataModule):
    """What data modules of videos have in common: a batch has ``images`` ``(b c T s s)``.

    Attributes:
        clip: Which frames of a video make a sample.
        clip_text: Which clips evaluation looks at.
    """

    content = "videos"
    clip: Clip
    clip_text: str

    def size_of(self, side: int) -> tuple[int, ...]:
        """Size ``(T, H, W)`` of clips that are `side` pixels wide."""
        return self.clip.frames, side, side

    def _decoding(self, split: Literal["train", "eval"]) -> dict[str, Any]:
        return super()._decoding(split) | {"clip": self.clip}  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a new video is brought into the form of training."""
        return super().preprocessing | {"clip": {"rate": self.clip.rate, "stride": self.clip.stride}}

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at; ``num_images`` counts clips."""
        protocol: dict[str, Any] = super().protocol  # pyright: ignore[reportAbstractUsage]
        return protocol | {"clip": f"{self.clip.text}; {self.clip_text}"}


class VideoFolderData(ClipData, ImageFolderData):
    """A folder of video files and of folders of numbered pictures; labels are the first-level folders.

    Args:
        frames: Of a clip.
        rate: Frames per second of a clip, of video files only; None: every frame, or by `stride`.
        stride: Take every frame (1), every second one (2) and so on.
        clips: Training clips of each video in an epoch, each with a random start.
        eval_clips: Evaluation clips of each video, spread evenly over it; a single one lies in its middle.
        **options: Arguments of `ImageFolderData`; ``background`` and ``reduced_decode`` are for folders of pictures.
    """

    picture_dataset = VideoDataset

    def __init__(
        self,
        frames: int = 17,
        rate: float | None = None,
        stride: int = 1,
        clips: int = 1,
        eval_clips: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.clip = Clip(frames, rate, stride)
        self.clips = {"train": at_least(1, "clips", clips), "eval": at_least(1, "eval_clips", eval_clips)}
        self.clip_text = f"{eval_clips} of each video, " + ("in its middle" if eval_clips == 1 else "evenly spread")

    def _find(self, root: Path, exclude: Path | None = None) -> list[str]:
        return find_videos(root, exclude)

    def _read_list(self, root: Path, file_list: Path) -> list[str]:
        return read_video_list(root, file_list)

    def _is_readable(self, root: Path, path: str) -> bool:
        return is_readable(root, path, self.clip)

    def _source(self, split: Literal["train", "eval"], *contents: Any) -> VideoFolder:
        return VideoFolder(*contents, clips=self.clips[split])


class VideoShardData(ClipData, WebDatasetData):
    """Tar shards of videos (``mp4``, ``webm`` ..., ``zip`` of numbered pictures; label ``cls``, caption ``txt``).

    A video gives one clip.

    Args:
        frames: Of a clip.
        rate: Frames per second of a clip, of video files only; None: every frame, or by `stride`.
        stride: Take every frame (1), every second one (2) and so on.
        **options: Arguments of `WebDatasetData`; ``samples_per_epoch`` and ``shuffle_buffer`` count videos.
    """

    shard_dataset = VideoShards
    clip_text = "the middle of each video"

    def __init__(self, frames: int = 17, rate: float | None = None, stride: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.clip = Clip(frames, rate, stride)
        if self.reduced_decode:
            raise ValueError("data.reduced_decode=true has no effect on shards of videos: leave it out")
