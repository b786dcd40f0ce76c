"""Pictures as input, on small untrained networks: encoded, painted over, masked and mixed as the core does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from inside_pictures_in import SIZES, STEPS

from tools.comfyui.client import Inside, Install, run_inside

LEGAL = {"as it is": [128, 192], "odd": [64, 128], "one pixel": [64, 64], "very wide": [64, 2048]}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return run_inside(install, "inside_pictures_in.py", tmp_path_factory.mktemp("in"), checkpoints / TINY)


def check(inside: Inside, name: str, atol: float) -> None:
    got, want = (inside[0][f"{which}/{name}"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SIZES)
def test_a_picture_of_any_size_is_encoded_as_the_core_does_it(inside: Inside, name: str) -> None:
    """To the nearest legal size, two at once, transparency on white."""
    check(inside, f"{name} c", 2e-5)
    check(inside, f"{name} b", 2e-5)
    height, width = LEGAL[name]
    assert inside[1][f"{name} size"] == [height, width]
    shape = list(inside[0][f"got/{name} b"].shape)
    assert shape[2:] == [height // 4, width // 4] and inside[1][f"{name} empty"] == [shape, 0.0]


def test_a_mask_of_another_size_covers_what_it_touches_in_both_stages(inside: Inside) -> None:
    """Of the picture's 128 x 192 pixels the rows from 60 and columns from 120 on, to row 80."""
    c, b = (inside[0][f"mask {stage}"][0, 0] for stage in ("c", "b"))
    assert c.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert b.shape == (32, 48) and set(b.unique().tolist()) == {0.0, 1.0}
    painted = b.nonzero()
    assert painted.min(0).values.tolist() == [15, 30] and painted.max(0).values.tolist() == [19, 47]
    assert not inside[1]["mask without stage a"]
    assert inside[1]["mask of a cropped picture"] == 1.0


def test_an_image_encoder_that_the_host_saved_loads_back(inside: Inside) -> None:
    same, count = inside[1]["saved"]
    assert same and count > 500


def test_the_image_encoders_of_both_releases_are_told_apart(inside: Inside) -> None:
    assert inside[1]["release"] == "v2"
    assert inside[1]["large"] == ["v1", [1, 16, 2, 2]]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_strength_keeps_the_picture_at_0_and_ignores_it_at_1(inside: Inside, stage: str) -> None:
    check(inside, f"{stage} at 0", 0)
    check(inside, f"{stage} at 1", 0)
    check(inside, f"{stage} between", {"prior": 2e-3, "decoder": 1e-4}[stage])  # 42 and 0.4 times what is inside


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_mask_keeps_what_is_outside_and_forgets_what_is_inside(inside: Inside, stage: str) -> None:
    check(inside, f"{stage} outside", 2e-5)
    check(inside, f"{stage} masked at 1", 0)
    check(inside, f"{stage} masked between", {"prior": 2e-3, "decoder": 1e-4}[stage])  # the core, at the same seed


def test_texts_are_read_once_a_run_unless_weights_change_in_it(inside: Inside) -> None:
    once, hooked = inside[1]["texts read"]
    assert once == 1 and hooked >= STEPS
    assert not inside[1]["cache left"]


BETWEEN = ("c between", "raw between", "b between", "prompts between", "prompts' latents", "average")


@pytest.mark.parametrize("name", ["c at 0", "c at 1", *BETWEEN])
def test_what_lies_between(inside: Inside, name: str) -> None:
    check(inside, name, 1e-5 if name in BETWEEN else 0)


def test_both_ends_of_a_way_between_prompts_are_the_prompts(inside: Inside) -> None:
    facts = inside[1]
    assert facts["prompts at 0"] and facts["prompts at 1"]
    assert facts["options"] == 0.5 and facts["averaged latents"]


# What is done wrong, and words of the answer.
MISTAKES = {
    "stage a as encoder": ("Image Encode", "not Würstchen's image encoder", "connect the image encoder output"),
    "encoder as stage a": ("Image Encode", "not Stage A", "vae output"),
    "encoder in decode": ("VAE Decode", "not Stage A", "vae output"),
    "sd latents in stage c": ("needs Stage C latents", "[1, 4, 16, 16]", "stage_c output"),
    "nothing to keep": ("Prior Sample", "empty latents", "a denoise of 0.5", "set denoise to 1"),
    "two releases": ("Prior Sample", "latents of Würstchen v1 and a prior of v2", "one release"),
    "latents of two releases": ("Latent Interpolate", "v1 and of v2", "one release"),
    "two stages": ("Latent Interpolate", "Stage C latents and Stage B latents", "one stage"),
    "two sizes": ("Latent Interpolate", "2x16x2x2 and 2x16x2x3", "one size"),
    "two batches": ("Latent Interpolate", "2x16x2x2 and 3x16x2x2", "one batch size or 1"),
    "other latents": ("Latent Interpolate", "[1, 8, 16, 16]", "another model's"),
    "two lengths": ("Conditioning Interpolate", "77 and 154 tokens", "shorten the longer"),
    "two towers": ("Conditioning Interpolate", "8 and 9 wide", "one stage"),
    "one with latents": ("Conditioning Interpolate", "in one conditioning only"),
    "several": ("Conditioning Interpolate", "2 conditionings", "each alone"),
}


def test_every_mistake_is_answered_by_one_sentence(inside: Inside) -> None:
    said = inside[1]["said"]
    assert list(said) == list(MISTAKES)
    for name, words in MISTAKES.items():
        assert "\n" not in said[name] and len(said[name]) < 300
        assert all(word in said[name] for word in words), said[name]
