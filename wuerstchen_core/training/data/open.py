"""The `[data]` table of a run on image files, and the loader that it describes."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ...common.dataclass_config import CountOrZero, Fraction, OneOf, Range
from ...common.geometry import LARGEST, check_size
from .buckets import Size, bucket_sizes
from .epoch_order import EpochOrder
from .error_budget import ErrorBudget
from .filters import Filters, Selection, rejected
from .folder import FolderSource, contains_images
from .latent_cache import Cache, CacheSource, find_cache
from .loading import BatchLoader, IndexedLoader
from .shards import ShardSource
from .source import ImageSource
from .streams import StreamLoader

log = logging.getLogger(__name__)

AtLeastOne = Annotated[float, Range(least=1)]
STREAMS = ("http:", "https:", "pipe:")


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(Filters):
    """The `[data]` table of a run on image files; it also takes the keys of `Filters`."""

    # Folders of images, or shards: .tar files, folders of them, http(s):// addresses; {000..127} expands.
    source: str | tuple[str, ...]
    size: int = 1024  # pixels of a square's side; no bucket has more pixels than that square
    ratio: AtLeastOne = 1.0  # largest aspect ratio of the buckets; 1: squares only, as in the original
    multiple: int = 128  # sides are multiples of it, in pixels: 64, or better 128
    buckets: tuple[tuple[int, int], ...] = ()  # width and height of each, instead of the three keys above
    enlarge: AtLeastOne = 1.0  # largest factor of upscaling; smaller images are rejected
    crop: Annotated[str, OneOf(("centre", "random"))] = "centre"  # or random, as in the original
    workers: CountOrZero = 4  # processes that read; 0: the training process reads itself
    bad_share: Fraction = 0.05  # fraction of images, and of shards, that may be unreadable before the run stops
    allow_pipe: bool = False  # allow `pipe:` sources to run their command

    def __post_init__(self) -> None:
        if not self.source or not all([self.source] if isinstance(self.source, str) else self.source):
            raise ValueError("[data] source is empty: give a folder of images, or shards")
        if self.multiple < 64 or self.multiple % 64:
            raise ValueError(f"[data] multiple must be a multiple of 64, got {self.multiple}")
        if not self.multiple <= self.size <= LARGEST or self.size % self.multiple:
            raise ValueError(f"[data] size must be a multiple of {self.multiple} up to {LARGEST}, got {self.size}")
        for width, height in self.buckets:
            check_size(width, height)

    @property
    def names(self) -> list[str]:
        """The sources, with {000..127} and {a,b} expanded."""
        names = [self.source] if isinstance(self.source, str) else list(self.source)
        if not any("{" in name for name in names):
            return names
        from braceexpand import braceexpand

        try:  # unescaped, so that Windows paths stay intact
            return [expanded for name in names for expanded in braceexpand(name, escape=False)]
        except ValueError as error:
            raise ValueError(f"[data] source {names[0]} has an unclosed brace: close it") from error

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of each bucket."""
        return tuple(dict.fromkeys(self.buckets)) or bucket_sizes(self.size, self.ratio, self.multiple)


def open_loader(
    config: ImageDataConfig, *, batch: int, seed: int, cache: Path, rank: int = 0, world: int = 1,
    captions: bool = True, images: bool = True, cached: tuple[str, ...] = (),
) -> BatchLoader:  # fmt: skip
    """Opens the sources of a table and returns a loader with batches of `batch` for each of `world` processes.

    `cache` is the folder for the indexes of shards, `cached` names the tensors to read from a cache. ValueError if a
    source cannot be read or nothing is left of it.
    """
    selection = Selection(config, config.sizes, config.enlarge, config.crop == "random", captions, images, cached)
    options: dict[str, Any] = {"selection": selection, "workers": config.workers, "bad_share": config.bad_share}
    options |= {"rank": rank, "world": world}
    names = config.names
    if any(name.startswith(STREAMS) for name in names):
        _check_streams(names, config.allow_pipe)
        return StreamLoader(urls=names, batch=batch, seed=seed, **options)
    source = _open_source(names, cache)
    ErrorBudget("images", config.bad_share).add(len(source) + len(source.bad), source.bad)
    if isinstance(source, ShardSource):
        ErrorBudget("shards", config.bad_share).add(len(source.paths), source.bad_shards)
    return IndexedLoader(source=source, order=_order(source, selection, batch * world, seed), **options)


def configured_cache(config: ImageDataConfig) -> Cache | None:
    """Returns the cache that a table names as its source, if it does. ValueError if it also asks for random crops."""
    names = config.names
    cache = None if any(name.startswith(STREAMS) for name in names) else find_cache(names)
    if cache is not None and config.crop != "centre":
        raise ValueError(f'[data] crop = "{config.crop}" is impossible: a cache contains centre crops')
    return cache


def _open_source(names: Sequence[str], cache: Path) -> ImageSource:
    """Opens folders of images, or .tar files and folders of them, as one source."""
    for name in names:
        if "://" in name:
            raise ValueError(f"[data] source {name} is not supported: use an http(s):// address or a pipe: command")
        if not Path(name).exists():
            raise ValueError(f"[data] source {name} does not exist: give a folder of images, or shards")
    paths = [Path(name) for name in names]
    shards = [sorted(path.glob("*.tar")) if path.is_dir() else [path] for path in paths]
    if not any(shards):
        return FolderSource(paths)
    if not all(shards):
        raise ValueError("[data] source names both shards and folders of images: give one kind")
    files = [path for part in shards for path in part]
    if wrong := next((path for path in files if path.suffix != ".tar"), None):
        raise ValueError(f"[data] source {wrong} is not a shard: give uncompressed .tar files, or folders")
    if find_cache(names):
        return CacheSource(files, cache)
    if mixed := next((path for path in paths if path.is_dir() and contains_images(path)), None):
        raise ValueError(f"[data] source {mixed} contains both shards and images: give a folder of one kind")
    return ShardSource(files, cache)


def _check_streams(names: Sequence[str], allow_pipe: bool) -> None:
    """Raises ValueError unless all names are streams that may be read here."""
    if not all(name.startswith(STREAMS) for name in names):
        raise ValueError("[data] source names both streams and files: download the shards, or remove the files")
    pipes = [name for name in names if name.startswith("pipe:")]
    if pipes and not allow_pipe:
        raise ValueError(
            f"[data] source {pipes[0]} runs a command on this machine: if you trust it, set allow_pipe = true in [data]"
        )
    if len(pipes) < len(names) and shutil.which("curl") is None:
        raise ValueError("[data] source has shards from the web, which need curl: install it")
    import_module("webdataset")  # a missing package is reported better here than by a worker


def _order(source: ImageSource, selection: Selection, batch: int, seed: int) -> EpochOrder:
    """Returns the order of the selected images and logs their number. ValueError if there are none."""
    reasons, buckets = selection.select(source.records)
    counts = Counter(reasons.tolist())
    if not len(source):
        raise ValueError("[data] source contains no readable image")
    if not (used := counts.pop("", 0)):
        raise ValueError(
            f"none of {len(source)} readable images can be used: {rejected(counts)}; choose other filters, a smaller "
            "size or a larger enlarge under [data]"
        )
    members = [np.flatnonzero((reasons == "") & (buckets == bucket)) for bucket in range(len(selection.sizes))]
    log.info("%d images, rejected %s", used, rejected(counts))
    for (width, height), part in zip(selection.sizes, members, strict=True):
        note = ", fewer than a batch, so they repeat within it" if 0 < len(part) < batch else ""
        log.info("bucket %dx%d: %d%s", width, height, len(part), note)
    return EpochOrder(members, batch, seed)
