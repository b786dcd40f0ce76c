"""The `[data]` table of a run on image files: it filters images, assigns them to buckets and crops them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...common.dataclass_config import Fraction, OneOf, Range, option
from ...common.geometry import LARGEST, check_size
from .buckets import Size, bucket_sizes, nearest_buckets
from .caption_tokens import CUT, WHOLE
from .draws import Key
from .examples import ExampleConfig
from .sources import SourceConfig, SourceOptions

AtLeastOne = Annotated[float, Range(least=1)]
Side = Annotated[int | None, Range(least=1)]
Probability = Annotated[float | None, Range(least=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class PictureConfig(SourceOptions):
    """Which pictures of `[data]` are read, and at which sizes.

    The filters, at the end, are off by default; their meanings end with the original's values. An image without a score
    fails that score's filter, as in the original. Sizes are the files' own; the original took them from LAION's table.
    """

    source: str | tuple[str, ...] = option(
        "",
        "folders of images; shards (.tar files, folders of them, or streams: https://, hf://, s3:// and others); "
        "Parquet files, a folder of save_to_disk, or datasets:NAME of the Hugging Face Hub; {000..127} expands",
    )
    sources: tuple[SourceConfig, ...] = option(
        (), "instead of source: an array of tables, for sources with repeats and weights of their own"
    )
    size: int = option(1024, "side of a square in pixels; no bucket has more pixels than that square")
    ratio: AtLeastOne = option(1.0, "largest aspect ratio of the buckets; 1: squares only, as in the original")
    multiple: int = option(128, "of which all sides are multiples, in pixels: 64, or better 128")
    buckets: tuple[Size, ...] = option((), "[width, height] of each bucket, instead of size, ratio and multiple")
    enlarge: AtLeastOne = option(1.0, "largest upscaling factor; smaller images are rejected")
    crop: Annotated[str, OneOf(("centre", "random"))] = option("centre", "centre or random (as in the original)")
    long_captions: Annotated[str, OneOf((WHOLE, CUT))] = option(
        WHOLE, "captions of more than 75 tokens: whole, in pieces of 75, or cut after the first 75"
    )
    workers: Annotated[int | None, Range(least=0)] = option(
        None, "reading processes; 0: the training process reads; default: 4, or for files here fewer on fewer cores"
    )
    bad_share: Fraction = option(0.05, "fraction of images, and of shards, that may be unreadable before the run stops")
    allow_pipe: bool = option(False, "allow `pipe:` sources to run their command")
    min_side: Side = option(None, "least pixels of the shorter side (the original: 512)")
    max_side: Side = option(None, "most pixels of the longer side (4096)")
    max_watermark: Probability = option(None, "largest probability of a watermark, pwatermark (0.5)")
    min_aesthetic: float | None = option(None, "least aesthetic score, 1 to 10: AESTHETIC_SCORE, aesthetic (5.0)")
    max_unsafe: Probability = option(None, "largest probability of being unsafe, punsafe (0.99)")

    def __post_init__(self) -> None:
        for part in self.parts:
            if not part.source or not all([part.source] if isinstance(part.source, str) else part.source):
                raise ValueError("[data] source is empty: give a folder of images, or shards")
        if all(part.regularisation for part in self.parts):
            action = "move the source of [data] into" if self.source else "add the source to learn from as"
            raise ValueError(f"[[data.sources]] are all regularisation sets: {action} a table of its own")
        if self.multiple < 64 or self.multiple % 64:
            raise ValueError(f"[data] multiple must be a multiple of 64, got {self.multiple}")
        if not self.multiple <= self.size <= LARGEST or self.size % self.multiple:
            raise ValueError(f"[data] size must be a multiple of {self.multiple} up to {LARGEST}, got {self.size}")
        for width, height in self.buckets:
            check_size(width, height)

    @cached_property
    def parts(self) -> tuple[SourceConfig, ...]:
        """The sources with all their keys; `source` is one. A cache as `source` is of all `sources`."""
        parts = self.sources or (SourceConfig(source=self.source),)
        return tuple(part.with_defaults(self) for part in parts)

    @property
    def names(self) -> list[str]:
        """The sources, with {000..127} and {a,b} expanded."""
        parts = [SourceConfig(source=self.source)] if self.source else self.parts
        return [name for part in parts for name in part.names]

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of each bucket."""
        return tuple(dict.fromkeys(self.buckets)) or bucket_sizes(self.size, self.ratio, self.multiple)

    def select(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns why each image is rejected ("" if it is used) and the bucket index of each, both [N]."""
        shorter = np.minimum(records["width"], records["height"])
        longer = np.maximum(records["width"], records["height"])
        tests = [(shorter < (self.min_side or 0), "too small"), (longer > (self.max_side or np.inf), "too large")]
        for score, limit, sign, reason in (
            ("watermark", self.max_watermark, 1, "with a watermark"),
            ("aesthetic", self.min_aesthetic, -1, "of low aesthetic score"),
            ("unsafe", self.max_unsafe, 1, "unsafe"),
        ):
            if limit is not None:
                tests.append((np.isnan(records[score]), f"without {score} score"))
                tests.append((sign * records[score] > sign * limit, reason))
        if "wide" in (records.dtype.names or ()):  # of a cache: its images are cropped already
            match = [(records["wide"] == wide) & (records["high"] == high) for wide, high in self.sizes]
            buckets = np.where(np.any(match, 0), np.argmax(match, 0), -1)
            tests.append((buckets < 0, "cached in other sizes"))
        else:
            buckets = nearest_buckets(records, self.sizes, self.enlarge)
            tests.append((buckets < 0, "smaller than every bucket"))
        failed, reasons = zip(*tests, strict=True)
        return np.select(failed, reasons, ""), buckets  # the first reason counts

    def crop_image(self, image: Image.Image, bucket: int, *key: int) -> Tensor:
        """Scales an RGB image to cover its bucket's size and crops it; returns [3, H, W] uint8.

        The position of a random crop depends on `key`; without one the crop is centred.
        """
        fitted = self._fit(image, Image.Resampling.LANCZOS, bucket, key)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()

    def crop_mask(self, mask: Image.Image, bucket: int, *key: int) -> Image.Image:
        """Scales and crops a grey mask as `crop_image` does with its image."""
        return self._fit(mask, Image.Resampling.BOX, bucket, key)

    def _fit(self, image: Image.Image, resample: Image.Resampling, bucket: int, key: Key) -> Image.Image:
        x, y = (0.5, 0.5) if self.crop == "centre" or not key else np.random.default_rng(key).random(2).tolist()
        return ImageOps.fit(image, self.sizes[bucket], resample, centering=(x, y))


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(ExampleConfig, PictureConfig):
    """The `[data]` table of a run on image files."""

    def __post_init__(self) -> None:
        ExampleConfig.__post_init__(self)
        PictureConfig.__post_init__(self)
        assert len(self.examples) == len(self.parts)

    @cached_property
    def examples(self) -> tuple[ExampleConfig, ...]:
        """What is done with the examples of each of `parts`. ValueError if a table has keys without effect."""
        return tuple(part.examples for part in self.parts)


def rejected(reasons: Counter[str]) -> str:
    """Returns the numbers of rejected images by reason, such as "12 too small, 3 unsafe"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason) or "nothing"
