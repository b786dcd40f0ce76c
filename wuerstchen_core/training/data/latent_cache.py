"""Reads caches: shards of latents, image features and text states that `train cache` computed.

A cache is a folder of .tar files of the webdataset form and a cache.json that says how they were computed. An example
is a caption (key.txt), a table (key.json: the image's size and its cropped size in pixels, and its scores), one file
for each tensor (key.latents.safetensors, ...) and optionally the cropped image (key.png).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...common.dataclass_config import Count, OneOf, from_table, option
from ...common.devices import DTYPES
from ...inference.images import open_grey
from .buckets import Size
from .caption_tokens import CUT
from .left_out import LeftOut
from .shards import NONE, SHARD_FIELDS, Members, Record, ShardSource
from .sidecars import parse_json_table, read_captions, read_table
from .source import SCORE_KEYS, image_record, read_at, read_bytes

IMAGE_TENSORS = ("latents", "features")  # of Stage A, of Stage C
CACHEABLE = (*IMAGE_TENSORS, "text")  # also the caption's text states
MIRRORED = {name: f"mirrored_{name}" for name in IMAGE_TENSORS}  # those of mirrored images
TENSORS = (*CACHEABLE, *MIRRORED.values())  # names of an example's tensors
MANIFEST = "cache.json"
EMPTY_TEXT = "no-words.safetensors"  # the text states of a dropped caption

# The cropped size in pixels, the number of the source, and the offset and size in bytes of each tensor.
CACHE_FIELDS = [
    *SHARD_FIELDS, ("wide", "i4"), ("high", "i4"), ("origin", "i4"),
    *((field, "i8") for name in TENSORS for field in (name, f"{name}_size")),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The `[cache]` table."""

    output: str = option(meaning="folder to write to")
    what: Annotated[tuple[str, ...], OneOf(CACHEABLE)] = option(
        CACHEABLE, "what to compute: Stage A's latents, image features, text states"
    )
    dtype: Annotated[str, OneOf(DTYPES)] = option("bf16", "precision of the cached tensors")
    pictures: bool = option(False, "also write the cropped images")
    shard: Count = option(500, "images in a shard")
    batch: Count = option(8, "images in a forward pass")


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """The contents of a cache.json: how the shards in its folder were computed."""

    networks: dict[str, str]  # the cached ones of CACHEABLE → sha256 of the weights of the network that computed them
    dtype: str
    pictures: bool  # True if the shards contain the cropped images
    data: str  # fingerprint of the dataset that was cached
    count: int  # images, unreadable ones included
    shard: int  # images in a shard
    long_captions: str = CUT  # or WHOLE; caches of earlier versions are cut
    sources: tuple[str, ...] = ()  # of [[data.sources]], if there are any
    mirrored: bool = False  # True if the shards contain the tensors of mirrored images too
    masks: str = ""  # the kind of masks of each source; "" if the shards have none
    edits: str = ""  # how the captions were changed whose states are cached; "" if they were not

    @property
    def shards(self) -> int:
        """The number of shards of the complete cache."""
        return -(-self.count // self.shard)


class Cache(NamedTuple):
    """A folder of shards and its manifest."""

    folder: Path
    manifest: CacheManifest


def read_manifest(folder: Path) -> CacheManifest:
    """Reads the manifest in a folder. ValueError if it cannot be read."""
    path = folder / MANIFEST
    return from_table(CacheManifest, parse_json_table(read_bytes(path), str(path)), MANIFEST)


def read_empty_text(folder: Path) -> Tensor:
    """Returns the text states [77, c] of an empty caption. ValueError if they cannot be read."""
    path = folder / EMPTY_TEXT
    try:
        return load(path.read_bytes())["text"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: remove it and run `train cache` again") from error


def example_files(
    caption: str, record: np.void, origin: int, cropped: Size, tensors: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """Returns the files of an example by suffix; `record` is its row of `ImageSource.records`, `origin` its source."""
    scores = {key: float(record[name]) for key, name in SCORE_KEYS.items() if not math.isnan(record[name])}
    table = {"width": int(record["width"]), "height": int(record["height"]), "cropped": cropped, **scores}
    table |= {"line": int(record["line"])} if record["line"] else {}
    table |= {"source": origin} if origin else {}
    files = {"txt": caption.encode(), "json": json.dumps(table).encode()}
    return files | {f"{name}.safetensors": save({name: x}) for name, x in tensors.items()}


class CacheSource(ShardSource):
    """The examples of a cache's shards, in the order of the shards and of their members."""

    index_version = 8
    fields = CACHE_FIELDS

    @cached_property
    def origins(self) -> np.ndarray:
        return self.records["origin"]

    def caption(self, index: int) -> str:
        return read_captions(self._read(index, "caption"), {}, self.names[index])[0]

    def mask(self, index: int, kind: str) -> Image.Image | None:
        return open_grey(BytesIO(self._read(index, "mask"))) if self.has_mask(index, kind) else None

    def has_mask(self, index: int, kind: str) -> bool:
        return bool(self.records["mask_size"][index] >= 0)

    def cached_tensors(self, index: int, names: Sequence[str], mirrored: bool = False) -> dict[str, Tensor]:
        tensors = {}
        for name in names:
            stored = MIRRORED.get(name, name) if mirrored else name
            try:
                tensors[name] = load(self._read(index, stored))[stored]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"the {name} of {self.names[index]} cannot be read ({error})") from error
        return tensors

    def _examples(
        self, key: str, groups: dict[str, Members], stems: set[str], left_out: LeftOut
    ) -> Iterator[tuple[str, Any]]:
        yield key, groups[key]

    def _records(self, file: BinaryIO, example: Any, name: str) -> Iterator[Record]:
        members: Members = example
        tensors = [members.get(f"{kind}.safetensors", NONE) for kind in TENSORS]
        if "json" not in members or "txt" not in members or all(member == NONE for member in tensors):
            return
        table = read_table(read_at(file, *members["json"]), name)
        try:
            width, height, *cropped = map(int, (table["width"], table["height"], *table["cropped"]))
            line, origin = int(table.get("line", 0)), int(table.get("source", 0))
            wide, high = cropped
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"the .json of {name} has no valid size: remove its shard and run `train cache` again"
            ) from None
        places = *members.get("png", NONE), *members["txt"], False, *members.get("mask.png", NONE)
        yield (*image_record((width, height), table, name, line), *places, wide, high, origin, *sum(tensors, ()))
