"""What is left out of the pictures, which bucket the others go into, and the table that says so."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.buckets import bucket_sizes, fit, nearest_buckets
from wuerstchen_core.training.data.filters import Choice, Filters, left_out
from wuerstchen_core.training.data.open import ImageDataConfig
from wuerstchen_core.training.data.source import ENTRY, entry

ORIGINAL = Filters(min_side=512, max_side=4096, max_watermark=0.5, min_aesthetic=5.0, max_unsafe=0.99)
GOOD = {"watermark": 0.1, "aesthetic": 6.0, "unsafe": 0.1}


def entries(*rows: tuple[int, int, dict[str, float]]) -> np.ndarray:
    return np.array([entry((width, height), scores) for width, height, scores in rows], dtype=ENTRY)


def sized(*sizes: tuple[int, int]) -> np.ndarray:
    return entries(*((width, height, {}) for width, height in sizes))


@pytest.mark.parametrize(
    ("width", "height", "scores", "reason"),
    [
        (512, 4096, GOOD, ""),
        (512, 512, {"watermark": 0.5, "aesthetic": 5.0, "unsafe": 0.99}, ""),
        (512, 512, {"watermark": 0.0, "aesthetic": 10.0, "unsafe": 0.0}, ""),
        (511, 4000, GOOD, "too small"),
        (600, 4097, GOOD, "too large"),
        (600, 600, GOOD | {"watermark": 0.501}, "with a watermark"),
        (600, 600, GOOD | {"aesthetic": 4.99}, "of low aesthetic score"),
        (600, 600, GOOD | {"unsafe": 0.991}, "unsafe"),
        (600, 600, GOOD | {"unsafe": math.nan}, "without unsafe score"),
        (600, 600, {}, "without watermark score"),
    ],
)
def test_the_filters_of_the_original(width: int, height: int, scores: dict[str, float], reason: str) -> None:
    rows = entries((width, height, scores), (600, 600, GOOD))
    assert ORIGINAL.reasons(rows).tolist() == [reason, ""]
    assert Filters().reasons(rows).tolist() == ["", ""]  # off until they are given


def test_each_is_counted_under_one_reason() -> None:
    rows = entries((5, 9000, {}), (5, 600, GOOD), (600, 600, GOOD | {"unsafe": 1.0}), (600, 600, GOOD))
    counts = Counter(ORIGINAL.reasons(rows).tolist())
    assert counts.total() == 4 and left_out(counts) == "2 too small, 1 unsafe"


def test_buckets_hold_the_area_and_the_ratio() -> None:
    for side, ratio, multiple in ((1024, 2.0, 128), (1536, 1.5, 128), (512, 3.0, 64), (2048, 2.0, 128)):
        sizes = bucket_sizes(side, ratio, multiple)
        assert (side, side) in sizes and len(sizes) > 2 and len(set(sizes)) == len(sizes)
        for width, height in sizes:
            assert (height, width) in sizes and width % multiple == height % multiple == 0
            assert max(width, height) <= min(ratio * min(width, height), 2048)
            assert side**2 / 2 <= width * height <= side**2
    assert bucket_sizes(1024, 1.0, 128) == ((1024, 1024),)
    assert bucket_sizes(1024, 1.7, 128) == ((768, 1280), (896, 1152), (1024, 1024), (1152, 896), (1280, 768))


def test_a_picture_goes_where_its_shape_is() -> None:
    buckets = ((64, 128), (64, 64), (128, 64), (128, 128))
    rows = sized((100, 200), (90, 128), (91, 128), (64, 64), (127, 300), (128, 128), (1000, 1010), (500, 63), (63, 500))
    # Of like shapes the largest that the picture covers; nearness is that of log aspect: 90.5 lies between 64 and 128.
    assert nearest_buckets(rows, buckets, 1.0).tolist() == [0, 0, 1, 1, 0, 3, 3, -1, -1]
    assert nearest_buckets(sized((500, 63), (32, 32), (96, 96)), buckets, 1.34).tolist() == [2, -1, 3]
    choice = Choice(Filters(min_side=80), buckets)
    reasons, _ = choice.of(sized((81, 127), (81, 60), (127, 100)))
    assert reasons.tolist() == ["", "too small", ""]
    assert Choice(Filters(), ((128, 128),)).of(sized((127, 200)))[0].tolist() == ["smaller than every bucket"]


def test_a_picture_is_covered_and_cropped() -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (0, 0, 20, 40))
    assert fit(picture, (64, 64)).shape == (3, 64, 64) and fit(picture, (32, 64)).shape == (3, 64, 32)
    red, blue = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
    for centre, left in ((0.0, blue), (0.5, red), (1.0, red)):
        fitted = fit(picture, (64, 64), (centre, 0.5))
        assert fitted.dtype == torch.uint8 and fitted.is_contiguous()
        assert torch.equal(fitted[:, 32, 4], left) and torch.equal(fitted[:, 32, 60], red)


def config(**values: Any) -> ImageDataConfig:
    return from_table(ImageDataConfig, {"source": "pictures", **values}, "data")


def test_the_table() -> None:
    plain = config()
    assert plain.sources == ("pictures",) and plain.sizes == ((1024, 1024),) and plain.min_side is None
    assert config(source=["a", "b"]).sources == ("a", "b")
    given = config(buckets=[[64, 128], [64, 128], [192, 64]], min_side=3, max_watermark=1, bad_share=0.5)
    assert given.sizes == ((64, 128), (192, 64)) and (given.min_side, given.max_watermark) == (3, 1)
    assert config(size=512, ratio=1.6).sizes == bucket_sizes(512, 1.6, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 3}, "source must be a text or a list of texts, got 3"),
        ({"source": [1]}, "source must be a text or a list of texts, got (1,)"),
        ({"source": []}, "source names nothing"),
        ({"source": ""}, "source names nothing"),
        ({"min_side": "x"}, "min_side must be a whole number, got 'x'"),
        ({"min_side": 0}, "min_side must be at least 1 pixel, got 0"),
        ({"max_unsafe": 1.5}, "max_unsafe is a chance, 0 to 1, got 1.5"),
        ({"size": 1000}, "size must be a multiple of 128 up to 2048, got 1000"),
        ({"size": 4096}, "size must be a multiple of 128 up to 2048, got 4096"),
        ({"multiple": 32}, "multiple must be 64 or a multiple of it, got 32"),
        ({"ratio": 0.5}, "ratio must be at least 1, got 0.5"),
        ({"ratio": math.nan}, "ratio must be at least 1, got nan"),
        ({"enlarge": 0}, "enlarge must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"bad_share": 2}, "bad_share must be 0 to 1, got 2"),
        ({"crop": "left"}, "crop 'left' is unknown: choose centre or random"),
        ({"buckets": [[64, 100]]}, "64x100 pixels cannot be painted"),
        ({"buckets": [[64]]}, "buckets must be a list of lists, got ((64,),)"),
        ({"min_size": 5}, "has no key min_size: it takes min_side, "),
    ],
)
def test_a_mistake_in_the_table(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config(**values)
    assert message in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_source_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^\[data\] lacks source$"):
        from_table(ImageDataConfig, {}, "data")
