"""Opens the dataset that a `[data]` table describes: image files, a cache of latents, or the demo's scenes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...common.dataclass_config import from_table
from ...common.text import listed
from ..rng import StepRandom
from ..stages.networks import weights_fingerprint
from .buckets import most_square
from .caption_tokens import CUT, CaptionTokenizer, Tokens, pad_states
from .dataset import Compute, ImageDataset, IndexedDataset, InMemoryDataset, identity
from .demo import DemoDataConfig, DemoDataset, MultiShapeDemoDataset
from .filters import ImageDataConfig
from .held_out import NO_VALIDATION, ValidationConfig
from .latent_cache import read_empty_text
from .loading import Batch, BatchLoader, IndexedLoader, ReadResult, collate
from .open import caption_edits, check_cached_captions, configured_cache, open_loader
from .sources import has_pictures
from .streams import STREAM

log = logging.getLogger(__name__)

PREVIEWS = 24  # images for sample grids


class FileDataset(ImageDataset):
    """Images from the sources of a `[data]` table; tensors are computed batch by batch, or read from a cache."""

    def __init__(
        self, data: Mapping[str, Any], captions: bool = True, fingerprint_of: Callable[[str], str] = str,
        validation: ValidationConfig = NO_VALIDATION,
    ):  # fmt: skip
        """`captions`: False if captions are not needed. `fingerprint_of` maps "latents", "features" or "text" to the
        fingerprint of this run's network that computes them."""
        self.validation = validation
        self.config, self._captions = from_table(ImageDataConfig, data, "data"), captions
        self.side = min(min(size) for size in self.config.sizes)
        self.size = most_square(self.config.sizes)
        self.square = set(self.config.sizes) == {(self.side, self.side)}
        self.weighted = any(part.weight != 1 for part in self.config.parts)
        self.masked = any(own.mask for own in self.config.examples)
        self.cache, self._fingerprint_of = configured_cache(self.config), fingerprint_of
        self.tokenizer = CaptionTokenizer(self.config.long_captions == CUT)
        words = (own.trigger_word.strip() for own in self.config.examples)
        self.trigger_words = list(dict.fromkeys(filter(None, words)))
        self._loader: BatchLoader | None = None  # until `start_reading`
        self._cached: set[str] = set()  # names of the tensors that are read from the cache
        self._hints = False  # True if hint pictures beside the images are read
        self._computed: set[str] = set()  # names of those that are computed from images

    def start_reading(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        images = bool(self._computed) or not self._cached  # a stage that maps nothing trains on the images
        if self.cache is not None:
            folder, manifest = self.cache
            if images and not manifest.pictures:
                purpose = f" to compute {', '.join(sorted(self._computed))}" if self._computed else ""
                raise ValueError(
                    f"the cache {folder} has no images, which this stage needs{purpose}: name the images as [data] "
                    "source, or make a cache that has what this stage needs"
                )
            if (found := len(list(folder.glob("*.tar")))) < manifest.shards:
                log.warning("%s has %d of %d shards: `train cache` adds the rest", folder, found, manifest.shards)
        self._loader = open_loader(
            self.config, batch=batch, seed=seed, cache=cache, rank=rank, world=world, images=images,
            captions=self._captions and "text" not in self._cached, cached=tuple(sorted(self._cached)),
            validation=self.validation, hints=self._hints,
        )  # fmt: skip
        if isinstance(self._loader, IndexedLoader):
            self.held_out = sum(map(len, self._loader.held_out))
            self.examples = self._loader.order.images
            lines = self._loader.source.records["line"]
            self.pictures = sum(int((lines[members] == 0).sum()) for members in self._loader.order.members)
        self.fingerprint = self._loader.fingerprint()
        if fingerprint and fingerprint != self.fingerprint:
            log.warning("the images or the way they are read have changed: this run does not resume exactly")
            if STREAM in (fingerprint, self.fingerprint):  # the position in a stream counts shards, else batches
                position = 0
        self.position, self._batches = position, self._loader.batches(position)

    def sample_batch(self, rng: StepRandom) -> Batch:
        batch = next(self._batches)
        self.position = batch.next
        return batch

    def held_out_batches(self, size: int) -> Iterator[tuple[int, Batch, int]]:
        reader, first = self._loader, 0
        result, found = ReadResult(), 0
        assert isinstance(reader, IndexedLoader)
        for bucket, members in enumerate(reader.held_out):
            for start in range(0, len(members), size):
                indices = members[start : start + size].tolist()
                examples = [reader.read_example(result, index, bucket) for index in indices]
                if readable := [example for example in examples if example is not None]:
                    batch = collate([example._replace(weight=1.0) for example in readable])  # comparable losses
                    yield first, batch, len(readable)
                first, found = first + len(indices), found + len(readable)
        if not found:
            names = listed(list(result.bad))
            raise ValueError(f"[validation] no held-out picture can be read ({names}): replace them")

    def captions(self, batch: Batch, rng: StepRandom, drop: float = 0.0) -> list[str]:
        return ["" if empty else text for empty, text in zip(rng.uniform() < drop, batch.captions, strict=True)]

    def images(self, batch: Batch) -> Tensor:
        return batch.images.float() / 255

    def loss_weights(self, batch: Batch) -> Tensor | None:
        weights = batch.weights[:, None, None, None] if self.weighted else None
        if batch.pixel_weights is None:
            return weights
        masks = batch.pixel_weights[:, None]
        return masks if weights is None else masks * weights

    def read_images(self, purpose: str, given_hints: bool = False) -> None:
        if given_hints and self.cache is not None:
            raise ValueError('[control] hints = "given" are not in a latent cache: name the folder of images as source')
        self._computed.add(purpose)
        self._hints = given_hints

    def given_hints(self, batch: Batch) -> Tensor:
        assert batch.hints is not None
        return batch.hints.float() / 255

    def must_compute(self, name: str) -> bool:
        """True unless the cache has these tensors. ValueError if they were computed by another network."""
        if self.cache is None or name not in self.cache.manifest.networks:
            return True
        if self.cache.manifest.networks[name] != self._fingerprint_of(name):
            raise ValueError(
                f"the {name} in {self.cache.folder} were computed by another network than this run's: name that "
                "network under [inputs], or make a new cache with `train cache`"
            )
        return False

    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Batch], Tensor]:
        if self.must_compute(name):
            self._computed.add(name)
            return lambda batch: derive(compute(self.images(batch)))
        self._cached.add(name)
        return lambda batch: derive(batch.cached[name].float())

    def map_captions(
        self, compute: Callable[[list[Tokens]], list[Tensor]]
    ) -> Callable[[Batch, StepRandom, float], tuple[Tensor, Tensor | None]]:
        if self.cache is None or self.must_compute("text"):
            return super().map_captions(compute)
        check_cached_captions(self.config)
        if caption_edits(self.config) != self.cache.manifest.edits:
            raise ValueError(
                f"the text in {self.cache.folder} is of captions with another prefix, suffix or trigger word: restore "
                "them in [data], or make a new cache"
            )
        self._cached.add("text")
        empty_text = read_empty_text(self.cache.folder)
        if not self.tokenizer.cut and self.cache.manifest.long_captions == CUT:
            log.info("captions in %s are cut after 75 tokens: make a new cache to read longer ones", self.cache.folder)

        def cached(batch: Batch, rng: StepRandom, drop: float) -> tuple[Tensor, Tensor | None]:
            dropped, masks = rng.uniform() < drop, batch.cached.get("text_mask")
            rows = [
                empty_text if empty else states[: len(empty_text) if self.tokenizer.cut else None]
                for states, empty in zip(_unpad(batch.cached["text"].float(), masks), dropped.tolist(), strict=True)
            ]
            return pad_states(rows)

        return cached

    def first_captions(self, count: int) -> list[tuple[str, str]]:
        if not self._captions or not isinstance(self._loader, IndexedLoader):
            return []
        found = islice(self._loader.captions_from(self.position), count)
        return [(name, self.tokenizer.prompt(caption)) for name, caption in found]

    def preview_images(self) -> IndexedDataset | None:
        """Returns the first images of the fullest bucket, which are trained on too, without those of regularisation
        sets; None for streams and for a cache without images."""
        if not isinstance(self._loader, IndexedLoader) or self.missing_previews():
            return None
        regular = np.array([part.regularisation for part in self.config.parts])[self._loader.source.origins]
        members = [part[~regular[part]] for part in self._loader.order.members]
        reader = replace(self._loader, captions=self._captions, images=True, cached=())
        bucket = max(range(len(members)), key=lambda i: len(members[i]))
        examples = (reader.read_example(ReadResult(), index, bucket) for index in members[bucket].tolist())
        readable = list(islice(filter(None, examples), PREVIEWS))
        if not readable:  # then reading batches will say why
            return None
        batch = collate(readable)
        return InMemoryDataset(batch.images, batch.captions, batch.hints)

    def missing_previews(self) -> str:
        if not isinstance(self._loader, IndexedLoader):
            return "a folder or shards on this machine as [data] source, not a stream"
        if self.cache and not self.cache.manifest.pictures:
            return "the pictures in the cache: make it with pictures = true under [cache]"
        return ""


def _unpad(states: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Returns the sequences that `pad_states` padded."""
    lengths = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
    return [x[:length] for x, length in zip(states, lengths, strict=True)]


def open_dataset(config: Mapping[str, Any], captions: bool = True, text_part: str = "") -> ImageDataset:
    """Returns the dataset of a configuration: the source in its `[data]` table, or the demo's scenes if it has none.

    `captions`: False if the stage needs none. `text_part`: the bundle's part with the text encoder that reads them.
    """
    data = config.get("data", {})
    validation = from_table(ValidationConfig, config.get("validation", {}), "validation")
    if has_pictures(data):
        fingerprint_of = cache(partial(weights_fingerprint, config, text_part=text_part))
        return FileDataset(data, captions, fingerprint_of, validation)
    if validation.fraction:
        raise ValueError("[validation] needs pictures to hold out: name them as source under [data], or remove it")
    scenes = from_table(DemoDataConfig, data, "data")
    several = len(scenes.shapes) > 1 or scenes.larger or scenes.scattered
    return MultiShapeDemoDataset(data) if several else DemoDataset(data)
