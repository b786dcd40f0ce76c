"""Filters, buckets and the `[data]` table."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.buckets import bucket_sizes, nearest_buckets
from wuerstchen_core.training.data.filters import ImageDataConfig, rejected
from wuerstchen_core.training.data.source import RECORD_FIELDS, image_record

SMALL = ImageDataConfig(source="pictures", size=64, multiple=64)
ORIGINAL = replace(SMALL, min_side=512, max_side=4096, max_watermark=0.5, min_aesthetic=5.0, max_unsafe=0.99)
GOOD = {"pwatermark": 0.1, "aesthetic": 6.0, "punsafe": 0.1}


def records(*rows: tuple[int, int, dict[str, float]]) -> np.ndarray:
    return np.array([image_record((width, height), scores, "x") for width, height, scores in rows], dtype=RECORD_FIELDS)


def sized(*sizes: tuple[int, int]) -> np.ndarray:
    return records(*((width, height, {}) for width, height in sizes))


@pytest.mark.parametrize(
    ("width", "height", "scores", "reason"),
    [
        (512, 4096, GOOD, ""),
        (512, 512, {"pwatermark": 0.5, "aesthetic": 5.0, "punsafe": 0.99}, ""),
        (512, 512, {"pwatermark": 0.0, "aesthetic": 10.0, "punsafe": 0.0}, ""),
        (511, 4000, GOOD, "too small"),
        (600, 4097, GOOD, "too large"),
        (600, 600, GOOD | {"pwatermark": 0.501}, "with a watermark"),
        (600, 600, GOOD | {"aesthetic": 4.99}, "of low aesthetic score"),
        (600, 600, GOOD | {"punsafe": 0.991}, "unsafe"),
        (600, 600, GOOD | {"punsafe": math.nan}, "without unsafe score"),
        (600, 600, {}, "without watermark score"),
    ],
)
def test_the_filters_of_the_original(width: int, height: int, scores: dict[str, float], reason: str) -> None:
    rows = records((width, height, scores), (600, 600, GOOD))
    assert ORIGINAL.select(rows)[0].tolist() == [reason, ""]
    assert SMALL.select(rows)[0].tolist() == ["", ""]  # off by default


def test_an_image_is_counted_under_one_reason() -> None:
    rows = records((5, 9000, {}), (5, 600, GOOD), (600, 600, GOOD | {"punsafe": 1.0}), (600, 600, GOOD))
    counts = Counter(ORIGINAL.select(rows)[0].tolist())
    assert counts.total() == 4 and rejected(counts) == "2 too small, 1 unsafe"


def test_buckets_respect_area_and_ratio() -> None:
    for side, ratio, multiple in ((1024, 2.0, 128), (1536, 1.5, 128), (512, 3.0, 64), (2048, 2.0, 128)):
        sizes = bucket_sizes(side, ratio, multiple)
        assert (side, side) in sizes and len(sizes) > 2 and len(set(sizes)) == len(sizes)
        for width, height in sizes:
            assert (height, width) in sizes and width % multiple == height % multiple == 0
            assert max(width, height) <= min(ratio * min(width, height), 2048)
            assert side**2 / 2 <= width * height <= side**2
    assert bucket_sizes(1024, 1.0, 128) == ((1024, 1024),)
    assert bucket_sizes(1024, 1.7, 128) == ((768, 1280), (896, 1152), (1024, 1024), (1152, 896), (1280, 768))


def test_images_go_to_the_bucket_of_the_nearest_shape() -> None:
    buckets = ((64, 128), (64, 64), (128, 64), (128, 128))
    rows = sized((100, 200), (90, 128), (91, 128), (64, 64), (127, 300), (128, 128), (1000, 1010), (500, 63), (63, 500))
    # Of equal shapes the largest that the image covers. Distance is in log aspect: 90.5 is halfway from 64 to 128.
    assert nearest_buckets(rows, buckets, 1.0).tolist() == [0, 0, 1, 1, 0, 3, 3, -1, -1]
    assert nearest_buckets(sized((500, 63), (32, 32), (96, 96)), buckets, 1.34).tolist() == [2, -1, 3]
    reasons, chosen = config(buckets=buckets, min_side=80).select(sized((81, 127), (81, 60), (127, 100)))
    assert reasons.tolist() == ["", "too small", ""] and chosen[[0, 2]].tolist() == [1, 1]
    assert config(size=128).select(sized((127, 200)))[0].tolist() == ["smaller than every bucket"]


def test_images_are_scaled_and_cropped() -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (0, 0, 20, 40))
    centred, anywhere = (config(buckets=[[64, 64], [64, 128]], crop=crop) for crop in ("centre", "random"))
    assert [centred.crop_image(picture, bucket).shape for bucket in (0, 1)] == [(3, 64, 64), (3, 128, 64)]
    lefts = []
    for cropped in (centred.crop_image(picture, 0), *(anywhere.crop_image(picture, 0, key) for key in range(8))):
        assert cropped.dtype == torch.uint8 and cropped.is_contiguous()
        assert cropped[:, 32, 60].tolist() == [255, 0, 0]
        lefts.append(cropped[2, 32].gt(127).sum().item())  # blue columns, of 32 in the scaled picture
    positions = [np.random.default_rng((key,)).random(2)[0] for key in range(8)]
    expected = [max(0.0, 32 - 64 * x) for x in (0.5, *positions)]
    assert lefts == pytest.approx(expected, abs=1.5) and lefts[0] == 0 < max(lefts)


def config(**values: Any) -> ImageDataConfig:
    return from_table(ImageDataConfig, {"source": "pictures", **values}, "data")


def test_names_sizes_and_filters_of_a_table() -> None:
    plain = config()
    assert plain.names == ["pictures"] and plain.sizes == ((1024, 1024),) and plain.min_side is None
    assert config(source=["a", "b{0..1}"]).names == ["a", "b0", "b1"]
    explicit = config(buckets=[[64, 128], [64, 128], [192, 64]], min_side=3, max_watermark=1, bad_share=0.5)
    assert explicit.sizes == ((64, 128), (192, 64)) and (explicit.min_side, explicit.max_watermark) == (3, 1)
    assert config(size=512, ratio=1.6).sizes == bucket_sizes(512, 1.6, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 3}, "source .*3"),
        ({"source": [1]}, r"source .*\[1\]"),
        ({"source": []}, "source .*empty"),
        ({"source": ""}, "source .*empty"),
        ({"min_side": "x"}, "min_side .*'x'"),
        ({"min_side": 0}, "min_side .*1, got 0"),
        ({"max_unsafe": 1.5}, "max_unsafe .*1, got 1.5"),
        ({"size": 1000}, "size .*128 .*2048, got 1000"),
        ({"size": 4096}, "size .*128 .*2048, got 4096"),
        ({"multiple": 32}, "multiple .*64, got 32"),
        ({"ratio": 0.5}, "ratio .*1, got 0.5"),
        ({"ratio": math.nan}, "ratio .*1, got nan"),
        ({"enlarge": 0}, "enlarge .*1, got 0"),
        ({"workers": -1}, "workers .*0, got -1"),
        ({"bad_share": 2}, "bad_share .*1, got 2"),
        ({"crop": "left"}, "crop .*centre, random, got 'left'"),
        ({"buckets": [[64, 100]]}, "64x100"),
        ({"buckets": [[64]]}, r"buckets .*\[\[64\]\]"),
        ({"min_size": 5}, r"min_size\b.*min_side"),
    ],
)
def test_a_mistake_in_the_table(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config(**values)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_source_is_required() -> None:
    with pytest.raises(ValueError, match=r"\[data\] .*source"):
        from_table(ImageDataConfig, {}, "data")
