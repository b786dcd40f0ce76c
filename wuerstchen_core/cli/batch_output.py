"""Where the pictures of a bulk run go: a folder, or shards of the webdataset form. Both are sources for training.

Whatever stands there under its own name is whole; what a killed process leaves is a draft, which is written over when
its picture comes up again.
"""

from __future__ import annotations

import heapq
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.data.tars import add_member
from .save import png_text

if TYPE_CHECKING:
    from PIL import Image

Made = Mapping[str, Any]


class PictureFolder:
    """NAME.png beside NAME.json, which says how it was made, its prompt among it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def made(self, names: Iterable[str]) -> dict[str, Made]:
        """How those of the pictures were made that are there, by name; ValueError if one's file is somebody else's."""
        names, there = set(names), self._files()
        for name in sorted(names):
            half = {f"{name}.json", f"{name}.png"} & there
            if len(half) == 1 and not self._is_ours(*half):
                raise ValueError(
                    f"{self.folder} holds {min(half)}, which no run with --prompts left: "
                    "move it away, or give another --output"
                )
        return self._tables(self._whole(there) & names)

    def __str__(self) -> str:
        return str(self.folder)

    def add(self, name: str, image: Image.Image, made: Made) -> None:
        """Write a picture; the file that makes it count, its PNG, comes last."""
        from ..common.atomic import replace_file

        self.folder.mkdir(exist_ok=True)
        text = json.dumps(made, ensure_ascii=False)
        replace_file(self.folder / f"{name}.json", lambda part: part.write_text(text, encoding="utf-8"))
        info = png_text(dict(made))
        replace_file(self.folder / f"{name}.png", lambda part: image.save(part, "PNG", pnginfo=info))

    def close(self) -> None:
        """Nothing is left to do: every picture is in its place."""

    def _files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    @staticmethod
    def _whole(there: set[str]) -> set[str]:
        """The names of the pictures of which both files are there."""
        return {name[:-4] for name in there if name.endswith(".png") and f"{name[:-4]}.json" in there}

    def _tables(self, names: Iterable[str]) -> dict[str, Made]:
        """How pictures in the folder were made, by name."""
        return {name: _read((self.folder / f"{name}.json").read_bytes(), self.folder / name) for name in names}

    def _is_ours(self, half: str) -> bool:
        """Whether a file is what a killed process left of a picture: its table, which is written first."""
        return half.endswith(".json") and "weights" in _read((self.folder / half).read_bytes(), self.folder / half)


class Shard(PictureFolder):
    """A tar file; until all its pictures are painted they wait in a hidden folder beside it."""

    def __init__(self, path: Path):
        super().__init__(path.with_name(f".{path.stem}"))
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def made(self, names: Iterable[str]) -> dict[str, Made]:
        packed = {name[:-5]: _read(content, self.path / name) for name, content in self._packed(".json")}
        return {**packed, **self._tables(self._whole(self._files()).intersection(names))}

    def close(self) -> None:
        """Pack what waits, with what was packed before."""
        from ..common.atomic import replace_file

        if not self.folder.is_dir():
            return
        # What lacks a half is packed: a process was killed while it tidied up.
        if whole := sorted(self._whole(self._files())):
            replace_file(self.path, lambda part: self._pack(part, whole))
        shutil.rmtree(self.folder)

    def _pack(self, part: Path, names: list[str]) -> None:
        waiting = ((f"{name}.{kind}", self.folder / f"{name}.{kind}") for name in names for kind in ("json", "png"))
        files = ((name, path.read_bytes()) for name, path in waiting)
        merged = heapq.merge(self._packed(), files, key=lambda file: file[0].rpartition("."))  # both are sorted so
        with tarfile.open(part, "w") as tar:
            for name, same in groupby(merged, key=itemgetter(0)):
                add_member(tar, name, next(same)[1])

    def _packed(self, kind: str = "") -> Iterator[tuple[str, bytes]]:
        """The files in the shard, if it is there, whose names end so."""
        if not self.path.exists():
            return
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if member.name.endswith(kind) and (file := tar.extractfile(member)) is not None:
                        yield member.name, file.read()
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} is no shard that can be read ({error}): remove it") from error


def shard_path(folder: Path, number: int, lines: int) -> Path:
    """The file of a shard of so many lines of the prompts."""
    return folder / f"{number:06d}{_of(lines)}"


def check_form(folder: Path, lines: int | None) -> None:
    """Make the folder; ValueError if it holds other pictures than shards of so many lines (None: than single files)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one as --output for the pictures of --prompts")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".tar", ".png"))
    names += sorted(f"{path.name}.tar" for path in folder.glob(".*-by-*") if path.is_dir())  # begun, of a killed run
    if other := next((name for name in names if not name.endswith(_of(lines) if lines else ".png")), ""):
        raise ValueError(f"{folder} holds {other}, from a run with other --shards: give the same, or another folder")


def _of(lines: int) -> str:
    return f"-by-{lines}.tar"


def _read(raw: bytes, where: Path) -> Made:
    """A table that says how a picture was made."""
    try:
        table = json.loads(raw)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise ValueError(f"what {where} says of its picture is no JSON table: remove it, and it is painted again")
    return table
