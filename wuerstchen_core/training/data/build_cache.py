"""`train cache`: computes latents, features and text states once, and writes them to shards that training can read.

Shard n contains images n * shard to (n + 1) * shard - 1 of the selected ones, in the source's order, grouped by bucket.
Its contents thus depend on its number alone: a stopped run resumes with the missing shards, process r of w computes the
shards n with n % w == r, and training on the cache uses the images in the same order as training on their source.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save
from torch.utils.data import Dataset
from tqdm import tqdm

from ...common.atomic import check_room, replace_file, write_text
from ...common.dataclass_config import from_table
from ...common.devices import DTYPES
from ...common.lock import folder_lock
from ...inference.images import to_pictures
from ...models.image_encoder import ImageEncoder
from ...models.text_encoder import TextEncoder
from ...models.vqgan import VQGAN
from ..config import LoopConfig, check_tables, read_config
from ..processes import check_processes
from ..stages import networks
from ..tables import STAGES
from .caption_edits import EACH
from .caption_tokens import CUT, CaptionTokenizer
from .error_budget import ErrorBudget
from .filters import ImageDataConfig
from .latent_cache import EMPTY_TEXT, MANIFEST, MIRRORED, CacheConfig, CacheManifest, example_files, read_manifest
from .loading import Batch, IndexedLoader, ReadResult, collate
from .open import (
    caption_edits,
    check_cached_captions,
    check_cached_colours,
    configured_cache,
    mask_kinds,
    open_loader,
    source_names,
)
from .shards import add_member
from .sources import has_pictures

log = logging.getLogger(__name__)

Chunk = tuple[int, list[int]]  # bucket and image indices of a forward pass
ENCODERS: dict[str, tuple[Any, Any]] = {  # network and function for each of CACHEABLE
    "latents": (VQGAN, networks.encode_latents),
    "features": (ImageEncoder, networks.encode_features),
    "text": (TextEncoder, networks.encode_text),  # of tokens
}


class Read(NamedTuple):
    """What a worker has read of a chunk."""

    indices: list[int]  # of the readable images
    captions: list[str]  # theirs, without edits
    masks: list[Image.Image | None]
    result: ReadResult  # with their batch


def make_cache(config_path: Path, overrides: list[str]) -> Path:
    """Computes the cache that a configuration describes, or its missing shards; returns its folder.

    Under `accelerate launch` or `torchrun` each process computes a part of the shards.
    """
    config = read_config(config_path, overrides)
    tables = {table: None for kind in STAGES.values() for table in kind.tables}
    check_tables({"model": {}, **config}, tuple(tables))  # accepts the file of any stage; its [model] is not used
    options = from_table(CacheConfig, config.get("cache", {}), "cache")
    if not has_pictures(config.get("data", {})):
        raise ValueError("[data] source is missing: name the images to cache (the demo's scenes need no cache)")
    data = from_table(ImageDataConfig, config["data"], "data")
    if configured_cache(data) is not None:
        raise ValueError("[data] source is a cache already: name the images that it was computed from")
    if not options.output or Path(options.output).resolve() in {Path(name).resolve() for name in data.names}:
        raise ValueError(f"[cache] output {options.output!r} is empty or the source's folder: name a new folder")
    if data.crop != "centre":
        raise ValueError(f'[data] crop = "{data.crop}" cannot be cached: remove it to cache centre crops')
    check_cached_colours(data)
    if "text" in options.what:
        check_cached_captions(data)
    # What training may change does not matter.
    flip = float(any(own.flip for own in data.examples))
    tags = {"shuffle_tags": False, "tag_dropout": 0.0, "keep_tags": 0, "tag_separator": ","}
    own: dict[str, Any] = {"captions": EACH, "flip": flip, **tags}
    neutral = {"repeats": 1.0, "weight": 1.0, "regularisation": False, **own}
    sources = tuple(replace(part, **neutral) for part in data.parts if data.sources)
    data = replace(data, sources=sources, **own)
    exact = {**config, "train": {**config.get("train", {}), "frozen": LoopConfig.frozen}}  # runs may choose another
    loader = open_loader(data, batch=1, seed=0, cache=Path(config["run"]) / "cache")
    if not isinstance(loader, IndexedLoader):
        raise ValueError("[data] source is a stream, which cannot be cached: download the shards first")
    accelerator, folder = Accelerator(), Path(options.output)
    check_room(folder)
    check_processes(accelerator)
    encoders = {}
    for name in options.what:
        kind, encode = ENCODERS[name]
        network = networks.load_frozen(exact, networks.COMPUTED_BY[name], kind)
        encoders[name] = partial(encode, network.to(accelerator.device))
    manifest = CacheManifest(
        networks={name: networks.weights_fingerprint(config, name) for name in options.what},
        **{name: getattr(options, name) for name in ("dtype", "pictures", "shard")},
        long_captions=data.long_captions,
        mirrored=any(own.flip for own in data.examples),
        masks=mask_kinds(data),
        edits=caption_edits(data) if "text" in options.what else "",
        data=loader.fingerprint(),
        count=sum(map(len, loader.order.members)),
        sources=source_names(data),
    )
    tokenizer = CaptionTokenizer(data.long_captions == CUT)
    budget = ErrorBudget("images", data.bad_share)
    writer = _CacheWriter(folder, options, manifest, loader, encoders, tokenizer, budget)
    with folder_lock(folder, accelerator.process_index):
        if accelerator.is_main_process:
            writer.prepare()
        accelerator.wait_for_everyone()
        writer.write_shards(accelerator)
    return folder


@dataclass
class _ChunkReader(Dataset[Read]):
    """Reads the images of forward passes."""

    loader: IndexedLoader

    def __getitem__(self, chunk: Chunk) -> Read:
        (bucket, indices), result = chunk, ReadResult()
        tried = {index: self.loader.read_example(result, index, bucket) for index in indices}
        examples = {index: example for index, example in tried.items() if example is not None}
        if examples:
            result.batch = collate(list(examples.values()))
        captions = [self.loader.plain_caption(index) for index in examples]
        return Read(list(examples), captions, [self.loader.read_mask(index, bucket) for index in examples], result)


@dataclass
class _CacheWriter:
    folder: Path
    options: CacheConfig
    manifest: CacheManifest
    loader: IndexedLoader
    encoders: dict[str, Any]  # functions of images [B, 3, H, W] in [0, 1], or for "text" of tokens
    tokenizer: CaptionTokenizer
    budget: ErrorBudget

    def prepare(self) -> None:
        """Writes the manifest. ValueError if the folder contains other shards, or a cache with another manifest."""
        if (self.folder / MANIFEST).exists():
            before = asdict(read_manifest(self.folder))
            if other := [name for name, value in asdict(self.manifest).items() if before[name] != value]:
                raise ValueError(
                    f"{self.folder} is a cache with other {', '.join(other)}: restore these, or change [cache] output"
                )
        elif any(self.folder.glob("*.tar")):
            raise ValueError(f"{self.folder} contains shards that are no cache: change [cache] output")
        if "text" in self.encoders:
            content = save({"text": self.encoders["text"](self.tokenizer([""]))[0].to(DTYPES[self.options.dtype])})
            replace_file(self.folder / EMPTY_TEXT, lambda draft: draft.write_bytes(content))
        text = json.dumps(asdict(self.manifest), indent=1) + "\n"
        write_text(self.folder / MANIFEST, text)

    def write_shards(self, accelerator: Accelerator) -> None:
        """Writes the missing shards of this process."""
        digits = max(5, len(str(self.manifest.shards - 1)))
        mine = islice(enumerate(self._chunks()), accelerator.process_index, None, accelerator.num_processes)
        shards = {self.folder / f"{number:0{digits}d}.tar": chunks for number, chunks in mine}
        missing = {path: chunks for path, chunks in shards.items() if not path.exists()}
        total, to_do = (
            sum(len(indices) for chunks in part.values() for _, indices in chunks) for part in (shards, missing)
        )
        order = [chunk for chunks in missing.values() for chunk in chunks]
        results = self.loader.results(_ChunkReader(self.loader), order)
        hidden = not accelerator.is_main_process
        with tqdm(total=total, initial=total - to_do, desc="cache", mininterval=2, disable=hidden) as progress:
            for path, chunks in missing.items():
                replace_file(path, partial(self._write_shard, islice(results, len(chunks)), progress))
        log.info(
            "%d images cached in %s, %d bad ones skipped, %d there already",
            self.budget.read - self.budget.failed, self.folder, self.budget.failed, total - to_do,
        )  # fmt: skip
        if self.tokenizer.long:
            log.info("%s", self.tokenizer.note())

    def _chunks(self) -> Iterator[list[Chunk]]:
        """Yields the forward passes of each shard."""
        buckets, size = np.full(len(self.loader.source), -1), self.options.batch
        for bucket, members in enumerate(self.loader.order.members):
            buckets[members] = bucket
        selected = np.flatnonzero(buckets >= 0)
        for start in range(0, len(selected), self.options.shard):
            members = selected[start : start + self.options.shard]
            grouped = [(bucket, members[buckets[members] == bucket]) for bucket in np.unique(buckets[members]).tolist()]
            yield [(bucket, part[i : i + size].tolist()) for bucket, part in grouped for i in range(0, len(part), size)]

    def _write_shard(self, results: Iterator[Read], progress: tqdm[Any], draft: Path) -> None:
        with tarfile.open(draft, "w") as tar:
            for read in results:
                self.budget.add(read.result.read, read.result.bad)
                if read.result.batch is not None:
                    self._add_examples(tar, read, read.result.batch)
                progress.update(read.result.read)

    def _add_examples(self, tar: tarfile.TarFile, read: Read, batch: Batch) -> None:
        """Computes the tensors of a batch and adds its examples, named by their image indices, to a shard."""
        images, dtype, tensors = batch.images.float() / 255, self.options.dtype, dict[str, Any]()
        tokens = self.tokenizer(batch.captions) if "text" in self.encoders else []
        for name, encode in self.encoders.items():
            tensors[name] = encode(tokens if name == "text" else images)
            if self.manifest.mirrored and name in MIRRORED:
                tensors[MIRRORED[name]] = encode(images.flip(-1))
        for name, several in tensors.items():
            tensors[name] = [x.to(DTYPES[dtype]) for x in several]
            if not all(x.isfinite().all() for x in tensors[name]):
                raise ValueError(f"{name} are not finite in {dtype}: choose another [cache] dtype")
        for i, (index, picture) in enumerate(zip(read.indices, to_pictures(images), strict=True)):
            own = {name: x[i] for name, x in tensors.items()}
            source = self.loader.source
            record, origin = source.records[index], int(source.origins[index])
            files = example_files(read.captions[i], record, origin, picture.size, own)
            if self.options.pictures:
                files["png"] = _png(picture)
            if (mask := read.masks[i]) is not None:
                files["mask.png"] = _png(mask)
            for suffix, content in files.items():
                add_member(tar, f"{index:09d}.{suffix}", content)


def _png(image: Image.Image) -> bytes:
    image.save(file := BytesIO(), "PNG")
    return file.getvalue()
