"""Local shards: tar files of the webdataset form (key.jpg beside key.txt or key.json), read in any order.

Each shard is scanned once and never unpacked. An index file stores the offsets of its members; it is valid as long as
the size and the modification time of the shard stay the same.
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ...common.atomic import replace_file
from ...inference.images import has_alpha, open_grey, open_opacity, open_picture, picture_size
from .companions import COMPANION_NAMES
from .left_out import MASKS, LeftOut
from .masks import ALPHA, check_shape
from .members import Example, examples_of, is_companion_key, split_name
from .sidecars import caption_names, read_captions, read_table
from .source import RECORD_FIELDS, ImageSource, image_record, read_at
from .tars import FilePart, read_members

# Offset and size in bytes of the image, the caption and the mask, and whether the caption is in a .json file.
MASK_FIELDS = ["mask", "mask_size"]
SHARD_FIELDS = [
    *RECORD_FIELDS, ("picture", "i8"), ("picture_size", "i8"), ("caption", "i8"), ("caption_size", "i8"), ("json", "?"),
    *((name, "i8") for name in MASK_FIELDS),
]  # fmt: skip
REST = "the rest"  # in place of the keys that a damaged shard lost
NONE = (0, -1)  # in place of the offset and size of a missing member

Place = tuple[int, int]  # offset and size in bytes
Members = dict[str, Place]  # of one key, by suffix
Record = tuple[float, ...]


class ShardIndex(NamedTuple):
    """The examples of one shard."""

    records: np.ndarray  # [N] rows of the source's `fields`
    keys: list[str]
    bad: dict[str, str]  # key → reason
    left_out: LeftOut


class ShardSource(ImageSource):
    """The examples of tar files, in the order of the files and of their members."""

    index_version = 7  # of the index files; every class, and every change of `fields`, takes a new one
    fields: list[Any] = SHARD_FIELDS

    def __init__(self, paths: Sequence[Path], cache: Path, use_masks: bool = False):
        """`paths` are at least one tar file, `cache` is the folder of the index files.

        `use_masks`: True if the loss is weighted by the masks in them.
        """
        self.paths, self.names, self.bad, self.left_out = list(paths), [], {}, LeftOut()
        self.bad_shards: dict[str, str] = {}  # shards without a readable image: path → reason
        indexes = [self._open_index(path, cache) for path in paths]
        same_folder = len({path.parent for path in paths}) == 1
        for path, index in zip(paths, indexes, strict=True):
            name = path.name if same_folder else str(path)
            if not index.keys:
                self.bad_shards[str(path)] = index.bad.pop(REST, f"{path} contains no readable image")
            self.bad |= {f"{name}:{key}": reason for key, reason in index.bad.items()}
            self.names += [f"{name}:{key}" for key in index.keys]
            self.left_out.take(index.left_out, f"{name}:")
            masked = (index.records["mask_size"] >= 0) & (index.records["line"] == 0)
            for number in np.flatnonzero(masked).tolist() if not use_masks else ():
                self.left_out.add(MASKS, f"{name}:{index.keys[number]}.mask")
        self.records = np.concatenate([index.records for index in indexes])
        self._shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.keys) for index in indexes])

    def image(self, index: int) -> Image.Image:
        return open_picture(BytesIO(self._read(index, "picture")), self.names[index])

    def caption(self, index: int) -> str:
        record, name = self.records[index], self.names[index]
        raw = self._read(index, "caption") if record["caption_size"] >= 0 else None
        captions = read_captions(None, read_table(raw, name), name) if record["json"] else read_captions(raw, {}, name)
        return captions[record["line"]]

    def mask(self, index: int, kind: str) -> Image.Image | None:
        record, name = self.records[index], self.names[index]
        if kind == ALPHA:
            return open_opacity(BytesIO(self._read(index, "picture")), name)
        if record["mask_size"] < 0:
            return None
        mask = open_grey(BytesIO(self._read(index, "mask")), f"the mask of {name}")
        check_shape(mask.size, (int(record["width"]), int(record["height"])), name)
        return mask

    def has_mask(self, index: int, kind: str) -> bool:
        if kind == ALPHA:
            return has_alpha(BytesIO(self._read(index, "picture")), self.names[index])
        return bool(self.records["mask_size"][index] >= 0)

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
                return ShardIndex(
                    saved["entries"], saved["names"].tolist(), bad, LeftOut.from_json(str(saved["left_out"]))
                )
        index = self._scan(path)
        names, failed, why = (np.array(list(texts), np.str_) for texts in (index.keys, index.bad, index.bad.values()))
        np.savez(
            content := BytesIO(), stamp=stamp, entries=index.records, names=names, bad=failed, reasons=why,
            left_out=np.array(index.left_out.to_json()),
        )  # fmt: skip
        replace_file(file, lambda draft: draft.write_bytes(content.getbuffer()))
        return index

    def _scan(self, path: Path) -> ShardIndex:
        records: list[Record] = []
        keys: list[str] = []
        left_out = LeftOut()
        with path.open("rb") as file:
            groups, bad = _list_members(file, path, left_out)
            stems = {key.rpartition("/")[2] for key in groups if not COMPANION_NAMES.in_folder(key)}
            for key in [key for key in groups if key not in bad]:
                for name, example in self._examples(key, groups, stems, left_out):
                    try:
                        own = list(self._records(file, example, f"{path.name}:{name}"))
                    except ValueError as error:
                        bad[name] = str(error)
                        continue
                    records += own
                    keys += caption_names(name, len(own))
        return ShardIndex(np.array(records, dtype=self.fields), keys, bad, left_out)

    def _examples(
        self, key: str, groups: dict[str, Members], stems: set[str], left_out: LeftOut
    ) -> Iterator[tuple[str, Any]]:
        """Yields the examples among the members of a key, with their names."""
        if is_companion_key(key, groups[key], groups, stems):
            left_out.add(MASKS, f"{key}.{next(iter(groups[key]))}")
        else:
            yield from examples_of(key, groups[key], left_out)

    def _records(self, file: BinaryIO, example: Any, name: str) -> Iterator[Record]:
        """Yields the records of an example, one for each caption."""
        assert isinstance(example, Example)
        pixels = picture_size(BufferedReader(FilePart(file, *example.image)), name)
        table = read_table(None if example.table is None else read_at(file, *example.table), name)
        try:
            count = len(read_captions(None if example.text is None else read_at(file, *example.text), table, name))
        except ValueError:  # reported when the caption is needed
            count = 1
        caption = example.text or example.table or NONE
        for line in range(count):
            record = image_record(pixels, table, name, line)
            in_table = example.text is None and example.table is not None
            yield (*record, *example.image, *caption, in_table, *(example.mask or NONE))


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar file without time and owner, so that equal contents give equal tar files."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def _list_members(file: BinaryIO, path: Path, left_out: LeftOut) -> tuple[dict[str, Members], dict[str, str]]:
    """Returns the members of each key, and the reason for each key that is cut short.

    Keys of further archives in the same file are numbered if the first one has them too.
    """
    groups: dict[str, Members] = {}
    bad, size = {}, path.stat().st_size
    first: dict[str, int] = {}  # archive by key
    try:
        for archive, member in read_members(file, left_out):
            key, suffix = split_name(member.name)
            if first.setdefault(key, archive) != archive:
                key = f"{key} (archive {archive + 1})"
            if member.offset_data + member.size <= size:
                if suffix in groups.setdefault(key, {}):
                    left_out.add("members that a later one of their name replaces", member.name)
                groups[key][suffix] = member.offset_data, member.size
            else:
                bad[key] = f"{path.name}:{key} is cut short: its shard ends within it"
    except (tarfile.TarError, OSError) as error:  # the members before the damage are intact
        bad[REST] = f"{path} is cut short, or not an uncompressed tar file ({error})"
    return groups, bad
