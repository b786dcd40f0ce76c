"""Opens the folders and shards of a `[data]` table as one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...common.text import listed
from .filters import ImageDataConfig
from .folder import FolderSource, find_files, is_image
from .hf_datasets import HUB, DatasetSource, check_no_dataset, is_dataset
from .latent_cache import MANIFEST, CacheSource
from .left_out import kind_of
from .masks import FILE
from .shards import ShardSource
from .source import ImageSource
from .sources import JoinedSource, SourceConfig
from .streams import is_stream


def find_cache(names: Sequence[str]) -> Path | None:
    """Returns the folder of a cache whose shards are the source, None for other sources.

    ValueError if other images are named too.
    """
    if any(map(is_stream, names)):
        return None
    folders = {path if path.is_dir() else path.parent for path in map(Path, names)}
    # A cache.json alone can be the caption of a cache.png: a cache has shards too.
    caches = [folder for folder in folders if (folder / MANIFEST).is_file() and any(folder.glob("*.tar"))]
    if not caches:
        return None
    if len(folders) > 1:
        raise ValueError("[data] source names a cache and other images: give the shards of one cache alone")
    return caches[0]


def open_sources(config: ImageDataConfig, cache: Path, captions: bool = True, hints: bool = False) -> ImageSource:
    """Opens the sources of a table as one source; `captions`: False if they are not needed; `hints`: True if they are.

    ValueError for hints of other sources than folders.
    """
    if config.source or not config.sources:
        masked = any(own.mask for own in config.examples)
        return _open_source(replace(config.parts[0], source=config.source), cache, captions, masked, hints)
    names = [listed(part.names, 1) for part in config.parts]
    return JoinedSource([_open_source(part, cache, captions, hints=hints) for part in config.parts], names)


def _open_source(
    part: SourceConfig, cache: Path, captions: bool, masked: bool = False, hints: bool = False
) -> ImageSource:
    """Opens folders of images, or .tar files and folders of them, or a dataset in Hugging Face's formats.

    `masked`: True if the masks of a cache are used; `hints`: True if the hint pictures of a folder are.
    """
    names = part.names
    for name in names:
        if not name.startswith(HUB) and not Path(name).exists():
            raise ValueError(f"[data] source {name} does not exist: give a folder of images, or shards")
    if is_dataset(names):
        if hints:
            raise no_hints(names[0])
        if part.mask == FILE:
            raise ValueError(f'{names[0]} is a dataset, which has no mask files: set mask = "alpha", or remove it')
        return DatasetSource(names, part, captions)
    if find_cache(names) is None:
        check_no_dataset(part)
    paths = [Path(name) for name in names]
    shards = [sorted(filter(_is_shard, path.iterdir())) if path.is_dir() else [path] for path in paths]
    if not any(shards):
        return FolderSource(paths, part.mask == FILE, hints)
    if hints:
        raise no_hints(names[0])
    if not all(shards):
        raise ValueError("[data] source names both shards and folders of images: give one kind")
    files = [path for part in shards for path in part]
    if wrong := next((path for path in files if not _is_shard(path)), None):
        raise ValueError(f"[data] source {wrong} is not a shard: give uncompressed .tar files, or folders")
    if find_cache(names):
        return CacheSource(files, cache, masked)
    source = ShardSource(files, cache, part.mask == FILE)
    for folder in filter(Path.is_dir, paths):
        for path in find_files(folder, source.left_out):
            if is_image(path):
                raise ValueError(f"[data] source {folder} contains both shards and images: give a folder of one kind")
            if path not in files:
                source.left_out.add(kind_of("".join(path.suffixes[-2:])), path.relative_to(folder).as_posix())
    return source


def no_hints(name: str) -> ValueError:
    """Returns the error for a source that has no hint pictures."""
    return ValueError(
        f'[control] hints = "given" reads hint pictures from folders of images, not from {name}: choose hints that are '
        "made of the pictures, or unpack them into a folder"
    )


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar"
