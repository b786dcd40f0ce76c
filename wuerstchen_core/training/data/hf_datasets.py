"""Hugging Face datasets: folders of `save_to_disk`, Parquet files and, where a source asks for it, the Hub.

`datasets` memory-maps their tables. Only headers and samples of the images are read until an image is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ...common.files import check_file
from ...common.text import listed, one_line
from ...common.versions import OLDEST_FOR_HUB, check_versions
from ...inference.images import has_alpha, open_opacity, open_picture
from .folder import FOLDER_FIELDS, example_records, find_files, is_image
from .hf_columns import Column, caption_column, columns_of, image_column
from .left_out import LeftOut
from .metadata import METADATA
from .sidecars import caption_names, read_captions
from .source import SCORE_KEYS, ImageSource
from .sources import SourceConfig
from .tars import FilePart

log = logging.getLogger(__name__)

HUB = "datasets:"  # before the name of a dataset on the Hub
DATASET_KEYS = ("split", "subset", "image_column", "caption_column")
SPLITS = ("train", "validation", "test")


class DatasetSource(ImageSource):
    """The rows of a dataset, in their order."""

    def __init__(self, names: Sequence[str], options: SourceConfig, captions: bool = True):
        """`names` as in `is_dataset`. ValueError if it cannot be read, or a column is missing or ambiguous.

        `captions`: False if a dataset without captions is fine.
        """
        self._dataset = _load(names, options)
        columns = dict(columns_of(self._dataset.features))
        where = listed(list(names), 1)
        self._image = image_column(columns, options.image_column, where)
        self._caption = caption_column(columns, options.caption_column, where, captions)
        self._scores = {column[-1]: column for column in columns if column[-1].lower() in SCORE_KEYS}
        caption = "none" if self._caption is None else ".".join(self._caption)
        log.info("%s: images of column %s, captions of column %s", where, ".".join(self._image), caption)
        self.names, self.bad, self.left_out = [], {}, LeftOut()
        rows: list[int] = []
        records: list[tuple[float, ...]] = []
        for row in range(len(self._dataset)):
            try:
                own = self._records(row)
            except ValueError as error:
                self.bad[_name(row)] = str(error)
                continue
            records += own
            rows += [row] * len(own)
            self.names += caption_names(_name(row), len(own))
        self.records = np.array(records, dtype=FOLDER_FIELDS)
        self._rows = np.array(rows, dtype=np.int64)

    def image(self, index: int) -> Image.Image:
        row = int(self._rows[index])
        with self._file(row) as file:
            return open_picture(file, _name(row))

    def caption(self, index: int) -> str:
        return self._captions(int(self._rows[index]))[self.records["line"][index]]

    def mask(self, index: int, kind: str) -> Image.Image | None:
        row = int(self._rows[index])
        with self._file(row) as file:
            return open_opacity(file, _name(row))

    def has_mask(self, index: int, kind: str) -> bool:
        row = int(self._rows[index])
        with self._file(row) as file:
            return has_alpha(file, _name(row))

    def _records(self, row: int) -> list[tuple[float, ...]]:
        """Returns the records of a row, one for each caption."""
        name = _name(row)
        try:
            captions = self._captions(row)
        except ValueError:  # reported when the caption is needed
            captions = [""]
        table = {key: self._value(row, column).as_py() for key, column in self._scores.items()}
        with self._file(row) as file:
            return example_records(file, name, table, captions)

    def _captions(self, row: int) -> list[str]:
        text = None if self._caption is None else self._value(row, self._caption).as_py()
        return read_captions(None, {"caption": text}, _name(row))

    def _file(self, row: int) -> BinaryIO:
        """Returns the file of an image, without reading it. ValueError if the row has none."""
        import pyarrow

        value, path = self._value(row, self._image), None
        if value.is_valid and pyarrow.types.is_struct(value.type):
            path = value["path"].as_py() if "path" in value else None
            value = value["bytes"]
        if value.is_valid:
            buffer = value.as_buffer()
            return BufferedReader(FilePart(pyarrow.BufferReader(buffer), 0, buffer.size))
        try:
            if path:
                check_file(path)
                return Path(path).open("rb")
        except OSError as error:
            raise ValueError(f"{_name(row)}: {path} cannot be read: {error.strerror}") from error
        raise ValueError(f"{_name(row)} has no image")

    def _value(self, row: int, column: Column) -> Any:
        """Returns a value of the table, without reading its bytes."""
        value = self._dataset.data.column(column[0])[row]
        for name in column[1:]:
            if not value.is_valid:
                break
            value = value[name]
        return value


def check_no_dataset(options: SourceConfig) -> None:
    """Raises ValueError if a source that is no dataset has keys for datasets."""
    if given := [key for key in DATASET_KEYS if getattr(options, key) is not None]:
        name = listed(options.names, 1)
        raise ValueError(f"[data] {given[0]} applies to datasets and Parquet files, and {name} is neither: remove it")


def is_dataset(names: Sequence[str]) -> bool:
    """True if a source is a dataset: of the Hub, a folder that `save_to_disk` wrote, or Parquet files.

    ValueError if other sources are named too.
    """
    found = [name.startswith(HUB) or _is_saved(Path(name)) for name in names]
    if any(found) and len(names) > 1:
        raise ValueError(f"[data] source names several datasets: give {names[0]} a table [[data.sources]] of its own")
    parquet = [bool(_parquet_files(Path(name))) for name in names]
    if any(parquet) and not all(parquet):
        raise ValueError("[data] source names Parquet files and others: give each kind a table [[data.sources]]")
    return any(found) or all(parquet)


def _is_saved(path: Path) -> bool:
    single = all((path / name).is_file() for name in ("dataset_info.json", "state.json"))
    return single or (path / "dataset_dict.json").is_file()


def _parquet_files(path: Path) -> list[Path]:
    """Returns a Parquet file, or those in a folder and in its folder `data`; none if it has images or shards."""
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".parquet" else []
    files = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    files = sorted(file for file in files if file.name.lower() not in METADATA)
    if files and any(is_image(file) or file.suffix.lower() == ".tar" for file in find_files(path, LeftOut())):
        return []
    return files


def _load(names: Sequence[str], options: SourceConfig) -> Any:
    """Returns the `datasets.Dataset` of a source. Only that of a Hub name uses the network."""
    name = names[0]
    try:
        import datasets
    except ImportError:
        raise ValueError(f"[data] source {name} needs the package datasets: install it") from None
    if options.subset and not name.startswith(HUB):
        raise ValueError(f"subset = {options.subset!r} is for datasets of the Hub, and {name} is none: remove it")
    try:
        if name.startswith(HUB):
            check_versions(OLDEST_FOR_HUB)
            path, _, revision = name.removeprefix(HUB).partition("@")
            loaded = datasets.load_dataset(path, options.subset, split=options.split, revision=revision or None)
            if options.split:
                return loaded
        elif _is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:  # not by `load_dataset`, which counts its uses on the Hub
            files = [file for each in names for file in _parquet_files(Path(each))]
            return datasets.Dataset.from_parquet([str(file) for file in _files_of_split(files, options.split)])
    except (ValueError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        reason = one_line(cause.args[0] if isinstance(cause, ValueError) and cause.args else type(error).__name__)
        raise ValueError(f"[data] source {name} cannot be opened as a dataset: {reason}") from error
    return _choose_split(loaded, options.split, name)


def _choose_split(loaded: Any, split: str | None, name: str) -> Any:
    """Returns a split of what was loaded: one dataset, or several by split."""
    if not isinstance(loaded, Mapping):
        if split and str(loaded.split) != split:
            raise ValueError(f"{name} has no split {split}: it is {loaded.split or 'one without a name'}; remove split")
        return loaded
    chosen = split or (SPLITS[0] if SPLITS[0] in loaded or len(loaded) > 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise ValueError(f"{name} has no split {chosen}: set split to one of {', '.join(loaded)}")
    return loaded[chosen]


def _files_of_split(files: Sequence[Path], split: str | None) -> list[Path]:
    """Returns the Parquet files of a split, by their names: by default of train, or all if they are of one split."""
    own = {name: [file for file in files if file.stem.split("-")[0] == name] for name in (*SPLITS, split or "")}
    if split:
        if not own[split]:
            raise ValueError(f"no Parquet file is named {split}.parquet or {split}-*.parquet: correct or remove split")
        return own[split]
    if own[SPLITS[0]]:  # the default of other datasets too
        return own[SPLITS[0]]
    if len(several := [name for name in SPLITS if own[name]]) > 1:
        raise ValueError(f"the Parquet files are of several splits: set split to one of {', '.join(several)}")
    return list(files)


def _name(row: int) -> str:
    return f"row {row}"
