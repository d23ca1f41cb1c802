"""Data sets of the Hugging Face library ``datasets``."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.bad_samples import BadSample
from vistok.data.decode import BadImageError
from vistok.data.pictures import Picture, PictureSource, PictureStream
from vistok.data.webdataset import IMAGE_KEYS, RawSample, Shard, ShardDataset


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
        self._columns = image_key, label_key, text_key
        self._rows, self.classes, _ = _open(name, split, config_name, self._columns, streaming=False)
        self.fingerprint = str(self._rows._fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Picture:
        return _picture(str(index), self._rows[index], *self._columns)


class HuggingFaceStream(PictureStream):
    """The same, read as it is downloaded; the arguments are those of `HuggingFaceSet`.

    Args:
        limit: Only so many rows from the beginning; None: all.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        config_name: str | None = None,
        image_key: str = "image",
        label_key: str | None = None,
        text_key: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = f"{name}, {split}"
        self._columns = image_key, label_key, text_key
        self.rows, self.classes, self.num_rows = _open(name, split, config_name, self._columns, streaming=True)
        self.fingerprint = f"{name}, {config_name}, {split}, streaming"
        if limit is not None:
            self.rows, self.num_rows = self.rows.take(limit), limit

    def __iter__(self) -> Iterator[Picture]:
        for index, row in enumerate(self.rows):
            yield _picture(str(index), row, *self._columns)

    @property
    def shards(self) -> list[Shard]:
        """Numbers of the files that can be read each on its own."""
        return [str(number) for number in range(self.rows.num_shards)]

    def read(self, shard: str) -> Iterator[RawSample]:
        """Samples of one shard, in the form of webdataset."""
        rows = self.rows.shard(self.rows.num_shards, int(shard))
        # By batches of one row, since `datasets` divides what is read row by row among loading processes itself.
        for index, columns in enumerate(rows.iter(batch_size=1)):
            sample: RawSample = {"__key__": f"{shard}/{index}"}
            try:
                row = {name: values[0] for name, values in columns.items()}
                picture = _picture(sample["__key__"], row, *self._columns)
            except BadImageError:
                yield sample
                continue
            label = {} if picture.label is None else {"cls": picture.label}
            text = {} if picture.text is None else {"txt": picture.text.encode()}
            yield sample | {IMAGE_KEYS[0]: picture.image} | label | text


class HuggingFaceShards(ShardDataset):
    """Whole batches from a stream, like those from tar files.

    Args:
        stream: Where the pictures come from.
        *arguments: Of `ShardDataset`; its shards are those of the stream.
        **options: Of `ShardDataset`.
    """

    def __init__(self, *arguments: Any, stream: HuggingFaceStream, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stream = stream

    def _samples_of(self, shard: Shard, report: Callable[[BadSample], None]) -> Iterator[RawSample]:
        try:
            yield from self.stream.read(str(shard))
        except OSError as error:  # the network, or a damaged file
            report(BadSample(f"{self.stream.name}, shard {shard}", "bad shard", f"{type(error).__name__}: {error}"))


Columns = tuple[str, str | None, str | None]


def _open(
    name: str, split: str, config_name: str | None, columns: Columns, streaming: bool
) -> tuple[Any, tuple[str, ...], int]:
    """Rows, names of the labels, and the number of rows, 0 where a stream does not say."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the library datasets: pip install 'vistok[hf]'") from error
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            rows: Any = datasets.load_from_disk(str(folder))
            rows = rows[split] if isinstance(rows, Mapping) else rows
            num_rows = len(rows)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
            told = (rows.info.splits or {}).get(split) if streaming else None
            num_rows = len(rows) if not streaming else told.num_examples if told is not None else 0
    except (OSError, KeyError) as error:
        raise FileNotFoundError(
            f"the Hugging Face set {name}, split {split!r}, is not here and cannot be downloaded "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    image_key, label_key, _ = columns
    features = rows.features or {}
    if missing := [column for column in columns if column is not None and column not in features]:
        raise ValueError(f"{name} has no column {missing[0]!r}; there are {', '.join(features)}")
    if isinstance(features[image_key], datasets.Image):
        rows = rows.cast_column(image_key, datasets.Image(decode=False))
    classes = getattr(features[label_key], "names", ()) if label_key is not None else ()
    return rows, tuple(classes), num_rows


def _picture(key: str, row: Mapping[str, Any], image_key: str, label_key: str | None, text_key: str | None) -> Picture:
    image = row[image_key]
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else Path(image["path"])
    if not isinstance(image, bytes | Path | Image.Image):
        raise BadImageError("not an image", f"row {key} holds {type(image).__name__} in {image_key!r}")
    label = None if label_key is None else int(row[label_key])
    return Picture(key, image, label, None if text_key is None else str(row[text_key]))
