"""Pictures and masks as tensors."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_data import assert_near
from helpers.image_files import noise, png
from PIL import Image
from torchvision import transforms

from wuerstchen_core.inference.images import (
    legal_size,
    open_mask,
    pad_to_legal,
    read_batch,
    read_extended,
    read_masked,
    read_pixels,
    to_pictures,
    to_pixels,
)
from wuerstchen_core.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD, semantic_view


@pytest.mark.parametrize(
    ("own", "legal"),
    [
        ((256, 256), (256, 256)), ((250, 300), (256, 320)), ((4096, 1024), (2048, 512)), ((30, 100), (64, 128)),
        ((1, 1), (64, 64)), ((20_000, 1_000), (2048, 128)), ((20_000, 1), (2048, 64)), ((1, 20_000), (64, 2048)),
    ],
)  # fmt: skip
def test_every_size_has_a_legal_one(own: tuple[int, int], legal: tuple[int, int]) -> None:
    assert legal_size(*own) == legal
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuple(read_pixels(Image.new("RGB", own, "red")).shape) == (1, 3, legal[1], legal[0])


def test_a_picture_covers_and_is_cropped_around_its_centre() -> None:
    banner = Image.new("RGB", (300, 100), "red")
    banner.paste("blue", (100, 0, 200, 100))
    blue = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert (read_pixels(banner, 64, 64) - blue).abs().max() < 0.05  # the filter reaches over the edge
    exact = noise(128, 64)
    assert torch.equal(read_pixels(exact), to_pixels(exact)) and to_pictures(to_pixels(exact))[0] == exact


def test_a_batch_has_one_size() -> None:
    assert read_batch([noise(64, 64), noise(60, 70)]).shape == (2, 3, 64, 64)
    assert read_batch([noise(64, 64), noise(128, 64)], 64, 64).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="128x64 and 64x64"):
        read_batch([noise(64, 64), noise(128, 64)])
    with pytest.raises(ValueError, match="no picture"):
        read_batch([])


def test_a_canvas_repeats_its_edges() -> None:
    pixels = torch.rand(1, 3, 70, 64)
    canvas = pad_to_legal(pixels)
    assert canvas.shape == (1, 3, 128, 64) and torch.equal(canvas[..., :70, :], pixels)
    assert torch.equal(canvas[..., 70:, :], pixels[..., -1:, :].expand(1, 3, 58, 64))


# the encoder's view


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (256, 256), (256, 384), (640, 256)])
def test_the_semantic_view_is_the_originals(size: tuple[int, int]) -> None:
    """torchvision's Resize to 3/4 (384 for 512), CenterCrop and Normalize, as the original composes them."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    view = tuple(side * 3 // 4 for side in size)
    original = transforms.Compose(
        [
            transforms.Resize(min(view), interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.CenterCrop(view),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert_near(semantic_view(images), original(images), 1e-5)


# masks


def test_a_mask_of_the_pictures_size() -> None:
    picture, mask = noise(100, 50), Image.new("1", (100, 50))
    mask.paste(1, (10, 10, 20, 20))
    pixels, mask_pixels = read_masked(picture, mask)
    assert pixels.shape == (1, 3, 50, 100) and mask_pixels.shape == (1, 1, 50, 100)
    assert to_pictures(pixels)[0] == picture and mask_pixels.sum() == 100
    with pytest.raises(ValueError, match="50x100 .*100x50"):
        read_masked(picture, Image.new("L", (50, 100), 255))


@pytest.mark.parametrize(
    ("mask", "fact"),
    [
        (Image.new("L", (64, 64)), "empty"),
        (Image.new("L", (64, 64), 3), "empty"),
        (Image.new("L", (64, 64), 252), "covers"),
        (Image.new("1", (64, 64), 1), "whole"),
        (Image.new("RGBA", (64, 64), (9, 9, 9, 0)), "whole"),
        (Image.new("RGBA", (64, 64), "black"), "empty"),
    ],
)
def test_a_mask_of_nothing_or_everything(mask: Image.Image, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        read_masked(noise(64, 64), mask)


def masks_with_a_hole(root: Path) -> dict[str, Image.Image | Path]:
    """Returns pictures of 4x2 pixels of any colours whose left half is transparent, in all forms of transparency."""
    alpha = Image.new("L", (4, 2), 255)
    alpha.paste(0, (0, 0, 2, 2))
    rgba = noise(4, 2)
    rgba.putalpha(alpha)
    grey = Image.merge("LA", (Image.new("L", (4, 2), 255), alpha))
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([255, 255, 255, 10, 20, 30])
    palette.paste(0, (0, 0, 2, 2))
    palette.save(root / "palette.png", transparency=0)
    palette.save(root / "palette.gif", transparency=0)
    rgba.save(root / "colour.webp", lossless=True)
    one = png(4, 2, 16, 0, (b"\0" + struct.pack(">4H", 7, 7, 8, 65535)) * 2, transparent=struct.pack(">H", 7))
    (root / "grey16.png").write_bytes(one)
    files = ("palette.png", "palette.gif", "colour.webp", "grey16.png")
    return {"RGBA": rgba, "LA": grey, **{name: root / name for name in files}}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette.png", "palette.gif", "colour.webp", "grey16.png"])
def test_a_transparent_hole_is_the_mask(tmp_path: Path, kind: str) -> None:
    mask = open_mask(masks_with_a_hole(tmp_path)[kind])
    assert (mask.source, mask.fraction) == ("alpha", 0.5)
    assert np.asarray(mask.image).tolist() == [[255, 255, 0, 0]] * 2


def test_soft_and_opaque_alpha() -> None:
    soft = Image.new("RGBA", (4, 4), "white")
    soft.putalpha(204)
    assert open_mask(soft).image.getpixel((0, 0)) == 51 and open_mask(soft).fraction == pytest.approx(0.2)
    opaque = Image.new("RGBA", (4, 4), "black")
    opaque.paste("white", (0, 0, 1, 4))
    assert (open_mask(opaque).source, open_mask(opaque).fraction) == ("luminance", 0.25)


def test_a_thin_line_of_a_mask_survives_the_scaling_down() -> None:
    picture, mask = Image.new("RGB", (5000, 40)), Image.new("L", (5000, 40))
    mask.paste(255, (2500, 0, 2501, 40))
    pixels, mask_pixels = read_masked(picture, mask)
    assert pixels.shape[-2:] == mask_pixels.shape[-2:] == (16, 2048)
    assert mask_pixels.amax(dim=-1).min() == 1 and mask_pixels.mean() < 0.01


def test_a_strip_keeps_a_row_when_it_is_scaled_down() -> None:
    pixels, _ = read_masked(Image.new("RGB", (5000, 1)), Image.new("L", (5000, 1), 200))
    assert pixels.shape[-2:] == (1, 2048)


def test_a_large_picture_and_its_mask_are_scaled_down_alike() -> None:
    pixels, mask_pixels = read_masked(Image.new("RGB", (4096, 1000), "red"), Image.new("L", (4096, 1000), 99))
    assert pixels.shape == (1, 3, 500, 2048) and mask_pixels.shape == (1, 1, 500, 2048)


def test_borders_are_masked() -> None:
    wide, mask = read_extended(noise(64, 64), 10, 0, 5, 20)
    assert wide.shape == (1, 3, 84, 79) and torch.equal(wide[..., :64, 10:74], to_pixels(noise(64, 64)))
    assert not mask[..., :64, 10:74].any() and mask.sum() == 84 * 79 - 64 * 64


@pytest.mark.parametrize(
    ("borders", "message"),
    [((0, 0, 0, 0), "0, 0, 0 and 0"), ((-1, 5, 0, 0), "-1"), ((0, 0, 2000, 0), "2064x64")],
)
def test_invalid_borders(borders: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_extended(noise(64, 64), *borders)
