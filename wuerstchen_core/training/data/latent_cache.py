"""Shards of a cache: what networks made of pictures (`train cache`), with or without these.

A folder of .tar files of the webdataset form and a cache.json that says what made them. An example is a caption
(key.txt), a table (key.json: the size of the picture and the size that it was cropped to, in pixels, and its scores), a
tensor a file (key.latents.safetensors, ...), and perhaps the cropped picture (key.png).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from ...common.dataclass_config import from_table
from .buckets import Size
from .shards import MEMBER, Form, Group, LocalShards
from .sidecars import SCORES, scores_from_table, table_from_json
from .source import content, entry

KEPT = ("latents", "features", "text")  # of Stage A, of the semantic encoder, the states of the caption
RECORD = "cache.json"
NO_WORDS = "no-words.safetensors"  # the states of a caption that was dropped

PLACES = [(field, "i8") for name in KEPT for field in (name, f"{name}_size")]
CACHED = [*MEMBER, ("wide", "i4"), ("high", "i4"), *PLACES]  # pixels that it was cropped to; -1: no such tensor


@dataclass(frozen=True, kw_only=True)
class Record:
    """What stands in a cache.json: how the shards beside it were made."""

    networks: dict[str, str]  # of those of KEPT that are kept: the sha256 of the weights that made it
    dtype: str
    pictures: bool  # whether they are kept, too
    data: str  # the fingerprint of what was cached
    count: int  # of pictures, the bad ones among them
    shard: int  # pictures of one

    @property
    def shards(self) -> int:
        """How many there are in the end."""
        return -(-self.count // self.shard)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Cache(NamedTuple):
    """A folder of shards, and what is known of them."""

    folder: Path
    record: Record


def find_cache(names: Sequence[str]) -> Cache | None:
    """The cache that all of some files or folders are of; None if none is of one."""
    folders = {path if path.is_dir() else path.parent for path in map(Path, names)}
    # A picture called cache.png has its caption in a file of the same name; a cache has shards.
    cached = {folder for folder in folders if (folder / RECORD).is_file() and any(folder.glob("*.tar"))}
    if not cached:
        return None
    if len(folders) > 1:
        raise ValueError("[data] source names a cache and other pictures beside it: give the shards of one cache alone")
    folder = cached.pop()
    return Cache(folder, read_record(folder))


def read_record(folder: Path) -> Record:
    """The record in a folder. ValueError if it can't be read."""
    path = folder / RECORD
    return from_table(Record, table_from_json(content(path), str(path)), RECORD)


def no_words(folder: Path) -> Tensor:
    """The states [77, c] of no words. ValueError if they can't be read."""
    path = folder / NO_WORDS
    try:
        return load_file(path)["text"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: remove it, and run `train cache` again") from error


def members_of(
    caption: str, known: np.void, cropped: Size, tensors: Mapping[str, Tensor]
) -> dict[str, bytes]:  # fmt: skip
    """The files of an example, by kind, of its row of ENTRY and the size that it was cropped to."""
    scores = {key: float(known[name]) for key, name in SCORES.items() if not math.isnan(known[name])}
    sizes = {"width": int(known["width"]), "height": int(known["height"]), "cropped": cropped}
    table = json.dumps({**sizes, **scores})
    kept = {f"{name}.safetensors": save({name: x}) for name, x in tensors.items()}
    return {"txt": caption.encode(), "json": table.encode(), **kept}


def _row(file: BinaryIO, group: Group, name: str) -> tuple[float, ...] | None:
    """The row of CACHED of an example."""
    places = [group.get(f"{kept}.safetensors", (0, -1)) for kept in KEPT]
    if "json" not in group or "txt" not in group or all(size < 0 for _, size in places):
        return None
    file.seek(group["json"][0])
    table = table_from_json(file.read(group["json"][1]), f"the .json of {name}")
    width, height = _size([table.get("width"), table.get("height")], name)
    picture = group.get("png", (0, -1))
    own = (*entry((width, height), scores_from_table(table, name)), *picture, *group["txt"], False)
    return (*own, *_size(table.get("cropped"), name), *(number for place in places for number in place))


def _size(given: Any, name: str) -> Size:
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(side, int) for side in given):
        raise ValueError(f"the .json of {name} gives no size: remove its shard, and run `train cache` again")
    return given[0], given[1]


class CachedShards(LocalShards):
    """The examples of a cache's tar files, shard by shard, in the order in which they stand there."""

    form = Form(2, CACHED, _row)

    def picture(self, index: int) -> Image.Image:
        """The picture as it was cropped."""
        if self.entries[index]["picture_size"] < 0:
            raise ValueError(f"{self.names[index]} holds no picture")
        return super().picture(index)

    def kept(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._tensor(index, name) for name in names}

    def _tensor(self, index: int, name: str) -> Tensor:
        if self.entries[index][f"{name}_size"] < 0:
            raise ValueError(f"{self.names[index]} holds no {name}")
        try:
            return load(self._content(index, name))[name]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the {name} of {self.names[index]} cannot be read ({error})") from error
