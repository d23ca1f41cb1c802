"""Where ``vistok shards`` reads from."""

from pathlib import Path

from vistok.data.hugging_face import HuggingFaceSet, HuggingFaceStream
from vistok.data.image_folder import ImageFolder, find_classes, find_images, read_file_list
from vistok.data.pictures import PictureSource, PictureStream
from vistok.data.torchvision_set import TorchvisionSet
from vistok.data.video import VideoFolder, find_videos, read_video_list


def open_source(
    source: str,
    file_list: Path | None = None,
    split: str = "train",
    root: Path = Path("data"),
    image_key: str = "image",
    label_key: str | None = None,
    text_key: str | None = None,
    streaming: bool = False,
    videos: bool = False,
) -> PictureSource | PictureStream:
    """Open what a user calls a source.

    Args:
        source: A folder, ``torchvision:NAME``, or ``hf:NAME``.
        file_list: Of a folder: text file of paths below it.
        split: Of a torchvision or Hugging Face set.
        root: Where torchvision keeps its sets.
        image_key: Column of pictures of a Hugging Face set.
        label_key: Column of labels of a Hugging Face set.
        text_key: Column of captions of a Hugging Face set.
        streaming: Whether to read a Hugging Face set without storing it.
        videos: Whether to look for videos instead of pictures, in a folder.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If a setting would have no effect.
    """
    kind, _, name = source.partition(":")
    if kind != "hf" and (streaming or label_key or text_key or image_key != "image"):
        raise ValueError(f"columns and streaming are settings of a Hugging Face set such as hf:{source}")
    if kind in ("hf", "torchvision") and file_list is not None:
        raise ValueError(f"a file list belongs to a folder, not to {source}")
    if kind in ("hf", "torchvision") and videos:
        raise ValueError(f"videos are read from a folder, not from {source}")
    if kind != "torchvision" and root != Path("data"):
        raise ValueError(f"root={root} is where torchvision keeps its sets, and has no effect on {source}")
    if kind not in ("hf", "torchvision") and split != "train":
        raise ValueError(f"split={split} has no effect on a folder: give the folder of that split")
    if kind == "torchvision":
        return TorchvisionSet(name, root.expanduser(), split)
    if kind == "hf":
        make = HuggingFaceStream if streaming else HuggingFaceSet
        return make(name, split, None, image_key, label_key, text_key)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {kind}: give a folder, torchvision:NAME or hf:NAME")
    find, read, make = (
        (find_videos, read_video_list, VideoFolder) if videos else (find_images, read_file_list, ImageFolder)
    )
    paths = find(folder) if file_list is None else read(folder, file_list.expanduser())
    return make(folder, paths, find_classes(paths))
