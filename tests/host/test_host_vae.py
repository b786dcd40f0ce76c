"""Stage A and the image encoder in the host's own VAE nodes: whole, in tiles, of odd sizes, behind a mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from inside_vae import ODD

from tools.comfyui.client import Inside, Install, run_inside

# In standard deviations of the picture, on average. Tiles miss their surroundings, the larger the less.
TILED = {"64 32": 0.015, "96 64": 0.006, "128 32": 0.003, "512 64": 1e-6}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return run_inside(install, "inside_vae.py", tmp_path_factory.mktemp("vae"), checkpoints / TINY)


def error(inside: Inside, name: str) -> float:
    """Mean deviation in standard deviations of what was wanted."""
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
        "semantic odd",
        "semantic rgba",
        "semantic tiled",
        "semantic inpaint",
    ],
)
def test_the_hosts_nodes_give_what_the_core_gives(inside: Inside, name: str) -> None:
    """Stage A crops odd sizes around the centre, as the host does; the image encoder takes every size, never tiles."""
    got, want = (inside[0][f"{which}/{name}"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", TILED)
def test_decoding_in_tiles_is_near_to_the_whole(inside: Inside, tile: str) -> None:
    assert error(inside, f"decode tiled {tile}") < TILED[tile]


def test_encoding_in_tiles_is_near_to_the_whole(inside: Inside) -> None:
    assert error(inside, "encode tiled") < 0.015


def test_stage_a_works_in_half_precision_where_the_user_asks_for_it(inside: Inside) -> None:
    assert inside[1]["dtype"] == "torch.float32"
    assert (inside[1]["bf16"], inside[1]["fp16"]) == ("torch.bfloat16", "torch.float16")
    assert 0 < error(inside, "decode fp16") < 0.002 < error(inside, "decode bf16") < 0.015


@pytest.mark.parametrize("way", ["decoder node", "decoder ksampler", "prior node", "prior ksampler"])
def test_only_what_the_mask_covers_is_painted(inside: Inside, way: str) -> None:
    tensors, _ = inside
    got, want = (tensors[f"{which}/{way} kept"] for which in ("got", "want"))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert tensors[f"changed/{way}"].std() > 0.05


def test_a_mask_of_the_image_encoder_is_as_large_as_the_picture(inside: Inside) -> None:
    assert inside[1]["semantic mask"] == [1, 1, *ODD]
