"""The demo's judge: sure of true pictures, not fooled by others, by blobs or by nothing."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from wuerstchen_core.demo.judge import NOTHING, Judge, psnr, wilson_interval
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene

PLACES = ((0, 0), (3, 1))  # backgrounds and sizes


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    return Judge()


@pytest.fixture(scope="module")
def pictures(judge):
    """Every third thing, large on one background and small on another."""
    from wuerstchen_core.demo.artwork import draw_all

    asked = [Scene(thing, colour, size) for thing in range(0, len(THINGS), 3) for colour, size in PLACES]
    return list(zip(asked, draw_all(asked), strict=True))


def blurred(picture, sigma):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def soft_and_compressed(picture):
    stream = io.BytesIO()
    Image.fromarray(blurred(picture, 1.5)).save(stream, "JPEG", quality=20)
    return np.asarray(Image.open(stream).convert("RGB"))


def share_right(judge, pictures, change):
    right = [judge.identify(change(picture), scene.colour, scene.size) == scene.thing for scene, picture in pictures]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture,
        soft_and_compressed,
        lambda picture: np.roll(picture, (5, -7), (0, 1)),
    ],
    ids=["true", "soft and compressed", "shifted"],
)
def test_true_pictures_are_recognised(judge, pictures, change):
    assert share_right(judge, pictures, change) >= 0.99


def test_a_picture_of_another_thing_is_not_accepted(judge, pictures):
    rng = np.random.default_rng(0)
    others = rng.integers(len(THINGS), size=len(pictures))
    swapped = [
        (scene._replace(thing=int(other)), picture) for (scene, picture), other in zip(pictures, others, strict=True)
    ]
    assert share_right(judge, swapped, lambda picture: picture) <= 0.05


def test_blobs_are_rejected(judge, pictures):
    assert share_right(judge, pictures, lambda picture: blurred(picture, 12)) <= 0.05


def test_another_size_and_a_bare_background_are_rejected(judge, pictures):
    other_size = [(scene._replace(size=1 - scene.size), picture) for scene, picture in pictures]
    assert share_right(judge, other_size, lambda picture: picture) <= 0.05
    for colour, size in PLACES:
        bare = np.full((256, 256, 3), list(COLOURS.values())[colour], dtype=np.uint8)
        assert judge.identify(bare, colour, size) == NOTHING


def test_ranks_begin_with_the_true_thing(judge, pictures):
    scene, picture = pictures[10]
    ranks = judge.thing_ranks(picture, scene.colour, scene.size)
    assert ranks[0] == scene.thing
    assert sorted(ranks) == list(range(len(THINGS)))


def test_backgrounds_are_told_apart(judge, pictures):
    assert all(judge.background(picture) == scene.colour for scene, picture in pictures)
    noise = np.random.default_rng(0).normal(0, 12, (256, 256, 3))
    for index, colour in enumerate(COLOURS.values()):
        assert judge.background(np.clip(colour + noise, 0, 255).astype(np.uint8)) == index


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (0, 255, 255), (90, 60, 30)])
def test_a_foreign_background_is_rejected(colour):
    assert Judge().background(np.full((256, 256, 3), colour, dtype=np.uint8)) == NOTHING


def test_a_background_of_two_colours_is_rejected():
    picture = np.full((256, 256, 3), COLOURS["red"], dtype=np.uint8)
    picture[:, 128:] = COLOURS["blue"]
    assert Judge().background(picture) == NOTHING


def test_bad_input_is_named():
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="multiple of 64 pixels, got 100"):
        Judge(canvas=100)
    with pytest.raises(ValueError, match=r"\[256, 256, 3\], got uint8 \(128, 128, 3\)"):
        Judge().background(picture)
    with pytest.raises(ValueError, match="no background 8"):
        Judge(canvas=128).identify(picture, 8, 0)
    with pytest.raises(ValueError, match="of one shape"):
        psnr(picture, picture[:64])
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_psnr():
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)
