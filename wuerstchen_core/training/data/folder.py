"""A folder of pictures, each with its caption beside it or in a metadata.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...pictures import open_picture, picture_size
from .sidecars import caption_from_table, caption_from_text, no_caption, scores_from_table, table_from_json
from .sources import ENTRY, SUFFIXES, Source, content, entry

METADATA = "metadata.jsonl"  # of Hugging Face's imagefolder: a table a line, with `file_name` beside the file itself


class Folder(Source):
    """Every picture below some folders, sorted by name within each; hidden files and folders are left out.

    A caption stands in a metadata.jsonl that names the picture, else beside it in .txt, else in .json; scores in
    metadata.jsonl or .json. Only the headers of the pictures are read until a picture is asked for.
    """

    def __init__(self, roots: Sequence[Path]):
        self.paths: list[Path] = []
        self.names: list[str] = []
        self.bad = {}
        self._beside: list[tuple[Path | None, Path | None]] = []  # the .txt and the .json of each picture
        self._rows: dict[Path, dict[str, Any]] = {}  # of metadata.jsonl
        entries = []
        for root in roots:
            files = {path for path in root.rglob("*") if not _hidden(path.relative_to(root))}
            names = {path: (path.relative_to(root) if len(roots) == 1 else path).as_posix() for path in sorted(files)}
            for path, name in names.items():
                if path.name == METADATA:
                    self._read_rows(path, name)
            for path, name in names.items():
                if path.suffix.lower().lstrip(".") in SUFFIXES and path.is_file():
                    text, table = (path.with_suffix(kind) for kind in (".txt", ".json"))
                    beside = text if text in files else None, table if table in files else None
                    try:
                        entries.append(entry(picture_size(path, name), self._scores(path, beside[1], name)))
                    except ValueError as error:
                        self.bad[name] = str(error)
                        continue
                    self.paths.append(path)
                    self.names.append(name)
                    self._beside.append(beside)
        self.entries = np.array(entries, dtype=ENTRY)

    def name(self, index: int) -> str:
        return self.names[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.paths[index], self.names[index])

    def caption(self, index: int) -> str:
        name, (text, table) = self.names[index], self._beside[index]
        row = self._rows.get(self.paths[index])
        if row is not None:
            return caption_from_table(row, name)
        if text is not None:
            return caption_from_text(content(text), name)
        if table is not None:
            return caption_from_table(table_from_json(content(table), f"the .json of {name}"), name)
        raise no_caption(name)

    def _scores(self, path: Path, beside: Path | None, name: str) -> Mapping[str, float]:
        row = self._rows.get(path)
        if row is None:
            row = {} if beside is None else table_from_json(content(beside), f"the .json of {name}")
        return scores_from_table(row)

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


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _lines(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not empty, each with the name of its place."""
    for number, line in enumerate(content(path).splitlines(), 1):
        if line.strip():
            yield f"{name}:{number}", line
