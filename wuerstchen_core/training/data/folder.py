"""Folders of images, whose captions are in files of the same name or in a metadata.jsonl."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...inference.images import open_picture, picture_size
from .sidecars import parse_json_table, read_caption, read_table
from .source import IMAGE_SUFFIXES, RECORD_FIELDS, ImageSource, image_record, read_at, read_bytes

METADATA = "metadata.jsonl"  # as in Hugging Face's imagefolder: each line is a table, with `file_name` relative to it
# The digest is of the file's size, its caption and two samples, so that a run's fingerprint depends on the contents.
FOLDER_FIELDS = [*RECORD_FIELDS, ("digest", "u8")]
SAMPLE = 4096  # bytes in each of a digest's two samples of the image file: one page


class FolderSource(ImageSource):
    """All images in and below some folders, sorted by path within each; hidden files and folders are skipped.

    Captions come from a metadata.jsonl that names the image, else from .txt, else from .json; scores from
    metadata.jsonl or .json. Only headers and samples of the image files are read until an image is needed.
    """

    def __init__(self, roots: Sequence[Path]):
        self.paths: list[Path] = []
        self.names, self.bad = [], {}
        self._rows: dict[Path, dict[str, Any]] = {}  # of the metadata.jsonl files, by image
        records = []
        for root in roots:
            paths = sorted(visible_files(root))
            names = {path: (path.relative_to(root) if len(roots) == 1 else path).as_posix() for path in paths}
            for path in paths:
                if path.name == METADATA:
                    self._read_metadata(path, names[path])
            for path in filter(is_image, paths):
                try:
                    records.append(self._record(path, names[path]))
                    self.paths.append(path)
                    self.names.append(names[path])
                except ValueError as error:
                    self.bad[names[path]] = str(error)
        self.records = np.array(records, dtype=FOLDER_FIELDS)

    def image(self, index: int) -> Image.Image:
        return open_picture(self.paths[index], self.names[index])

    def caption(self, index: int) -> str:
        path, name = self.paths[index], self.names[index]
        return read_caption(self._sidecar(path, ".txt"), self._table(path, name), name)

    def _record(self, path: Path, name: str) -> tuple[float, ...]:
        table = self._table(path, name)
        try:
            caption = read_caption(self._sidecar(path, ".txt"), table, name)
        except ValueError:  # reported when the caption is needed
            caption = ""
        try:
            with path.open("rb") as file:
                pixels, size = picture_size(file, name), file.seek(0, os.SEEK_END)
                # Two samples, since the end of a BMP can be a plain border.
                samples = [read_at(file, start, SAMPLE) for start in (size // 2, max(0, size - SAMPLE))]
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        digest = hashlib.blake2b(f"{size} {caption}".encode() + b"".join(samples), digest_size=8).digest()
        return (*image_record(pixels, table, name), int.from_bytes(digest, "little"))

    def _sidecar(self, image: Path, suffix: str) -> bytes | None:
        path = image.with_suffix(suffix)
        return read_bytes(path) if image not in self._rows and path.is_file() else None

    def _table(self, image: Path, name: str) -> Mapping[str, Any]:
        return self._rows.get(image) or read_table(self._sidecar(image, ".json"), name)

    def _read_metadata(self, path: Path, name: str) -> None:
        for number, line in enumerate(read_bytes(path).splitlines(), 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = parse_json_table(line, where)
                if not isinstance(row.get("file_name"), str):
                    raise ValueError(f"{where} has no file_name: add the name of its image")
                if not (image := path.parent / row["file_name"]).is_file():
                    raise ValueError(f"{where} names {row['file_name']}, which does not exist: correct the file_name")
                self._rows[image] = row
            except ValueError as error:
                self.bad[where] = str(error)


def visible_files(root: Path) -> Iterator[Path]:
    """Yields all that is in or below a folder, folders too, except hidden files and folders."""
    return (path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts))


def is_image(path: Path) -> bool:
    """True if a path is a file with the suffix of an image."""
    return path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file()
