"""Local shards: tar files of the webdataset form (key.jpg beside key.txt or key.json), read in any order.

Each shard is scanned once and never unpacked. An index file stores the offsets of its members; it is valid as long as
the size and the modification time of the shard stay the same.
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ...common.atomic import replace_file
from ...inference.images import open_picture, picture_size
from .sidecars import read_caption, read_table
from .source import IMAGE_SUFFIXES, RECORD_FIELDS, ImageSource, image_record, read_at

# Offset and size in bytes of the image and of the caption, and whether the caption is in a .json file.
SHARD_FIELDS = [
    *RECORD_FIELDS, ("picture", "i8"), ("picture_size", "i8"), ("caption", "i8"), ("caption_size", "i8"), ("json", "?")
]  # fmt: skip
HEADER = 65536  # bytes, enough for the headers of nearly all images
REST = "the rest"  # in place of the keys that a damaged shard lost
NONE = (0, -1)  # in place of the offset and size of a missing member

Members = dict[str, tuple[int, int]]  # of one example: file suffix → offset and size in bytes


class ShardIndex(NamedTuple):
    """The examples of one shard."""

    records: np.ndarray  # [N] rows of the source's `fields`
    keys: list[str]
    bad: dict[str, str]  # key → reason


class ShardSource(ImageSource):
    """The examples of tar files, in the order of the files and of their members."""

    index_version = 1  # of the index files; every class, and every change of `fields`, takes a new one
    fields: list[Any] = SHARD_FIELDS

    def __init__(self, paths: Sequence[Path], cache: Path):
        """`paths` are at least one tar file, `cache` is the folder of the index files."""
        self.paths, self.names, self.bad = list(paths), [], {}
        self.bad_shards: dict[str, str] = {}  # shards without a readable image: path → reason
        indexes = [self._open_index(path, cache) for path in paths]
        same_folder = len({path.parent for path in paths}) == 1
        for path, index in zip(paths, indexes, strict=True):
            name = path.name if same_folder else str(path)
            if not index.keys:
                self.bad_shards[str(path)] = index.bad.pop(REST, f"{path} contains no readable image")
            self.bad |= {f"{name}:{key}": reason for key, reason in index.bad.items()}
            self.names += [f"{name}:{key}" for key in index.keys]
        self.records = np.concatenate([index.records for index in indexes])
        self._shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.keys) for index in indexes])

    def image(self, index: int) -> Image.Image:
        return open_picture(BytesIO(self._read(index, "picture")), self.names[index])

    def caption(self, index: int) -> str:
        record, name = self.records[index], self.names[index]
        raw = self._read(index, "caption") if record["caption_size"] >= 0 else None
        return read_caption(None, read_table(raw, name), name) if record["json"] else read_caption(raw, {}, name)

    def _read(self, index: int, field: str) -> bytes:
        record = self.records[index]
        if record[f"{field}_size"] < 0:
            raise ValueError(f"{self.names[index]} has no {field}")
        try:
            with self.paths[self._shards[index]].open("rb") as file:
                return read_at(file, record[field], record[f"{field}_size"])
        except OSError as error:
            raise ValueError(f"{self.names[index]} cannot be read: {error.strerror}") from error

    def _open_index(self, path: Path, cache: Path) -> ShardIndex:
        """Loads the index of a shard, or scans the shard and saves its index."""
        stat = path.stat()
        stamp = np.array([self.index_version, stat.st_size, stat.st_mtime_ns])
        digest = hashlib.sha256(str(path.resolve()).encode(errors="surrogatepass")).hexdigest()
        file = cache / f"{path.stem}-{digest[:16]}.npz"
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(file) as saved:
            if np.array_equal(saved["stamp"], stamp):
                bad = dict(zip(saved["bad"].tolist(), saved["reasons"].tolist(), strict=True))
                return ShardIndex(saved["entries"], saved["names"].tolist(), bad)
        index = self._scan(path)
        names, failed, why = (np.array(list(texts), np.str_) for texts in (index.keys, index.bad, index.bad.values()))
        np.savez(content := BytesIO(), stamp=stamp, entries=index.records, names=names, bad=failed, reasons=why)
        replace_file(file, lambda draft: draft.write_bytes(content.getbuffer()))
        return index

    def _scan(self, path: Path) -> ShardIndex:
        records, keys = [], []
        with path.open("rb") as file:
            examples, bad = _list_members(file, path)
            for key in [key for key in examples if key not in bad]:
                try:
                    if (record := self._record(file, examples[key], f"{path.name}:{key}")) is not None:
                        records.append(record)
                        keys.append(key)
                except ValueError as error:
                    bad[key] = str(error)
        return ShardIndex(np.array(records, dtype=self.fields), keys, bad)

    @staticmethod
    def _record(file: BinaryIO, members: Members, name: str) -> tuple[float, ...] | None:
        """Returns the record of an example, None if it has no image."""
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if suffix is None:
            return None
        offset, size = members[suffix]
        try:
            pixels = picture_size(BytesIO(read_at(file, offset, min(size, HEADER))), name)
        except ValueError:  # a longer header, or WebP, which Pillow only opens whole
            pixels = picture_size(BytesIO(read_at(file, offset, size)), name)
        table = read_table(read_at(file, *members["json"]) if "json" in members else None, name)
        caption = "txt" if "txt" in members else "json"
        return (*image_record(pixels, table, name), offset, size, *members.get(caption, NONE), caption == "json")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar file without time and owner, so that equal contents give equal tar files."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def _list_members(file: BinaryIO, path: Path) -> tuple[dict[str, Members], dict[str, str]]:
    """Returns the members of each example by key, and the reason for each key that is cut short.

    As in webdataset, the key ends at the first dot of the file's name.
    """
    examples: dict[str, Members] = {}
    bad, size = {}, path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not (key := f"{folder}/{stem}" if folder else stem):
                    continue
                if member.offset_data + member.size <= size:
                    examples.setdefault(key, {})[suffix.lower()] = member.offset_data, member.size
                else:
                    bad[key] = f"{path.name}:{key} is cut short: its shard ends within it"
            if read_at(file, tar.offset, tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                bad[REST] = f"{path} is cut short or damaged: the end mark of a tar file is missing"
    except (tarfile.TarError, OSError) as error:  # the members before the damage are intact
        bad[REST] = f"{path} is cut short, or not an uncompressed tar file ({error})"
    return examples, bad
