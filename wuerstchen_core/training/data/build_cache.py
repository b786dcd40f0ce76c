"""`train cache`: what frozen networks make of pictures, computed once, in shards that a training takes for its source.

Shard n holds pictures n·shard to (n + 1)·shard - 1 of those that training would take, in its order, bucket by bucket.
So its content follows from its number, whoever computes it and when: what a killed run left is gone on with, process
r of w makes the shards ≡ r (mod w), and a training on the cache sees the pictures in the order in which it would
have seen them in their source.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
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
from ..stages.networks import (
    COMPUTED_BY,
    encode_features,
    encode_latents,
    encode_text,
    load_frozen,
    weights_fingerprint,
)
from .error_budget import ErrorBudget
from .filters import Choice
from .latent_cache import KEPT, NO_WORDS, RECORD, Record, members_of, read_record
from .loading import IndexedPictures, read_example
from .open import ImageDataConfig, cache_of, open_pictures
from .source import Source
from .tars import add_member

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The `[cache]` table."""

    output: str  # a folder
    what: tuple[str, ...] = KEPT
    dtype: str = "bf16"  # of what is kept
    pictures: bool = False  # whether they are kept, too, as they were cropped
    shard: int = 500  # pictures of one
    batch: int = 8  # pictures that a network sees at a time

    def __post_init__(self) -> None:
        if not self.what or not set(self.what) <= set(KEPT) or len(set(self.what)) < len(self.what):
            raise ValueError(f"[cache] what must be some of {', '.join(KEPT)}, got {', '.join(self.what) or 'none'}")
        if self.dtype not in DTYPES:
            raise ValueError(f"[cache] dtype {self.dtype!r} is unknown: choose {', '.join(DTYPES)}")
        for name in ("shard", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"[cache] {name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Some:
    """Pictures of one bucket, without the bad ones."""

    read: int  # the bad ones among them
    indices: list[int] = field(default_factory=list)
    images: Tensor = field(default_factory=partial(torch.empty, 0))  # [n, 3, H, W] uint8
    captions: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)  # by name: why


@dataclass
class _Reads(Dataset[Some]):
    """What workers read, each item by its number."""

    source: Source
    choice: Choice
    parts: list[tuple[int, list[int]]]  # a bucket, and the indices of some of its pictures

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Some:
        bucket, indices = self.parts[number]
        some, images = Some(len(indices)), []
        for index in indices:
            try:
                image, caption, _ = read_example(self.source, self.choice, index, bucket)
            except ValueError as error:
                some.bad[self.source.name(index)] = str(error)
                continue
            some.indices.append(index)
            images.append(image)
            some.captions.append(caption)
        if images:
            some.images = torch.stack(images)
        return some


def make_cache(config_path: Path, overrides: list[str]) -> Path:
    """Compute what the file's `[cache]` table says, going on where an earlier run stopped; returns the folder.

    Under `accelerate launch` or `torchrun` each process makes its share of the shards.
    """
    config = read_config(config_path, overrides)
    of_stages = {table: None for stage in STAGES for table in stage_class(stage).tables}
    check_tables({"model": {}, **config}, tuple(of_stages))  # whatever the stage, and its sizes, which go unused
    options = from_table(CacheConfig, config.get("cache", {}), "cache")
    if "source" not in config.get("data", {}):
        raise ValueError("[data] names no source of pictures to cache: the demo's own are kept in memory anyway")
    data = from_table(ImageDataConfig, config["data"], "data")
    if cache_of(data) is not None:
        raise ValueError("[data] source is a cache itself: name the pictures that it was made of")
    if not options.output or Path(options.output).resolve() in {Path(name).resolve() for name in data.names}:
        raise ValueError(f"[cache] output {options.output!r} is no place for a cache: name a new folder")
    if data.crop != "centre":
        raise ValueError(f'[data] crop = "{data.crop}" cannot be cached: leave it out, for crops at the centre')
    pictures = open_pictures(data, batch=1, seed=0, cache=Path(config["run"]) / "cache")
    if not isinstance(pictures, IndexedPictures):
        raise ValueError("[data] source is a stream, which cannot be cached: download the shards first")
    accelerator, folder = Accelerator(), Path(options.output)
    makers = _makers(config, options, accelerator.device)
    record = Record(
        networks={name: weights_fingerprint(config, name) for name in options.what},
        **{name: getattr(options, name) for name in ("dtype", "pictures", "shard")},
        data=pictures.fingerprint(),
        count=sum(map(len, pictures.plan.members)),
    )
    if accelerator.is_main_process:
        _claim(folder, record, makers)
    accelerator.wait_for_everyone()
    _Run(options, record, pictures, makers, accelerator).make(folder)
    return folder


Makers = dict[str, Callable[[Tensor, list[str]], Tensor]]  # of pictures [B, 3, H, W] in [0, 1] and their captions


def _makers(config: Mapping[str, Any], options: CacheConfig, device: torch.device) -> Makers:
    """What computes what is to be kept."""

    def read(name: str, kind: type[nn.Module]) -> Any:
        return load_frozen(config, *COMPUTED_BY[name], kind).to(device)

    makers: Makers = {}
    if "latents" in options.what:
        vqgan = read("latents", VQGAN)
        makers["latents"] = lambda images, captions: encode_latents(vqgan, images)
    if "features" in options.what:
        encoder = read("features", ImageEncoder)
        makers["features"] = lambda images, captions: encode_features(encoder, images)
    if "text" in options.what:
        tower = read("text", TextEncoder)
        makers["text"] = lambda images, captions: encode_text(tower, captions)
    return makers


def _claim(folder: Path, record: Record, makers: Makers) -> None:
    """Say in the folder what it is for. ValueError if it is for something else."""
    if (folder / RECORD).exists():
        before = asdict(read_record(folder))
        other = [name for name, value in asdict(record).items() if before[name] != value]
        if other:
            raise ValueError(
                f"{folder} was begun with other {', '.join(other)}: restore these, or give another output under [cache]"
            )
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards that are no cache's: give another output under [cache]")
    folder.mkdir(parents=True, exist_ok=True)
    if "text" in makers:
        states = makers["text"](torch.empty(0), [""])[0].to(DTYPES[record.dtype])
        replace_file(folder / NO_WORDS, lambda part: part.write_bytes(save({"text": states})))
    replace_file(folder / RECORD, lambda part: part.write_text(record.text(), encoding="utf-8"))


class _Run:
    """The share of one process."""

    def __init__(
        self, options: CacheConfig, record: Record, pictures: IndexedPictures, makers: Makers, accelerator: Accelerator
    ):  # fmt: skip
        self.options, self.record, self.makers = options, record, makers
        self.pictures, self.accelerator = pictures, accelerator
        self.source, self.choice = pictures.source, pictures.choice
        self.bucket = np.full(len(self.source), -1)
        for bucket, members in enumerate(pictures.plan.members):
            self.bucket[members] = bucket
        self.taken = np.flatnonzero(self.bucket >= 0)
        self.tally = ErrorBudget("pictures", pictures.bad_share)

    def make(self, folder: Path) -> None:
        """Make the shards that are missing, each of which appears whole."""
        accelerator, digits = self.accelerator, max(5, len(str(self.record.shards - 1)))
        share = range(accelerator.process_index, self.record.shards, accelerator.num_processes)
        paths = {number: folder / f"{number:0{digits}d}.tar" for number in share}
        missing = {number: self._parts(number) for number, path in paths.items() if not path.exists()}
        reads = _Reads(self.source, self.choice, [part for parts in missing.values() for part in parts])
        readings = iter(DataLoader(reads, batch_size=None, num_workers=self.pictures.workers))
        there = sum(len(self._members(number)) for number in share if number not in missing)
        total, shown = there + sum(len(indices) for _, indices in reads.parts), accelerator.is_main_process
        with tqdm(total=total, initial=there, desc="cache", mininterval=2, disable=not shown) as progress:
            for number, parts in missing.items():
                replace_file(paths[number], partial(self._write, readings=islice(readings, len(parts)), told=progress))
        made = self.tally.read - self.tally.failed
        log.info(
            "%d pictures cached in %s, %d bad ones left out, %d there already", made, folder, self.tally.failed, there
        )

    def _members(self, number: int) -> np.ndarray:
        size = self.options.shard
        return self.taken[number * size : (number + 1) * size]

    def _parts(self, number: int) -> list[tuple[int, list[int]]]:
        """What a shard is read and computed in."""
        members, size = self._members(number), self.options.batch
        buckets = ((bucket, members[self.bucket[members] == bucket]) for bucket in range(len(self.choice.sizes)))
        return [
            (bucket, part[start : start + size].tolist())
            for bucket, part in buckets
            for start in range(0, len(part), size)
        ]

    def _write(self, path: Path, readings: Iterator[Some], told: tqdm[Any]) -> None:
        """Write a shard."""
        with tarfile.open(path, "w") as tar:
            for some in readings:
                self.tally.add(some.read, some.bad)
                if some.indices:
                    self._add(tar, some)
                told.update(some.read)

    def _add(self, tar: tarfile.TarFile, some: Some) -> None:
        images, dtype = some.images, DTYPES[self.options.dtype]
        made = {name: make(images.float() / 255, some.captions).to(dtype) for name, make in self.makers.items()}
        for name, x in made.items():
            if not x.isfinite().all():
                raise ValueError(f"{name} are not finite in {self.options.dtype}: choose another dtype under [cache]")
        height, width = images.shape[-2:]
        for i, index in enumerate(some.indices):
            tensors = {name: x[i] for name, x in made.items()}
            files = members_of(some.captions[i], self.source.entries[index], (width, height), tensors)
            if self.options.pictures:
                files["png"] = _png(images[i])
            for kind, content in files.items():
                add_member(tar, f"{index:09d}.{kind}", content)


def _png(image: Tensor) -> bytes:
    """The file of a picture [3, H, W] uint8."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
