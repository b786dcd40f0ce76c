"""Images as input on small untrained networks: encoding, denoise, masks and interpolation equal the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from errors import check_error
from inside_pictures_in import SIZES, STEPS

from tools.comfyui.client import Inside, Install, run_inside

pytestmark = pytest.mark.newest

LEGAL = {"as it is": [128, 192], "odd": [64, 128], "one pixel": [64, 64], "very wide": [64, 2048]}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return run_inside(install, "inside_pictures_in.py", tmp_path_factory.mktemp("in"), checkpoints / TINY)


def check(inside: Inside, name: str, atol: float) -> None:
    got, want = (inside[0][f"{which}/{name}"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SIZES)
def test_images_of_any_size_are_encoded_like_in_the_core(inside: Inside, name: str) -> None:
    """Rounded to the nearest legal size, in batches, transparency on white."""
    check(inside, f"{name} c", 2e-5)
    check(inside, f"{name} b", 2e-5)
    height, width = LEGAL[name]
    assert inside[1][f"{name} size"] == [height, width]
    shape = list(inside[0][f"got/{name} b"].shape)
    assert shape[2:] == [height // 4, width // 4] and inside[1][f"{name} empty"] == [shape, 0.0]


def test_a_mask_of_another_size_covers_all_latents_that_it_touches(inside: Inside) -> None:
    """The mask covers rows 60 to 80 and columns from 120 of the image's 128 x 192 pixels."""
    c, b = (inside[0][f"mask {stage}"][0, 0] for stage in ("c", "b"))
    assert c.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert b.shape == (32, 48) and b[17, 28:31].tolist() == [0, 0.25, 1]  # its enlarged edges are soft
    covered = (b == 1).nonzero()
    assert covered.min(0).values.tolist() == [15, 30] and covered.max(0).values.tolist() == [19, 47]
    assert not inside[1]["mask without stage a"]
    assert inside[1]["mask of a cropped picture"] == 1.0


def test_an_image_encoder_saved_by_comfyui_loads_back(inside: Inside) -> None:
    same, count = inside[1]["saved"]
    assert same and count > 500


def test_the_image_encoders_of_both_releases_are_recognised(inside: Inside) -> None:
    assert inside[1]["release"] == "v2"
    assert inside[1]["large"] == ["v1", [1, 16, 2, 2]]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_denoise_keeps_the_image_at_0_and_ignores_it_at_1(inside: Inside, stage: str) -> None:
    check(inside, f"{stage} at 0", 0)
    check(inside, f"{stage} at 1", 0)
    check(inside, f"{stage} between", {"prior": 2e-3, "decoder": 1e-4}[stage])  # 42 and 0.4 times the error inside


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_mask_keeps_the_outside_and_regenerates_the_inside(inside: Inside, stage: str) -> None:
    check(inside, f"{stage} outside", 2e-5)
    check(inside, f"{stage} masked at 1", 0)
    check(inside, f"{stage} masked between", {"prior": 2e-3, "decoder": 1e-4}[stage])  # equal to the core


CASES = ("kept", "soft", "feathered", "thin", "free")


@pytest.mark.parametrize("case", [*CASES, "differential"])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_masks_in_pixels_are_sampled_as_in_the_core(inside: Inside, stage: str, case: str) -> None:
    check(inside, f"{stage} {case}", {"prior": 2e-3, "decoder": 1e-4}[stage])


@pytest.mark.parametrize("case", [f"{case}{more}" for case in CASES for more in ("", " differential")])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_comfyuis_samplers_and_ours_agree_on_masks(inside: Inside, stage: str, case: str) -> None:
    change, difference = (inside[1]["masks"][f"{what}/{stage} {case}"] for what in ("change", "difference"))
    assert difference <= 0.03 * change + 1e-5, (difference, change)
    assert (change < 1e-4) == case.startswith("kept")


def test_keys_and_values_are_computed_once_per_run_without_hooks(inside: Inside) -> None:
    once, hooked = inside[1]["texts read"]
    assert once == 1 and hooked >= STEPS
    assert not inside[1]["cache left"]


BETWEEN = ("c between", "raw between", "b between", "prompts between", "prompts' latents", "average")


@pytest.mark.parametrize("name", ["c at 0", "c at 1", *BETWEEN])
def test_interpolation_equals_the_core(inside: Inside, name: str) -> None:
    check(inside, name, 1e-5 if name in BETWEEN else 0)


def test_interpolated_prompts_are_exact_at_the_ends(inside: Inside) -> None:
    facts = inside[1]
    assert facts["prompts at 0"] and facts["prompts at 1"]
    assert facts["options"] == 0.5 and facts["averaged latents"]


# What is wrong, and what the error must name.
MISTAKES = {
    "stage a as encoder": ("Image Encode", "image encoder output"),
    "encoder as stage a": ("Image Encode", "Stage A", "vae output"),
    "encoder in decode": ("VAE Decode", "Stage A", "vae output"),
    "sd latents in stage c": ("Stage C", "[1, 4, 16, 16]", "stage_c"),
    "empty, denoise 0.5": ("Prior Sample", "empty latents", "0.5", "Würstchen Image Encode"),
    "two releases": ("Prior Sample", "v1", "v2"),
    "latents of two releases": ("Latent Interpolate", "v1", "v2"),
    "two stages": ("Latent Interpolate", "Stage C", "Stage B"),
    "two sizes": ("Latent Interpolate", "2x16x2x2", "2x16x2x3"),
    "two batches": ("Latent Interpolate", "2x16x2x2", "3x16x2x2"),
    "other latents": ("Latent Interpolate", "[1, 8, 16, 16]"),
    "two lengths": ("Conditioning Interpolate", "77", "154"),
    "two towers": ("Conditioning Interpolate", "8 and 9 wide"),
    "one with latents": ("Conditioning Interpolate", "Stage C latents"),
    "several": ("Conditioning Interpolate", "2 combined"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1]["mistakes"].get(mistake, ""), *MISTAKES[mistake])
