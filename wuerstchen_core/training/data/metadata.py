"""Reads tables that name the images of a folder, with captions and scores: metadata.jsonl, .csv and .parquet."""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ...common.memory import is_out_of_memory
from ...common.text import decode_text
from .sidecars import parse_json_table
from .source import SCORE_KEYS, read_bytes

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as in Hugging Face's imagefolder
NAME_KEYS = ("file_name", "image_file_name", "image")  # the first one present counts


def read_rows(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
    """Yields the rows of a table, or why one cannot be read, with their names in messages."""
    try:
        raw = read_bytes(path)
        kind = path.suffix.lower()
        if kind == ".jsonl":
            yield from _json_lines(raw, name)
        else:
            rows = _csv_rows(raw, name) if kind == ".csv" else _parquet_rows(raw, name)
            for number, row in enumerate(rows, 2 if kind == ".csv" else 1):
                yield f"{name}:{number}", row
    except ValueError as error:
        yield name, error


def image_name(row: Mapping[str, Any], where: str) -> str:
    """Returns the name of a row's image. ValueError if it has none."""
    values = {key.lower(): value for key, value in row.items()}
    name = next((values[key] for key in NAME_KEYS if values.get(key)), None)
    if not isinstance(name, str):
        raise ValueError(f"{where} has no file_name: add the name of its image")
    return name


def companion_names(row: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of a row's other images: masks and conditioning images."""
    for key, value in row.items():
        key = key.lower()
        other = key not in NAME_KEYS and (key.endswith("_file_name") or key in ("conditioning_image", "mask"))
        if other and isinstance(value, str):
            yield value


def mask_name(row: Mapping[str, Any]) -> str | None:
    """Returns the name of the mask of a row's image; None if it has none."""
    names = (value for key, value in row.items() if key.lower() in ("mask", "mask_file_name"))
    return next((name for name in names if isinstance(name, str)), None)


def hint_name(row: Mapping[str, Any]) -> str | None:
    """Returns the name of the hint picture of a row's image; None if it has none."""
    keys = ("conditioning_image", "conditioning_image_file_name", "control_file_name")
    names = (value for key, value in row.items() if key.lower() in keys)
    return next((name for name in names if isinstance(name, str)), None)


class ImagePlaces:
    """Finds images by the names in tables: with .. and links, with backslashes, as addresses, in any Unicode form."""

    def __init__(self, images: Iterable[Path]):
        self._images = {_normal(os.path.abspath(path)): path for path in images}
        self._real: dict[str, Path] | None = None

    def find(self, folder: Path, name: str) -> Path | None:
        """Returns the image that a table in `folder` calls `name`, which may be outside of the known ones."""
        address = unquote(urlsplit(name).path if name.startswith("file:") else name)
        for spelling in dict.fromkeys((name, name.replace("\\", "/"), address)):
            if found := self._images.get(_normal(os.path.abspath(folder / spelling))):
                return found
            if (folder / spelling).is_file():
                if self._real is None:
                    self._real = {os.path.realpath(image): image for image in self._images.values()}
                return self._real.get(os.path.realpath(folder / spelling), folder / spelling)
        return None


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _json_lines(raw: bytes, name: str) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raw = decode_text(raw, name).encode()
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            try:
                yield f"{name}:{number}", parse_json_table(line, f"{name}:{number}")
            except ValueError as error:
                yield f"{name}:{number}", error


def _csv_rows(raw: bytes, name: str) -> Iterator[Mapping[str, Any]]:
    text = decode_text(raw, name)
    header = text.partition("\n")[0]
    delimiter = "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        rows.fieldnames = [key.strip() for key in rows.fieldnames or ()]
        for row in rows:
            if None in row:
                raise ValueError(f"{name} has a row with more values than columns: put texts with commas in quotes")
            yield {key: _number(value) if key.lower() in SCORE_KEYS else value or None for key, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{name} is not valid CSV ({error}): correct it") from None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "nan")
    except ValueError:
        return None


def _parquet_rows(raw: bytes, name: str) -> Iterator[Mapping[str, Any]]:
    try:
        import pandas
    except ImportError:
        raise ValueError(f"{name} needs pandas and pyarrow: install them, or save it as metadata.jsonl") from None
    try:
        rows = pandas.read_parquet(io.BytesIO(raw)).to_dict("records")
    except ImportError:
        raise ValueError(f"{name} needs pyarrow: install it, or save it as metadata.jsonl") from None
    except Exception as error:  # of pyarrow, in many classes
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name} is not a readable parquet file ({type(error).__name__}): save it again") from error
    for row in rows:
        lists = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
        yield {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in lists.items()}
