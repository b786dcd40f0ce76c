"""The semantic compressor against the original's numbers, with weights that follow from their names."""

from __future__ import annotations

import pytest
import torch
from golden_data import Golden, assert_near
from networks import IMAGE

from wuerstchen_core.demo.recipe.precision_cases import hashed, hashed_weight
from wuerstchen_core.diffusion.sizes import prior_side
from wuerstchen_core.models.image_encoder import ImageEncoder, ImageEncoderParams, semantic_view

TOLERANCE = 1e-5  # observed 1e-6


@torch.no_grad()
def test_latents() -> None:
    golden = Golden("effnet_procedural")
    encoder = ImageEncoder(ImageEncoderParams(), device="meta").eval()
    state = {key: hashed_weight(key, tuple(value.shape)) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(state, assign=True)
    images = 2 * hashed("input", (2, 3, 64, 96))
    assert_near(state["mapper.0.weight"].flatten()[:8], golden["check/s_mapper_weight_first8"], 1e-7)
    assert_near(images, golden["in/x"], 1e-7)
    assert_near(encoder.backbone(images[:1]), golden["out/s_backbone"], TOLERANCE)
    latents = encoder(images)
    assert_near(latents, golden["out/s_latent_raw"], TOLERANCE)
    assert_near((latents + 1) / 42, golden["out/s_latent_scaled"], TOLERANCE)  # the prior's units


@pytest.mark.parametrize("size", [(64, 64), (256, 128), (192, 320), (1024, 1536)])
def test_view_gives_latents_of_the_prior_size(size: tuple[int, int]) -> None:
    view = semantic_view(torch.rand(1, 3, *size))
    assert tuple(view.shape[-2:]) == (32 * prior_side(size[0]), 32 * prior_side(size[1]))


def test_view_has_imagenet_scale() -> None:
    white, black = semantic_view(torch.ones(1, 3, 64, 64)), semantic_view(torch.zeros(1, 3, 64, 64))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert_near(white[0, :, 5, 5], (1 - mean) / std, 1e-5)
    assert_near(black[0, :, 5, 5], -mean / std, 1e-5)


def test_a_small_table_compresses_by_32() -> None:
    with torch.no_grad():
        assert ImageEncoder(IMAGE).eval()(torch.zeros(1, 3, 96, 64)).shape == (1, 16, 3, 2)
