"""A folder of pictures, each with its caption beside it or in a metadata.jsonl."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ...inference.images import open_picture, picture_size
from .sidecars import caption_from_table, caption_from_text, scores_from_table, table_from_json
from .source import ENTRY, SUFFIXES, Source, content, entry

METADATA = "metadata.jsonl"  # of Hugging Face's imagefolder: a table a line, with `file_name` beside the file itself
MARKED = [*ENTRY, ("mark", "u8")]  # which another picture or caption would hardly have
SAMPLE = 4096  # bytes that a mark takes of a file at a time: a page, as it is read anyway


class Folder(Source):
    """Every picture below some folders, sorted by name within each; hidden files and folders are left out.

    A caption stands in a metadata.jsonl that names the picture, else beside it in .txt, else in .json; scores in
    metadata.jsonl or .json. Of the pictures only the headers and a sample are read until one is asked for.
    """

    def __init__(self, roots: Sequence[Path]):
        self.paths: list[Path] = []
        self.names: list[str] = []
        self.bad = {}
        self._beside: list[tuple[Path | None, Path | None]] = []  # the .txt and the .json of each picture
        self._rows: dict[Path, dict[str, Any]] = {}  # of metadata.jsonl
        entries = []
        for root in roots:
            files = set(_files(root))
            names = {path: (path.relative_to(root) if len(roots) == 1 else path).as_posix() for path in sorted(files)}
            for path, name in names.items():
                if path.name == METADATA:
                    self._read_rows(path, name)
            for path, name in names.items():
                if _is_picture(path):
                    ours = files if path not in self._rows else ()
                    text, table = (path.with_suffix(kind) for kind in (".txt", ".json"))
                    beside = text if text in ours else None, table if table in ours else None
                    try:
                        entries.append(self._row(path, *beside, name))
                    except ValueError as error:
                        self.bad[name] = str(error)
                        continue
                    self.paths.append(path)
                    self.names.append(name)
                    self._beside.append(beside)
        self.entries = np.array(entries, dtype=MARKED)

    def name(self, index: int) -> str:
        return self.names[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.paths[index], self.names[index])

    def caption(self, index: int) -> str:
        name, (text, table) = self.names[index], self._beside[index]
        if text is not None:
            return caption_from_text(content(text), name)
        return caption_from_table(self._table(self.paths[index], table, name), name)

    def _row(self, path: Path, text: Path | None, beside: Path | None, name: str) -> tuple[float, ...]:
        """The row of MARKED of a picture. ValueError if it can't be read."""
        table = self._table(path, beside, name)
        try:
            caption = caption_from_table(table, name) if text is None else caption_from_text(content(text), name)
        except ValueError:  # who asks for it is told
            caption = ""
        try:
            with path.open("rb") as file:
                mark = _mark(file, caption)
                return (*entry(picture_size(file, name), scores_from_table(table, name)), mark)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error

    def _table(self, path: Path, beside: Path | None, name: str) -> Mapping[str, Any]:
        """What JSON says of a picture: its line of a metadata.jsonl, else the file beside it, else nothing."""
        if path in self._rows:
            return self._rows[path]
        return {} if beside is None else table_from_json(content(beside), f"the .json of {name}")

    def _read_rows(self, path: Path, place: str) -> None:
        for name, line in _lines(path, place):
            try:
                row = table_from_json(line, name)
                if not isinstance(row.get("file_name"), str):
                    raise ValueError(f"{name} names no picture: it needs a file_name")
                if not (picture := path.parent / row["file_name"]).is_file():
                    raise ValueError(f"{name} names {row['file_name']}, which is not there")
            except ValueError as error:
                self.bad[name] = str(error)
                continue
            self._rows[picture] = row


def holds_pictures(root: Path) -> bool:
    """Whether any lies below a folder."""
    return any(map(_is_picture, _files(root)))


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if not _hidden(path.relative_to(root)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in SUFFIXES and path.is_file()


def _mark(file: BinaryIO, caption: str) -> int:
    """A number that tells a picture and its caption from others of their names, wherever the file lies."""
    size = file.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(f"{size} {caption}".encode(), digest_size=8)
    for place in (size // 2, max(0, size - SAMPLE)):  # the end alone may be a plain border, as in BMP
        file.seek(place)
        digest.update(file.read(SAMPLE))
    return int.from_bytes(digest.digest(), "little")


def _lines(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not empty, each with the name of its place."""
    for number, line in enumerate(content(path).splitlines(), 1):
        if line.strip():
            yield f"{name}:{number}", line
