"""Data sets of the Hugging Face library ``datasets``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.decode import BadImageError
from vistok.data.pictures import Picture, PictureSource, PictureStream


class HuggingFaceSet(PictureSource):
    """One split of a data set of the Hugging Face hub, or of a folder of parquet files or of ``save_to_disk``.

    Args:
        name: ``owner/name`` on the hub, or a folder.
        split: Name of the split, slices such as ``train[:10%]`` included.
        config_name: Which of several configurations of the set; None: its default.
        image_key: Column of pictures.
        label_key: Column of integer labels; None: no labels.
        text_key: Column of captions; None: no captions.

    Raises:
        ImportError: If ``datasets`` is not installed.
        FileNotFoundError: If the set is not there and cannot be downloaded.
        ValueError: If a column is not there.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        config_name: str | None = None,
        image_key: str = "image",
        label_key: str | None = None,
        text_key: str | None = None,
    ) -> None:
        self.name = f"{name}, {split}"
        self._rows, self._columns, self.classes = _open(name, split, config_name, image_key, label_key, text_key, False)
        self.fingerprint = str(self._rows._fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Picture:
        return _picture(index, self._rows[index], *self._columns)


class HuggingFaceStream(PictureStream):
    """The same, read as it is downloaded; the arguments are those of `HuggingFaceSet`."""

    def __init__(
        self,
        name: str,
        split: str = "train",
        config_name: str | None = None,
        image_key: str = "image",
        label_key: str | None = None,
        text_key: str | None = None,
    ) -> None:
        self.name = f"{name}, {split}"
        self.rows, self._columns, self.classes = _open(name, split, config_name, image_key, label_key, text_key, True)
        self.fingerprint = f"{name}, {config_name}, {split}, streaming"

    def __iter__(self) -> Iterator[Picture]:
        for index, row in enumerate(self.rows):
            yield _picture(index, row, *self._columns)


Columns = tuple[str, str | None, str | None]


def _open(
    name: str,
    split: str,
    config_name: str | None,
    image_key: str,
    label_key: str | None,
    text_key: str | None,
    streaming: bool,
) -> tuple[Any, Columns, tuple[str, ...]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the library datasets: pip install 'vistok[hf]'") from error
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            rows: Any = datasets.load_from_disk(str(folder))
            rows = rows[split] if isinstance(rows, Mapping) else rows
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (OSError, KeyError) as error:
        raise FileNotFoundError(
            f"the Hugging Face set {name}, split {split!r}, is not here and cannot be downloaded "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    columns = image_key, label_key, text_key
    features = rows.features or {}
    if missing := [column for column in columns if column is not None and column not in features]:
        raise ValueError(f"{name} has no column {missing[0]!r}; there are {', '.join(features)}")
    if isinstance(features[image_key], datasets.Image):
        rows = rows.cast_column(image_key, datasets.Image(decode=False))
    classes = getattr(features[label_key], "names", ()) if label_key is not None else ()
    return rows, columns, tuple(classes)


def _picture(
    index: int, row: Mapping[str, Any], image_key: str, label_key: str | None, text_key: str | None
) -> Picture:
    image = row[image_key]
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else Path(image["path"])
    if not isinstance(image, bytes | Path | Image.Image):
        raise BadImageError("not an image", f"row {index} holds {type(image).__name__} in {image_key!r}")
    label = None if label_key is None else int(row[label_key])
    return Picture(str(index), image, label, None if text_key is None else str(row[text_key]))
