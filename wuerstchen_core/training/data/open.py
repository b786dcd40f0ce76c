"""Opens the sources of a `[data]` table and returns a loader of their images."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .epoch_order import EpochOrder
from .error_budget import ErrorBudget
from .filters import ImageDataConfig, rejected
from .folder import FolderSource, find_files, is_image
from .held_out import NO_VALIDATION, ValidationConfig, hold_out
from .latent_cache import MANIFEST, Cache, CacheSource, read_manifest
from .left_out import kind_of
from .loading import BatchLoader, IndexedLoader
from .shards import ShardSource
from .source import ImageSource
from .streams import StreamLoader

log = logging.getLogger(__name__)

STREAMS = ("http:", "https:", "pipe:")


def open_loader(
    config: ImageDataConfig, *, batch: int, seed: int, cache: Path, rank: int = 0, world: int = 1,
    captions: bool = True, images: bool = True, cached: tuple[str, ...] = (),
    validation: ValidationConfig = NO_VALIDATION,
) -> BatchLoader:  # fmt: skip
    """Opens the sources of a table and returns a loader of batches of `batch` images in process `rank` of `world`.

    `cache` is the folder for the indexes of shards, `cached` names the tensors to read from a cache of latents. An
    image with several captions is several examples, unless neither these nor their cached states are needed.
    ValueError if a source cannot be read or all its images are rejected.
    """
    options: dict[str, Any] = {"config": config, "captions": captions, "images": images, "cached": cached}
    options |= {"rank": rank, "world": world}
    names = config.names
    if any(name.startswith(STREAMS) for name in names):
        _check_streams(names, config.allow_pipe)
        if validation.fraction:
            raise ValueError(
                "[validation] cannot hold out pictures of a stream: download its shards, or remove the table"
            )
        return StreamLoader(urls=names, batch=batch, seed=seed, **options)
    source = _open_source(config, cache)
    ErrorBudget("images", config.bad_share).add(len(source) + len(source.bad), source.bad)
    if isinstance(source, ShardSource):
        ErrorBudget("shards", config.bad_share).add(len(source.paths), source.bad_shards)
    source.left_out.log()
    members, held_out = _members(source, config, batch * world, captions or "text" in cached, validation)
    order = EpochOrder(members, batch * world, seed)
    return IndexedLoader(source=source, order=order, held_out=held_out, **options)


def configured_cache(config: ImageDataConfig) -> Cache | None:
    """Returns the cache that is the source of a table, None for other sources.

    ValueError if the table names other images too, or random crops.
    """
    if any(name.startswith(STREAMS) for name in config.names):
        return None
    folders = {path if path.is_dir() else path.parent for path in map(Path, config.names)}
    # A cache.json alone can be the caption of a cache.png: a cache has shards too.
    caches = [folder for folder in folders if (folder / MANIFEST).is_file() and any(folder.glob("*.tar"))]
    if not caches:
        return None
    if len(folders) > 1:
        raise ValueError("[data] source names a cache and other images: give the shards of one cache alone")
    if config.crop != "centre":
        raise ValueError(f'[data] crop = "{config.crop}" is impossible: a cache contains centre crops')
    return Cache(caches[0], read_manifest(caches[0]))


def _open_source(config: ImageDataConfig, cache: Path) -> ImageSource:
    """Opens folders of images, or .tar files and folders of them, as one source."""
    names = config.names
    for name in names:
        if "://" in name:
            raise ValueError(f"[data] source {name} is not supported: use an http(s):// address or a pipe: command")
        if not Path(name).exists():
            raise ValueError(f"[data] source {name} does not exist: give a folder of images, or shards")
    paths = [Path(name) for name in names]
    shards = [sorted(filter(_is_shard, path.iterdir())) if path.is_dir() else [path] for path in paths]
    if not any(shards):
        return FolderSource(paths)
    if not all(shards):
        raise ValueError("[data] source names both shards and folders of images: give one kind")
    files = [path for part in shards for path in part]
    if wrong := next((path for path in files if not _is_shard(path)), None):
        raise ValueError(f"[data] source {wrong} is not a shard: give uncompressed .tar files, or folders")
    if configured_cache(config):
        return CacheSource(files, cache)
    source = ShardSource(files, cache)
    for folder in filter(Path.is_dir, paths):
        for path in find_files(folder, source.left_out):
            if is_image(path):
                raise ValueError(f"[data] source {folder} contains both shards and images: give a folder of one kind")
            if path not in files:
                source.left_out.add(kind_of("".join(path.suffixes[-2:])), path.relative_to(folder).as_posix())
    return source


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _check_streams(names: Sequence[str], allow_pipe: bool) -> None:
    """Raises ValueError unless all names are streams, and may and can be read."""
    if not all(name.startswith(STREAMS) for name in names):
        raise ValueError("[data] source names both streams and files: download the shards, or remove the files")
    pipes = [name for name in names if name.startswith("pipe:")]
    if pipes and not allow_pipe:
        raise ValueError(
            f"[data] source {pipes[0]} runs a command on this machine: if you trust it, set allow_pipe = true in [data]"
        )
    if len(pipes) < len(names) and shutil.which("curl") is None:
        raise ValueError("[data] source has shards from the web, which need curl: install it")
    import_module("webdataset")  # fails here, not in a worker, if the package is missing


def _members(
    source: ImageSource, config: ImageDataConfig, batch: int, captions: bool, validation: ValidationConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the images of each bucket that pass the filters, and those of them that are held out for validation.

    Logs their number. ValueError if none is left.

    Unless `captions` are needed, an image with several is one example.
    """
    reasons, buckets = config.select(source.records)
    if not captions:
        reasons = np.where(source.records["line"] > 0, "further captions", reasons)
    elif several := np.count_nonzero(source.records["line"] == 1):
        log.info("%d images have several captions, each of which is an example", several)
    held_out = hold_out(validation, source.records, buckets, reasons == "")
    reasons = np.where(held_out, "held out for validation", reasons)
    counts = Counter(reasons.tolist())
    if not len(source):
        raise ValueError("[data] source contains no readable image")
    if not (used := counts.pop("", 0)):
        raise ValueError(
            f"none of {len(source)} readable images can be used: {rejected(counts)}; choose other filters, a smaller "
            "size or a larger enlarge under [data]"
        )
    members, held = (
        [np.flatnonzero(chosen & (buckets == bucket)) for bucket in range(len(config.sizes))]
        for chosen in (reasons == "", held_out)
    )
    log.info("%d images, rejected %s", used, rejected(counts))
    for (width, height), part in zip(config.sizes, members, strict=True):
        note = ", fewer than a batch, so they repeat within it" if 0 < len(part) < batch else ""
        log.info("bucket %dx%d: %d%s", width, height, len(part), note)
    return members, held
