"""The `[data]` table, and the pictures that it describes."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from ...common.geometry import LARGEST, check_size
from .buckets import Size, bucket_sizes
from .epoch_order import EpochOrder
from .error_budget import ErrorBudget
from .filters import Choice, Filters, left_out
from .folder import Folder, holds_pictures
from .latent_cache import Cache, CachedShards, find_cache
from .loading import IndexedPictures, Pictures
from .shards import LocalShards
from .source import Source
from .streams import StreamedPictures

log = logging.getLogger(__name__)

CROPS = ("centre", "random")
STREAMS = ("http:", "https:", "pipe:")


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(Filters):
    """The `[data]` table of a run on pictures of one's own; beside these keys it takes those of `Filters`."""

    # Folders of pictures, or shards: .tar files, folders of them, http(s):// addresses; {000..127} counts.
    source: str | tuple[str, ...]
    size: int = 1024  # pixels of the side of a square; no bucket has more pixels than that
    ratio: float = 1.0  # of the longest bucket's sides; 1: squares alone, as the original
    multiple: int = 128  # pixels that sides are a multiple of: 64, or better 128
    buckets: tuple[tuple[int, int], ...] = ()  # width and height of each, in place of the three above
    enlarge: float = 1.0  # times that a picture is scaled up at most; what is smaller is left out
    crop: str = "centre"  # where: centre, or random, as the original
    workers: int = 4  # processes that read; 0: none beside the trainer
    bad_share: float = 0.05  # of the pictures, and of the shards, that may be bad before the run stops
    allow_pipe: bool = False  # whether a `pipe:` source may run its command

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources or not all(self.sources):
            raise ValueError("[data] source names nothing: give a folder of pictures, or shards")
        if self.multiple < 64 or self.multiple % 64:
            raise ValueError(f"[data] multiple must be 64 or a multiple of it, got {self.multiple}")
        if not self.multiple <= self.size <= LARGEST or self.size % self.multiple:
            raise ValueError(f"[data] size must be a multiple of {self.multiple} up to {LARGEST}, got {self.size}")
        for name, least in (("ratio", 1.0), ("enlarge", 1.0), ("workers", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"[data] {name} must be at least {least:g}, got {getattr(self, name):g}")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"[data] bad_share must be 0 to 1, got {self.bad_share:g}")
        if self.crop not in CROPS:
            raise ValueError(f"[data] crop {self.crop!r} is unknown: choose {' or '.join(CROPS)}")
        for width, height in self.buckets:
            check_size(width, height)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names under `source`, be it one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def names(self) -> list[str]:
        """The sources, with {000..127} and {a,b} spelled out."""
        return _expanded(self.sources)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of each bucket."""
        return tuple(dict.fromkeys(self.buckets)) or bucket_sizes(self.size, self.ratio, self.multiple)


def open_pictures(
    config: ImageDataConfig, *, batch: int, seed: int, cache: Path, rank: int = 0, world: int = 1,
    captions: bool = True, images: bool = True, kept: tuple[str, ...] = (),
) -> Pictures:  # fmt: skip
    """The pictures that a table describes, in batches of `batch` for each of `world` processes.

    Indexes of shards are kept in the folder `cache`. Without `captions` they are not asked for, and are "", and so it
    is with `images`; `kept` is what is taken of a cache. ValueError says what is wrong with the source, or that
    nothing is left of it.
    """
    if seed < 0:
        raise ValueError(f"[train] seed must be 0 or more, got {seed}")
    choice = Choice(config, config.sizes, config.enlarge, config.crop == "random", captions, images, kept)
    names = config.names
    streams = [name for name in names if name.startswith(STREAMS)]
    if streams:
        _check_streams(names, streams, config.allow_pipe)
        return StreamedPictures(
            streams, choice, batch, seed, workers=config.workers, bad_share=config.bad_share, rank=rank, world=world
        )
    source = local_source(names, cache)
    _check_bad(source, config.bad_share)
    plan = _plan(source, choice, batch * world, seed)
    return IndexedPictures(
        source, plan, choice, workers=config.workers, bad_share=config.bad_share, rank=rank, world=world
    )


def cache_of(config: ImageDataConfig) -> Cache | None:
    """The cache that a table names as its source, if it does. ValueError if what it asks for is not in any."""
    names = config.names
    cache = None if any(name.startswith(STREAMS) for name in names) else find_cache(names)
    if cache is not None and config.crop != "centre":
        raise ValueError(f'[data] crop = "{config.crop}" cannot be, since a cache keeps what was cropped at the centre')
    return cache


def local_source(names: Sequence[str], cache: Path) -> Source:
    """Folders of pictures, or .tar files and folders of them, as one source."""
    for name in names:
        if "://" in name:
            raise ValueError(
                f"[data] source {name} is not read: give an http(s):// address, or a pipe: that fetches it"
            )
        if not Path(name).exists():
            raise ValueError(f"[data] source {name} does not exist: give a folder of pictures, or shards")
    paths = [Path(name) for name in names]
    found = [sorted(path.glob("*.tar")) if path.is_dir() else [path] for path in paths]
    if all(found):
        shards = [shard for part in found for shard in part]
        if wrong := next((shard for shard in shards if shard.suffix != ".tar"), None):
            raise ValueError(f"[data] source {wrong} is no shard: give .tar files that are not compressed, or folders")
        if find_cache(names):
            return CachedShards(shards, cache)
        if mixed := next((path for path in paths if path.is_dir() and holds_pictures(path)), None):
            raise ValueError(f"[data] source {mixed} holds both shards and pictures: give a folder of either")
        return LocalShards(shards, cache)
    if any(found):
        raise ValueError("[data] source names both shards and folders of pictures: give either")
    return Folder(paths)


def _expanded(names: Sequence[str]) -> list[str]:
    """The names, with {000..127} and {a,b} spelled out."""
    if not any("{" in name for name in names):
        return list(names)
    from braceexpand import braceexpand

    try:
        return [one for name in names for one in braceexpand(name, escape=False)]  # so that Windows' paths stay whole
    except ValueError as error:
        raise ValueError(f"[data] source {names[0]} opens a brace that it does not close") from error


def _check_streams(names: Sequence[str], streams: Sequence[str], allow_pipe: bool) -> None:
    """Raise ValueError unless all sources are streams that may be read."""
    if len(streams) < len(names):
        raise ValueError("[data] source names streams and files: download the shards, or leave out the files")
    if any(name.startswith("pipe:") for name in streams) and not allow_pipe:
        raise ValueError(
            "[data] source has a pipe:, which runs a command on this machine: if you trust it, add allow_pipe = true "
            "under [data]"
        )
    if not all(name.startswith("pipe:") for name in streams) and shutil.which("curl") is None:
        raise ValueError("shards from the web are read through curl, which is not installed: install it")
    import_module("webdataset")  # now, before workers need it and cannot say so well that it is not there


def _check_bad(source: Source, share: float) -> None:
    """Name what can't be read, and raise ValueError where it is more than the share."""
    ErrorBudget("pictures", share).add(len(source) + len(source.bad), source.bad)
    if isinstance(source, LocalShards):
        ErrorBudget("shards", share).add(len(source.paths), source.bad_shards)


def _plan(source: Source, choice: Choice, batch: int, seed: int) -> EpochOrder:
    """The order of what is left of a source; says how much that is, and raises ValueError if it's nothing."""
    reasons, buckets = choice.of(source.entries)
    counts = Counter(reasons.tolist())
    total, kept = len(source), counts.pop("", 0)
    if not total:
        raise ValueError("[data] source holds no picture that can be read")
    if not kept:
        raise ValueError(
            f"no picture is left of {total} that can be read: {left_out(counts)}; choose other filters, a smaller size "
            "or a larger enlarge under [data]"
        )
    members = [np.flatnonzero((reasons == "") & (buckets == bucket)) for bucket in range(len(choice.sizes))]
    log.info("%d pictures, left out %s", kept, left_out(counts))
    for (width, height), part in zip(choice.sizes, members, strict=True):
        few = ", fewer than a batch: they repeat in it" if 0 < len(part) < batch else ""
        log.info("bucket %dx%d: %d%s", width, height, len(part), few)
    return EpochOrder(members, batch, seed)
