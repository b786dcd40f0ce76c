"""Editing with tiny random models of both releases: strengths, masks and fractions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import PROMPT, ROUNDING, make_vivid, pixels
from helpers.golden_data import assert_near
from helpers.tiny_model import write_tiny_bundle
from PIL import Image, ImageOps
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.diffusion.interpolate import slerp
from wuerstchen_core.inference import editing
from wuerstchen_core.models.image_encoder import ImageEncoder
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder

SIZE = (128, 64)  # the tiny model's own


@pytest.fixture(scope="module", params=["v2", "v1"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    pipe = WuerstchenPipeline.load(write_tiny_bundle(path, release=request.param), device="cpu", dtype="fp32")
    make_vivid(pipe)
    return pipe


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC)


def right_half(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


def differ(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return bool(np.abs(pixels(a) - pixels(b)).max() > ROUNDING)


def latents_of(monkeypatch: pytest.MonkeyPatch, edit: Callable[[], Any]) -> list[Tensor]:
    """Returns what Stage B returned during an edit."""
    seen, sample = [], editing.sample_decoder
    monkeypatch.setattr(editing, "sample_decoder", lambda *args, **more: seen.append(sample(*args, **more)) or seen[-1])
    edit()
    monkeypatch.undo()
    return seen


# encode and reconstruct


def test_encode(pipe: WuerstchenPipeline, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "picture.png")
    features = pipe.encode(str(tmp_path / "picture.png"))
    assert tuple(features.shape) == (1, 16, 2, 3) and torch.equal(features, pipe.encode(picture))
    both = pipe.encode([picture, Image.new("RGB", SIZE, "red")])
    assert_near(both[:1], features, 1e-5 * float(features.abs().max()))
    assert not torch.allclose(both[0], both[1], atol=0.1)
    assert tuple(pipe.encode(picture, width=64, height=128).shape) == (1, 16, 3, 2)
    with pytest.raises(ValueError, match="64x64"):
        pipe.encode(picture, width=70, height=64)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 200), (100, 100)])
def test_pictures_of_every_size(pipe: WuerstchenPipeline, size: tuple[int, int]) -> None:
    [image] = pipe.reconstruct(Image.new("RGB", size, "red"), decoder_steps=1)
    assert image.size == {1: (64, 64), 100: (128, 128), 20_000: (2048, 64)}[size[0]]


def test_reconstruct(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    one = pipe.reconstruct(picture, seed=1)
    assert one[0].size == SIZE and not differ(one, pipe.reconstruct(picture, seed=1))
    assert differ(one, pipe.reconstruct(picture, seed=2)) and differ(one, pipe.reconstruct(picture.rotate(180), seed=1))
    batch = pipe.reconstruct([picture, picture], seed=1)
    assert not differ(batch[:1], one) and not differ(batch[1:], pipe.reconstruct(picture, seed=2))
    with pytest.raises(ValueError, match="0 .*steps"):
        pipe.reconstruct(picture, decoder_steps=0)


# variations


def test_the_ends_of_strength(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    none = pipe.variations(picture, PROMPT, strength=0, seed=3)
    assert np.array_equal(pixels(none), pixels(pipe.reconstruct(picture, prompt=PROMPT, seed=3)))
    full = pipe.variations(picture, PROMPT, strength=1, seed=3)
    assert np.array_equal(pixels(full), pixels(pipe.generate(PROMPT, seed=3)))
    half = pipe.variations(picture, PROMPT, strength=0.5, seed=3)
    assert differ(half, none) and differ(half, full)
    assert differ(half, pipe.variations(picture.rotate(180), PROMPT, strength=0.5, seed=3))


def test_every_strength_takes_all_steps(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    seen: list[tuple[str, int, int]] = []
    watch = {"callback": lambda stage, done, steps, denoised: seen.append((stage, done, steps))}
    pipe.variations(picture, PROMPT, strength=0.3, prior_steps=4, decoder_steps=2, **watch)
    prior, decoder = [("prior", i, 4) for i in (1, 2, 3, 4)], [("decoder", i, 2) for i in (1, 2)]
    assert seen == [("text", 1, 1), *prior, *decoder, ("picture", 1, 1)]


def test_variations_are_counted(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    three = pipe.variations(picture, strength=0.9, count=3, seed=5, width=64, height=64)
    assert len(three) == 3 and three[0].size == (64, 64)
    for i in range(3):
        assert not differ([three[i]], pipe.variations(picture, strength=0.9, seed=5 + i, width=64, height=64))
    assert differ(three[:1], three[1:2])


# inpaint and outpaint


def test_the_unmasked_part_is_the_reconstruction(
    pipe: WuerstchenPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage A's latents are equal. Stage A then blends a few pixels across the mask's edge."""
    mask, options = right_half(), {"seed": 3, "composite": False}
    kept_latents, latents_b = latents_of(monkeypatch, lambda: pipe.inpaint(picture, mask, PROMPT, **options))
    [plain] = latents_of(monkeypatch, lambda: pipe.reconstruct(picture, seed=3))
    assert torch.equal(kept_latents, plain) and torch.equal(latents_b[..., :16], kept_latents[..., :16])
    assert not torch.equal(latents_b[..., 16:], kept_latents[..., 16:])
    # Stage A's receptive field grows by 1 latent to each side per block; this model has fewer than 8
    raw, whole = pixels(pipe.inpaint(picture, mask, PROMPT, **options)), pixels(pipe.reconstruct(picture, seed=3))
    assert np.array_equal(raw[:, :, :32], whole[:, :, :32]) and not np.array_equal(raw, whole)


def test_the_rest_of_the_picture_is_exact(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    mask = Image.new("L", SIZE)
    mask.paste(255, (3, 5, 50, 41))
    mask.paste(64, (50, 5, 60, 41))
    raw, done = (pixels(pipe.inpaint(picture, mask, PROMPT, seed=3, composite=x))[0] for x in (False, True))
    values, own = np.asarray(mask), pixels([picture])[0]
    assert np.array_equal(done[values == 0], own[values == 0])
    assert np.array_equal(done[values == 255], raw[values == 255])
    edge, grey = values == 64, values == 64
    edge[:, 52:], grey[:, :52] = False, False
    assert np.abs(done[edge] - (own[edge] * 191 + raw[edge] * 64) / 255).max() <= 1  # its cells are white
    assert np.array_equal(done[grey], raw[grey])  # its latents are mixed already
    assert np.abs(done - own)[values == 255].max() > ROUNDING


def test_a_grey_mask_keeps_a_part_of_the_latents(
    pipe: WuerstchenPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, results = Image.new("L", SIZE, 200), []
    kept, grey = latents_of(
        monkeypatch, lambda: results.extend(pipe.inpaint(picture, mask, PROMPT, seed=3, composite=False))
    )
    [white] = latents_of(monkeypatch, lambda: pipe.variations(picture, PROMPT, strength=1.0, seed=3))
    assert not torch.equal(grey, kept) and not torch.equal(grey, white)
    assert np.array_equal(pixels(pipe.inpaint(picture, mask, PROMPT, seed=3)), pixels(results))  # not mixed again


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_nothing_or_everything_is_refused(pipe: WuerstchenPipeline, picture: Image.Image, value: int) -> None:
    with pytest.raises(ValueError, match="mask .*nothing"):
        pipe.inpaint(picture, Image.new("L", SIZE, value), PROMPT)


def test_a_transparent_hole_is_replaced(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    hole = picture.copy()
    hole.putalpha(ImageOps.invert(right_half()))
    own, white = (pipe.inpaint(picture, mask, PROMPT, seed=3) for mask in (hole, right_half()))
    assert np.array_equal(pixels(own), pixels(white))


def test_inpainting_follows_its_prompt_seed_strength_and_steps(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    mask = right_half()
    plain = pipe.inpaint(picture, mask, PROMPT, seed=3)
    changes: list[dict[str, Any]] = [
        {"prompt": "blue " * 70}, {"seed": 4}, {"strength": 0.4}, {"prior_steps": 5}, {"decoder_steps": 4},
    ]  # fmt: skip
    for change in changes:
        assert differ(plain, pipe.inpaint(picture, mask, **{"prompt": PROMPT, "seed": 3, **change}))
    two = pipe.inpaint(picture, mask, PROMPT, seed=3, count=2)
    assert not differ(two[:1], plain) and differ(two[:1], two[1:])


def test_inpainting_keeps_the_pictures_size(pipe: WuerstchenPipeline) -> None:
    for size in ((100, 70), (1, 1)):
        [image] = pipe.inpaint(Image.new("RGB", size, "red"), Image.new("L", size, 200), PROMPT, decoder_steps=1)
        assert image.size == size


def test_outpaint(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    borders = {"left": 20, "top": 10, "right": 5}
    [wide] = pipe.outpaint(picture, PROMPT, seed=3, **borders)
    [raw] = pipe.outpaint(picture, PROMPT, seed=3, composite=False, **borders)
    assert wide.size == raw.size == (153, 74)
    inner = (20, 10, 148, 74)
    found, expected, reconstructed = pixels([wide.crop(inner), picture, raw.crop(inner)])
    assert (found == expected).all() and (reconstructed != expected).any()
    border, generated = pixels([image.crop((0, 0, 153, 10)) for image in (wide, raw)])
    limit = ROUNDING if torch.__version__.startswith("2.4") else 0  # its results vary from run to run
    assert np.abs(border - generated).max() <= limit
    assert differ([wide], pipe.outpaint(picture, "blue " * 70, seed=3, **borders))


# interpolate


def test_interpolation_between_pictures(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    other = picture.rotate(180)
    way = pipe.interpolate(picture, other, steps=3, seed=3)
    assert len(way) == 3 and differ(way[:1], way[1:2]) and differ(way[1:2], way[2:])
    assert np.array_equal(pixels(way[::2]), pixels([pipe.reconstruct(x, seed=3)[0] for x in (picture, other)]))
    assert np.array_equal(pixels(pipe.interpolate(picture, other, fractions=[0.5], seed=3)), pixels(way[1:2]))


def test_pictures_are_interpolated_in_the_units_of_the_prior(
    pipe: WuerstchenPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v2's prior works on (features + 1) / 42, v1's on the features."""
    shift = {"v2": 1.0, "v1": 0.0}[pipe.version]
    a, b = pipe.encode(picture), pipe.encode(picture.rotate(180))
    seen, sample = [], editing.sample_decoder
    monkeypatch.setattr(
        editing, "sample_decoder", lambda model, x, *args, **more: seen.append(x) or sample(model, x, *args, **more)
    )
    pipe.interpolate(picture, picture.rotate(180), fractions=[0.3])
    assert_near(seen[0], slerp(a + shift, b + shift, 0.3) - shift, 1e-4 * float(a.abs().max()))


def test_interpolation_between_prompts(pipe: WuerstchenPipeline) -> None:
    other = "a small apple on blue"
    way = pipe.interpolate(PROMPT, other, steps=4, seed=3, width=64, height=64)
    assert len(way) == 4 and differ(way[1:2], way[2:3])
    ends = [pipe.generate(prompt, seed=3, width=64, height=64)[0] for prompt in (PROMPT, other)]
    assert np.array_equal(pixels(way[::3]), pixels(ends))


def test_interpolation_from_picture_to_prompt(pipe: WuerstchenPipeline, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "picture.png")
    way = pipe.interpolate(tmp_path / "picture.png", PROMPT, steps=2, seed=3)
    ends = pipe.reconstruct(picture, seed=3) + pipe.generate(PROMPT, seed=3)
    assert np.array_equal(pixels(way), pixels(ends))


# mixes


def test_a_mix_is_the_weighted_average(pipe: WuerstchenPipeline, picture: Image.Image) -> None:
    a, b = (pipe.encode_prompt(prompt)[0] for prompt in (PROMPT, "small"))
    assert_near(pipe.encode_prompt({PROMPT: 3, "small": 1})[0], 0.75 * a + 0.25 * b, 1e-6)
    mixed = pipe.generate({PROMPT: 1, "blue " * 70: 1}, seed=3)
    assert differ(mixed, pipe.generate(PROMPT, seed=3)) and differ(mixed, pipe.generate("blue " * 70, seed=3))
    assert not differ(pipe.generate({PROMPT: 0.5}, seed=3), pipe.generate(PROMPT, seed=3))
    both = pipe.generate([PROMPT, {PROMPT: 1, "blue " * 70: 1}], seed=2)
    assert not differ(both[1:], mixed)
    assert len(pipe.variations(picture, {PROMPT: 1, "small": 1}, strength=1)) == 1


# invalid edits

REFUSED: dict[str, Callable[[WuerstchenPipeline, Image.Image], Any]] = {
    "strength 1.5": lambda pipe, x: pipe.variations(x, strength=1.5),
    "strength nan": lambda pipe, x: pipe.inpaint(x, right_half(), "", strength=float("nan")),
    "64x64 .* 128x64": lambda pipe, x: pipe.inpaint(x, right_half((64, 64)), ""),
    "mask is empty": lambda pipe, x: pipe.inpaint(x, Image.new("L", SIZE), ""),
    "0, 0, 0 and 0": lambda pipe, x: pipe.outpaint(x, PROMPT),
    "2128x64": lambda pipe, x: pipe.outpaint(x, PROMPT, left=2000),
    "1 steps": lambda pipe, x: pipe.interpolate(x, PROMPT, steps=1),
    "fraction 2": lambda pipe, x: pipe.interpolate(x, PROMPT, fractions=[0.5, 2]),
    "0 pictures": lambda pipe, x: pipe.interpolate(x, PROMPT, fractions=[]),
    "128x64$": lambda pipe, x: pipe.interpolate(x, PROMPT, width=100),
    "count of 1": lambda pipe, x: pipe.variations(x, count=0),
    "seed -1": lambda pipe, x: pipe.inpaint(x, right_half(), "", seed=-1),
    ": 0.0}": lambda pipe, x: pipe.variations(x, {PROMPT: 0}),
    "nowhere.png": lambda pipe, x: pipe.reconstruct("nowhere.png"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_edits_are_refused_before_any_work(
    pipe: WuerstchenPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    for network in (TextEncoder, ImageEncoder, Prior):
        monkeypatch.setattr(network, "forward", lambda *args, **more: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message) as caught:
        REFUSED[message](pipe, picture)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_prompts_of_different_lengths_do_not_mix(pipe: WuerstchenPipeline) -> None:
    with pytest.raises(ValueError, match="75 tokens"):
        pipe.generate({PROMPT: 1, "a " * 80: 1})
    with pytest.raises(ValueError, match="1x77x.* 1x154x"):
        pipe.interpolate(PROMPT, "a " * 80)


def test_a_model_without_an_image_encoder_says_so(tmp_path: Path, picture: Image.Image) -> None:
    path = write_tiny_bundle(tmp_path / "half.safetensors", without=("image_encoder",))
    half = WuerstchenPipeline.load(path, device="cpu")
    for edit in (half.variations, half.reconstruct, half.encode):
        with pytest.raises(ValueError, match="image encoder"):
            edit(picture)
    assert len(half.interpolate(PROMPT, "small", steps=2)) == 2
