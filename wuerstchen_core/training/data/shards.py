"""Local shards: tar files of the webdataset form (key.jpg beside key.txt or key.json), read in any order.

Each is walked through once; where its members lie is kept in an index file, which holds as long as the shard has the
same size and time of change. Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image

from ...inference.images import open_picture, picture_size
from .sidecars import caption_from_table, caption_from_text, no_caption, scores_from_table, table_from_json
from .source import ENTRY, SUFFIXES, Source, entry

# Where an example lies in its shard: the first byte and the size of its picture, and of its caption (none: size -1).
MEMBER = [*ENTRY, ("picture", "i8"), ("picture_size", "i8"), ("caption", "i8"), ("caption_size", "i8"), ("json", "?")]
HEADER = 65536  # bytes that nearly every picture's header fits into
REST = "the rest"  # the key of what a damaged shard lost

Group = dict[str, tuple[int, int]]


class Index(NamedTuple):
    """What is known of one shard."""

    entries: np.ndarray  # rows of MEMBER
    names: list[str]  # keys
    bad: dict[str, str]  # what can't be read, by key: why


class Form(NamedTuple):
    """What an index holds of examples."""

    number: int  # of its meaning, which no other has or had
    fields: list[Any]
    row: Callable[[BinaryIO, Group, str], tuple[float, ...] | None]  # of an example by its name; None: it is none


def _row(file: BinaryIO, group: Group, name: str) -> tuple[float, ...] | None:
    """The row of MEMBER of a picture."""
    kind = next((kind for kind in SUFFIXES if kind in group), None)
    if kind is None:
        return None
    scores: Mapping[str, float] = {}
    if "json" in group:
        scores = scores_from_table(table_from_json(_read(file, *group["json"]), f"the .json of {name}"), name)
    caption = "txt" if "txt" in group else "json"
    place = group.get(caption, (0, -1))
    return (*entry(_picture_size(file, group[kind], name), scores), *group[kind], *place, caption == "json")


class LocalShards(Source):
    """The examples of tar files, shard by shard, in the order in which they stand there."""

    form = Form(1, MEMBER, _row)

    def __init__(self, paths: Sequence[Path], cache: Path):
        self.paths, self.bad = list(paths), {}
        self.bad_shards: dict[str, str] = {}  # which hold no picture that can be read, by path: why
        self.names: list[str] = []
        parts, owners = [np.empty(0, self.form.fields)], [np.empty(0, np.int32)]
        together = len({path.parent for path in paths}) == 1
        for number, path in enumerate(paths):
            index, name = shard_index(path, cache, self.form), path.name if together else str(path)
            if not len(index.entries):
                self.bad_shards[str(path)] = index.bad.pop(REST, f"{path} holds no picture that can be read")
            self.bad |= {f"{name}:{key}": reason for key, reason in index.bad.items()}
            self.names += [f"{name}:{key}" for key in index.names]
            parts.append(index.entries)
            owners.append(np.full(len(index.entries), number, np.int32))
        self.entries, self._owners = np.concatenate(parts), np.concatenate(owners)

    def name(self, index: int) -> str:
        return self.names[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(BytesIO(self._content(index, "picture")), self.names[index])

    def caption(self, index: int) -> str:
        name, member = self.names[index], self.entries[index]
        if member["caption_size"] < 0:
            raise no_caption(name)
        raw = self._content(index, "caption")
        if member["json"]:
            return caption_from_table(table_from_json(raw, f"the .json of {name}"), name)
        return caption_from_text(raw, name)

    def _content(self, index: int, what: str) -> bytes:
        member, path = self.entries[index], self.paths[self._owners[index]]
        try:
            with path.open("rb") as file:
                file.seek(member[what])
                return file.read(member[f"{what}_size"])
        except OSError as error:
            raise ValueError(f"{self.names[index]} cannot be read: {error.strerror}") from error


def shard_index(path: Path, cache: Path, form: Form) -> Index:
    """The index of a shard, out of the folder `cache` if it is still right, else made and put there."""
    stat = path.stat()
    stamp = np.array([form.number, stat.st_size, stat.st_mtime_ns])
    place = hashlib.sha256(str(path.resolve()).encode(errors="surrogatepass"))
    kept = cache / f"{path.stem}-{place.hexdigest()[:16]}.npz"
    if (index := _load(kept, stamp)) is not None:
        return index
    index = _walk(path, form)
    _save(kept, stamp, index)
    return index


def split_name(name: str) -> tuple[str, str]:
    """The key and the kind of a member: what stands before and behind the first dot of the file's own name."""
    folder, _, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return f"{folder}/{key}" if folder else key, kind.lower()


def _walk(path: Path, form: Form) -> Index:
    """Read the headers of all members, and what else a row needs."""
    rows, names = [], []
    with path.open("rb") as file:
        groups, bad = _members(file, path)
        for key, group in groups.items():
            if key in bad:
                continue
            try:
                row = form.row(file, group, f"{path.name}:{key}")
            except ValueError as error:
                bad[key] = str(error)
                continue
            if row is not None:
                rows.append(row)
                names.append(key)
    return Index(np.array(rows, dtype=form.fields), names, bad)


def _members(file: BinaryIO, path: Path) -> tuple[dict[str, Group], dict[str, str]]:
    """What belongs to each key: the first byte and the size of each kind; and what is cut short, with the reason."""
    groups: dict[str, Group] = {}
    bad, size = {}, path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, kind = split_name(member.name)
                if member.isreg() and key and member.offset_data + member.size <= size:
                    groups.setdefault(key, {})[kind] = member.offset_data, member.size
                elif member.isreg() and key:
                    bad[key] = f"{path.name}:{key} is cut short: its shard ends within it"
            if _read(file, tar.offset, tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                bad[REST] = f"{path} is cut short or damaged: it does not end as a tar file does"
    except (tarfile.TarError, OSError) as error:  # what stands before the damage is whole
        bad[REST] = f"{path} is cut short, or no tar file that is not compressed ({error})"
    return groups, bad


def _picture_size(file: BinaryIO, place: tuple[int, int], name: str) -> tuple[int, int]:
    try:
        return picture_size(BytesIO(_read(file, place[0], min(place[1], HEADER))), name)
    except ValueError:  # what has a longer header, or is only opened whole, as WebP
        return picture_size(BytesIO(_read(file, *place)), name)


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _load(path: Path, stamp: np.ndarray) -> Index | None:
    """An index file; None if there is none, or not of this stamp."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], stamp):
                return None
            bad = dict(zip(file["bad"].tolist(), file["reasons"].tolist(), strict=True))
            return Index(file["entries"], file["names"].tolist(), bad)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # nothing is lost: the shard is walked through again


def _save(path: Path, stamp: np.ndarray, index: Index) -> None:
    """Write an index file, whole or not at all, beside others who may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}.part")
    names, bad, reasons = (np.array(list(texts), np.str_) for texts in (index.names, index.bad, index.bad.values()))
    try:
        with draft.open("wb") as file:
            np.savez(file, stamp=stamp, entries=index.entries, names=names, bad=bad, reasons=reasons)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
