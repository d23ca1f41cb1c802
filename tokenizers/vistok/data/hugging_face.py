"""Data sets of the Hugging Face library ``datasets``."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vistok.data.bad_samples import BadSample
from vistok.data.collate import Sample
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
        ValueError: If the split or a column is not there, or a column is of another kind.
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
    """The same, read as it is downloaded; the arguments are those of `HuggingFaceSet`, but a stream has no slices.

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
        self._limit = limit
        if limit is not None:
            self.rows = self.rows.take(limit)
            self.num_rows = min(limit, self.num_rows or limit)

    def __iter__(self) -> Iterator[Picture | BadSample]:
        for index, row in enumerate(self.rows):
            try:
                yield _picture(str(index), row, *self._columns)
            except BadImageError as error:
                yield BadSample(str(index), error.kind, error.reason)

    @property
    def shards(self) -> list[Shard]:
        """Numbers of the files that can be read each on its own."""
        # The first rows of a set are not the first of each of its files.
        return [str(number) for number in range(self.rows.num_shards if self._limit is None else 1)]

    def read(self, shard: str) -> Iterator[RawSample]:
        """Samples of one shard, in the form of webdataset; one that cannot be read has its reason as ``__bad__``."""
        rows = self.rows if self._limit is not None else self.rows.shard(self.rows.num_shards, int(shard))
        # By batches of one row, since `datasets` divides what is read row by row among loading processes itself.
        for index, columns in enumerate(rows.iter(batch_size=1)):
            key = f"{shard}/{index}"
            try:
                picture = _picture(key, {name: values[0] for name, values in columns.items()}, *self._columns)
            except BadImageError as error:
                yield {"__key__": key, "__bad__": BadSample(key, error.kind, error.reason)}
                continue
            label = {} if picture.label is None else {"cls": picture.label}
            text = {} if picture.text is None else {"txt": picture.text.encode()}
            yield {"__key__": key, IMAGE_KEYS[0]: picture.image} | label | text


class HuggingFaceShards(ShardDataset):
    """Whole batches from a stream, like those from tar files.

    Args:
        stream: Where the pictures come from.
        *arguments: Of `ShardDataset`; its shards are those of the stream.
        num_samples: Samples per epoch over all ranks; nothing counts them here.
        **options: Of `ShardDataset`.
    """

    def __init__(self, *arguments: Any, stream: HuggingFaceStream, num_samples: int, **options: Any) -> None:
        super().__init__(*arguments, num_samples=num_samples, **options)
        self.stream = stream

    def _samples_of(self, shard: Shard, report: Callable[[BadSample], None]) -> Iterator[RawSample]:
        try:
            yield from self.stream.read(str(shard))
        # The network or a damaged file, for which the libraries below raise nearly anything: OSError, ArrowInvalid,
        # HTTPError, DatasetGenerationError ...
        except Exception as error:
            report(BadSample(f"{self.stream.name}, shard {shard}", "bad shard", f"{type(error).__name__}: {error}"))

    def _decode(self, epoch: int, raw: RawSample) -> Sample | BadSample:
        return raw["__bad__"] if "__bad__" in raw else super()._decode(epoch, raw)


Columns = tuple[str, str | None, str | None]


def _open(
    name: str, split: str, config_name: str | None, columns: Columns, streaming: bool
) -> tuple[Any, tuple[str, ...], int]:
    """Rows, names of the labels, and the number of rows, 0 where a stream does not say."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the library datasets: pip install datasets") from error
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            rows: Any = _split_of(folder, datasets.load_from_disk(str(folder)), split, streaming)
            num_rows = len(rows)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            place = str(folder) if folder.is_dir() else name
            rows = datasets.load_dataset(place, config_name, split=split, streaming=streaming)
            told = (rows.info.splits or {}).get(split) if streaming else None
            num_rows = len(rows) if not streaming else told.num_examples or 0 if told is not None else 0
    except OSError as error:
        raise FileNotFoundError(
            f"the Hugging Face set {name}, split {split!r}, is not here and cannot be downloaded "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    _check_columns(datasets, name, rows.features, columns)
    image_key, label_key, _ = columns
    if isinstance(rows.features[image_key], datasets.Image):
        rows = rows.cast_column(image_key, datasets.Image(decode=False))
    classes = getattr(rows.features[label_key], "names", None) if label_key is not None else None
    return rows, tuple(classes or ()), num_rows


def _split_of(folder: Path, saved: Any, split: str, streaming: bool) -> Any:
    """One split of what ``save_to_disk`` wrote, slices such as ``train[:10%]`` included."""
    name, bracket, _ = split.partition("[")
    if bracket and streaming:
        raise ValueError(f"a stream has no slices, got the split {split!r}: read {folder} without streaming")
    if not isinstance(saved, Mapping):
        saved = {str(saved.split or "train").partition("[")[0]: saved}
    if name not in saved:
        raise ValueError(f"{folder} has no split {name!r}; there are {', '.join(saved)}")
    return saved[name] if not bracket else _slice(saved[name], split)


def _slice(rows: Any, split: str) -> Any:
    from datasets import ReadInstruction  # pyright: ignore[reportMissingImports]

    parts = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(rows)})
    return rows.select([row for part in parts for row in range(part.from_, part.to)])


def _check_columns(datasets: Any, name: str, features: Mapping[str, Any] | None, columns: Columns) -> None:
    image_key, label_key, _ = columns
    if features is None:
        raise ValueError(f"{name} does not say which columns it has while it is streamed: read it by data=hf_dataset")
    if missing := [column for column in columns if column is not None and column not in features]:
        raise ValueError(
            f"{name} has no column {missing[0]!r}; there are {', '.join(features)}: set image_key, label_key and "
            "text_key to these"
        )
    image = features[image_key]
    if not isinstance(image, datasets.Image) and getattr(image, "dtype", None) not in ("binary", "large_binary"):
        raise ValueError(f"column {image_key!r} of {name} holds {image}, not pictures: set image_key to another column")
    if label_key is not None and not str(getattr(features[label_key], "dtype", "")).startswith(("int", "uint")):
        raise ValueError(
            f"column {label_key!r} of {name} holds {features[label_key]}, and labels are integers: set label_key to "
            "another column, or text_key to this one"
        )


def _picture(key: str, row: Mapping[str, Any], image_key: str, label_key: str | None, text_key: str | None) -> Picture:
    image = row[image_key]
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if image is None:
        raise BadImageError("empty", f"row {key} has no picture in {image_key!r}")
    if isinstance(image, str):
        image = _fetch(image) if "://" in image else Path(image)
    label = None if label_key is None or row[label_key] is None else int(row[label_key])
    return Picture(key, image, label, None if text_key is None or row[text_key] is None else str(row[text_key]))


def _fetch(url: str) -> bytes:
    """The bytes of a picture that a stream names by its address only, as sets of single files do."""
    import fsspec  # comes with datasets

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # each file system has its own errors
        raise BadImageError("unreadable", f"{url}: {type(error).__name__}: {error}") from error
