"""Stage A and the image encoder in ComfyUI's VAE nodes: whole, tiled, odd sizes, masks, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from errors import check_error
from inside_vae import MISTAKES, ODD

from tools.comfyui.client import Inside, Install, run_inside

# Limits of the mean error in standard deviations. Tiles lack context; larger tiles lack less.
TILED = {"64 32": 0.015, "96 64": 0.006, "128 32": 0.003, "512 64": 1e-6}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return run_inside(install, "inside_vae.py", tmp_path_factory.mktemp("vae"), checkpoints / TINY)


def error(inside: Inside, name: str) -> float:
    """Returns the mean deviation in standard deviations of the expected result."""
    got, want = (inside[0][f"{which}/{name}"] for which in ("got", "want"))
    assert got.shape == want.shape
    return float((got - want).abs().mean() / want.std())


@pytest.mark.parametrize(
    "name",
    [
        "decode",
        "encode",
        "encode odd",
        "encode rgba",
        "encode grey",
        "semantic odd",
        "semantic rgba",
        "semantic tiled",
        "semantic bf16",
        "semantic fp16",
        "semantic inpaint",
    ],
)
def test_comfyuis_nodes_equal_the_core(inside: Inside, name: str) -> None:
    """Stage A crops odd sizes around the centre, as ComfyUI does; the image encoder resizes them and never tiles."""
    got, want = (inside[0][f"{which}/{name}"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", TILED)
def test_tiled_decoding_is_close_to_whole(inside: Inside, tile: str) -> None:
    assert error(inside, f"decode tiled {tile}") < TILED[tile]


def test_tiled_encoding_is_close_to_whole(inside: Inside) -> None:
    assert error(inside, "encode tiled") < 0.015
    assert error(inside, "encode narrow tiles") < 0.06


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1]["mistakes"].get(mistake, ""), *MISTAKES[mistake])


def test_stage_a_works_in_half_precision(inside: Inside) -> None:
    assert inside[1]["dtype"] == "torch.float32"
    assert (inside[1]["bf16"], inside[1]["fp16"]) == ("torch.bfloat16", "torch.float16")
    assert 0 < error(inside, "decode fp16") < 0.002 < error(inside, "decode bf16") < 0.015


@pytest.mark.parametrize("way", ["decoder node", "decoder ksampler", "prior node", "prior ksampler"])
def test_only_the_masked_area_changes(inside: Inside, way: str) -> None:
    tensors, _ = inside
    got, want = (tensors[f"{which}/{way} kept"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert tensors[f"changed/{way}"].std() > 0.05


def test_inpainting_masks_keep_the_images_size(inside: Inside) -> None:
    assert inside[1]["semantic mask"] == [1, 1, *ODD]


def test_cancelling_stops_within_a_decoding_an_encoding_and_a_loading(inside: Inside) -> None:
    assert set(inside[1]["stops"].values()) == {True} and len(inside[1]["stops"]) == 6
    assert torch.equal(*(inside[0][f"{which}/after cancelling"] for which in ("got", "want")))
