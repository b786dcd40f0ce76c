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

from ...common.text import listed
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
from .sources import JoinedSource
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
        if config.sources:
            raise ValueError("[[data.sources]] names a stream: name streams alone, as source under [data]")
        _check_streams(names, config.allow_pipe)
        if validation.fraction:
            raise ValueError(
                "[validation] cannot hold out pictures of a stream: download its shards, or remove the table"
            )
        return StreamLoader(urls=names, batch=batch, seed=seed, **options)
    source = _open_sources(config, cache)
    ErrorBudget("images", config.bad_share).add(len(source) + len(source.bad), source.bad)
    shards = ErrorBudget("shards", config.bad_share)
    for part in source.sources if isinstance(source, JoinedSource) else [source]:
        if isinstance(part, ShardSource):
            shards.add(len(part.paths), part.bad_shards)
    source.left_out.log()
    members, held_out = _members(source, config, batch * world, captions or "text" in cached, validation)
    repeats = _repeats(source, config, members) if config.sources else None
    order = EpochOrder(members, batch * world, seed, repeats)
    return IndexedLoader(source=source, order=order, held_out=held_out, **options)


def configured_cache(config: ImageDataConfig) -> Cache | None:
    """Returns the cache that is the `source` of a table, None for other sources.

    ValueError if the table names other images too, caches several sources or random crops.
    """
    for part in config.parts if not config.source else ():
        if find_cache(part.names):
            raise ValueError(
                f"[[data.sources]] names the cache {part.names[0]}: make one cache of all sources, and name it as "
                "source under [data]"
            )
    if (found := find_cache(config.names)) is None:
        if config.source and config.sources:
            raise ValueError("[data] has source and sources: move the source into a table [[data.sources]]")
        return None
    if config.crop != "centre":
        raise ValueError(f'[data] crop = "{config.crop}" is impossible: a cache contains centre crops')
    cache = Cache(found, read_manifest(found))
    if (now := source_names(config)) != cache.manifest.sources:
        raise ValueError(
            f"{found} is a cache of [[data.sources]] {', '.join(cache.manifest.sources) or 'none'}, and [data] has "
            f"{', '.join(now) or 'none'}: name the same ones in this order, or make a new cache"
        )
    return cache


def source_names(config: ImageDataConfig) -> tuple[str, ...]:
    """Returns a name of each of `[[data.sources]]`."""
    return tuple(listed(part.names, 1, 200) for part in config.parts if config.sources)


def find_cache(names: Sequence[str]) -> Path | None:
    """Returns the folder of a cache whose shards are the source, None for other sources.

    ValueError if other images are named too.
    """
    if any(name.startswith(STREAMS) for name in names):
        return None
    folders = {path if path.is_dir() else path.parent for path in map(Path, names)}
    # A cache.json alone can be the caption of a cache.png: a cache has shards too.
    caches = [folder for folder in folders if (folder / MANIFEST).is_file() and any(folder.glob("*.tar"))]
    if not caches:
        return None
    if len(folders) > 1:
        raise ValueError("[data] source names a cache and other images: give the shards of one cache alone")
    return caches[0]


def _open_sources(config: ImageDataConfig, cache: Path) -> ImageSource:
    """Opens the sources of a table as one source."""
    if config.source or not config.sources:
        return _open_source(config.names, cache)
    names = [listed(part.names, 1) for part in config.parts]
    return JoinedSource([_open_source(part.names, cache) for part in config.parts], names)


def _open_source(names: Sequence[str], cache: Path) -> ImageSource:
    """Opens folders of images, or .tar files and folders of them, as one source."""
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
    if find_cache(names):
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
    own = ~np.array([part.regularisation for part in config.parts])[source.origins]
    held_out = hold_out(validation, source.records, buckets, (reasons == "") & own)
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


def _repeats(source: ImageSource, config: ImageDataConfig, members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns how often an epoch has each image of each bucket, and logs it for each source.

    ValueError if a source has no image that can be used.
    """
    counts = np.bincount(source.origins[np.concatenate(members)], minlength=len(config.parts))
    if empty := [part.names[0] for part, count in zip(config.parts, counts.tolist(), strict=True) if not count]:
        raise ValueError(
            f"[[data.sources]] {', '.join(empty)} has no image that can be used: remove it, or see the log"
        )
    regular = np.array([part.regularisation for part in config.parts])
    repeats = np.array([part.repeats for part in config.parts])
    repeats[regular] = (repeats * counts)[~regular].sum() / max(1, counts[regular].sum())
    for part, count, own in zip(config.parts, counts.tolist(), repeats.tolist(), strict=True):
        kind = "regularisation set " if part.regularisation else ""
        log.info(
            "%s%s: %d images, %.4g times in an epoch, weight %g", kind, listed(part.names, 1), count, own, part.weight
        )
    return [repeats[source.origins[part]] for part in members]
