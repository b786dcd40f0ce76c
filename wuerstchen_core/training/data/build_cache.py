"""`train cache`: computes latents, features and text states once, in shards that training reads as its source.

Shard n contains images n * shard to (n + 1) * shard - 1 of the selected ones, in the source's order, grouped by bucket.
So its contents follow from its number: a stopped run resumes with the missing shards, process r of w computes the
shards n with n % w == r, and training on the cache uses the images in the same order as training on their source.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...common.atomic import replace_file
from ...common.dataclass_config import from_table
from ...common.devices import DTYPES
from ...models.image_encoder import ImageEncoder
from ...models.text_encoder import TextEncoder
from ...models.vqgan import VQGAN
from ..config import check_tables, read_config
from ..run import STAGES, stage_class
from ..stages import networks
from .error_budget import ErrorBudget
from .latent_cache import CACHEABLE, EMPTY_TEXT, MANIFEST, CacheManifest, example_files, read_manifest
from .loading import IndexedLoader, read_example
from .open import ImageDataConfig, configured_cache, open_loader
from .shards import add_member

log = logging.getLogger(__name__)

ENCODERS: dict[str, tuple[Any, Any]] = {  # network and function of each of CACHEABLE
    "latents": (VQGAN, networks.encode_latents),
    "features": (ImageEncoder, networks.encode_features),
    "text": (TextEncoder, networks.encode_text),
}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The `[cache]` table."""

    output: str  # a folder
    what: tuple[str, ...] = CACHEABLE
    dtype: str = "bf16"  # of the cached tensors
    pictures: bool = False  # cache the cropped images too
    shard: int = 500  # images in a shard
    batch: int = 8  # images in one forward pass

    def __post_init__(self) -> None:
        if not self.what or not set(self.what) <= set(CACHEABLE) or len(set(self.what)) < len(self.what):
            known, values = ", ".join(CACHEABLE), ", ".join(self.what) or "none"
            raise ValueError(f"[cache] what must be one or more of {known}, got {values}")
        if self.dtype not in DTYPES:
            raise ValueError(f"[cache] dtype {self.dtype!r} is unknown: choose {', '.join(DTYPES)}")
        for name in ("shard", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"[cache] {name} must be at least 1, got {getattr(self, name)}")


def make_cache(config_path: Path, overrides: list[str]) -> Path:
    """Computes the cache that a configuration describes, or its missing shards; returns its folder.

    Under `accelerate launch` or `torchrun` each process computes a part of the shards.
    """
    config = read_config(config_path, overrides)
    check_tables(config, tuple({table for stage in STAGES for table in stage_class(stage).tables} - {"model"}))
    options = from_table(CacheConfig, config.get("cache", {}), "cache")
    if "source" not in config.get("data", {}):
        raise ValueError("[data] source is missing: name images to cache (the demo's scenes stay in memory anyway)")
    data = from_table(ImageDataConfig, config["data"], "data")
    if configured_cache(data) is not None:
        raise ValueError("[data] source is a cache already: name the images that it was computed from")
    if not options.output or Path(options.output).resolve() in {Path(name).resolve() for name in data.names}:
        raise ValueError(f"[cache] output {options.output!r} cannot contain the cache: name a new folder")
    if data.crop != "centre":
        raise ValueError(f'[data] crop = "{data.crop}" cannot be cached: remove it, for centre crops')
    loader = open_loader(data, batch=1, seed=0, cache=Path(config["run"]) / "cache")
    if not isinstance(loader, IndexedLoader):
        raise ValueError("[data] source is a stream, which cannot be cached: download the shards first")
    accelerator, folder = Accelerator(), Path(options.output)
    encoders = {}
    for name in options.what:
        kind, encode = ENCODERS[name]
        network = networks.load_frozen(config, *networks.COMPUTED_BY[name], kind)
        encoders[name] = partial(encode, network.to(accelerator.device))
    manifest = CacheManifest(
        networks={name: networks.weights_fingerprint(config, name) for name in options.what},
        **{name: getattr(options, name) for name in ("dtype", "pictures", "shard")},
        data=loader.fingerprint(),
        count=sum(map(len, loader.order.members)),
    )
    writer = _CacheWriter(folder, options, manifest, loader, encoders)
    if accelerator.is_main_process:
        writer.prepare()
    accelerator.wait_for_everyone()
    writer.write_shards(accelerator)
    return folder


@dataclass
class _Chunk:
    """Readable images of one bucket for one forward pass."""

    read: int  # images, the bad ones included
    indices: list[int]
    images: list[Tensor]  # [3, H, W] uint8
    captions: list[str]
    bad: dict[str, str]  # name → reason


@dataclass
class _Chunks(Dataset[_Chunk]):
    """The chunks that workers read."""

    loader: IndexedLoader
    parts: list[tuple[int, list[int]]]  # bucket and image indices of each

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> _Chunk:
        bucket, indices = self.parts[number]
        source, chunk = self.loader.source, _Chunk(len(indices), [], [], [], {})
        for index in indices:
            try:
                image, caption, _ = read_example(source, self.loader.selection, index, bucket)
            except ValueError as error:
                chunk.bad[source.names[index]] = str(error)
                continue
            chunk.indices.append(index)
            chunk.images.append(image)
            chunk.captions.append(caption)
        return chunk


@dataclass
class _CacheWriter:
    folder: Path
    options: CacheConfig
    manifest: CacheManifest
    loader: IndexedLoader
    encoders: dict[str, Any]  # functions of images [B, 3, H, W] in [0, 1], or for "text" of captions

    def __post_init__(self) -> None:
        self.buckets = np.full(len(self.loader.source), -1)
        for bucket, members in enumerate(self.loader.order.members):
            self.buckets[members] = bucket
        self.selected = np.flatnonzero(self.buckets >= 0)
        self.budget = ErrorBudget("images", self.loader.bad_share)

    def prepare(self) -> None:
        """Writes the manifest into the folder. ValueError if other shards or a cache of other settings are there."""
        if (self.folder / MANIFEST).exists():
            before = asdict(read_manifest(self.folder))
            if other := [name for name, value in asdict(self.manifest).items() if before[name] != value]:
                raise ValueError(
                    f"{self.folder} is a cache with other {', '.join(other)}: restore these, or change [cache] output"
                )
        elif any(self.folder.glob("*.tar")):
            raise ValueError(f"{self.folder} contains shards that are not a cache's: change [cache] output")
        self.folder.mkdir(parents=True, exist_ok=True)
        if "text" in self.encoders:
            content = save({"text": self.encoders["text"]([""])[0].to(DTYPES[self.options.dtype])})
            replace_file(self.folder / EMPTY_TEXT, lambda draft: draft.write_bytes(content))
        replace_file(self.folder / MANIFEST, lambda draft: draft.write_text(self.manifest.to_json(), encoding="utf-8"))

    def write_shards(self, accelerator: Accelerator) -> None:
        """Writes the missing shards of this process."""
        digits = max(5, len(str(self.manifest.shards - 1)))
        paths = {number: self.folder / f"{number:0{digits}d}.tar" for number in range(self.manifest.shards)}
        mine = range(accelerator.process_index, self.manifest.shards, accelerator.num_processes)
        missing = {number: self._parts(number) for number in mine if not paths[number].exists()}
        chunks = _Chunks(self.loader, [part for parts in missing.values() for part in parts])
        results = iter(DataLoader(chunks, batch_size=None, num_workers=self.loader.workers))
        total, to_do = sum(len(self._members(number)) for number in mine), sum(len(part) for _, part in chunks.parts)
        shown = accelerator.is_main_process
        with tqdm(total=total, initial=total - to_do, desc="cache", mininterval=2, disable=not shown) as progress:
            for number, parts in missing.items():
                replace_file(paths[number], partial(self._write_shard, islice(results, len(parts)), progress))
        log.info(
            "%d images cached in %s, %d bad ones skipped, %d there already",
            self.budget.read - self.budget.failed, self.folder, self.budget.failed, total - to_do,
        )  # fmt: skip

    def _members(self, number: int) -> np.ndarray:
        """Returns the image indices of a shard."""
        return self.selected[number * self.options.shard : (number + 1) * self.options.shard]

    def _parts(self, number: int) -> list[tuple[int, list[int]]]:
        """Returns the bucket and the image indices of each forward pass for a shard."""
        members, size = self._members(number), self.options.batch
        grouped = [(bucket, members[self.buckets[members] == bucket]) for bucket in range(self.buckets.max() + 1)]
        return [(bucket, part[i : i + size].tolist()) for bucket, part in grouped for i in range(0, len(part), size)]

    def _write_shard(self, chunks: Iterator[_Chunk], progress: tqdm[Any], path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for chunk in chunks:
                self.budget.add(chunk.read, chunk.bad)
                if chunk.indices:
                    self._add_chunk(tar, chunk)
                progress.update(chunk.read)

    def _add_chunk(self, tar: tarfile.TarFile, chunk: _Chunk) -> None:
        images, dtype = torch.stack(chunk.images).float() / 255, self.options.dtype
        tensors = {}
        for name, encode in self.encoders.items():
            tensors[name] = encode(chunk.captions if name == "text" else images).to(DTYPES[dtype])
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} are not finite in {dtype}: choose another [cache] dtype")
        height, width = images.shape[-2:]
        for i, index in enumerate(chunk.indices):
            record, own = self.loader.source.records[index], {name: x[i] for name, x in tensors.items()}
            files = example_files(chunk.captions[i], record, (width, height), own)
            if self.options.pictures:
                files["png"] = _png(chunk.images[i])
            for suffix, content in files.items():
                add_member(tar, f"{index:09d}.{suffix}", content)


def _png(image: Tensor) -> bytes:
    """Returns the PNG file of an image [3, H, W] uint8."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
