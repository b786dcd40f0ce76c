"""The semantic compressor against outputs of the original code, with weights hashed from their names."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import IMAGE
from torch import nn

from tools.demo.network_calls import hashed, hashed_weight
from wuerstchen_core.common.geometry import prior_side
from wuerstchen_core.models.image_encoder import (
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    FUSED,
    MB,
    EfficientNetStage,
    ImageEncoder,
    ImageEncoderParams,
    semantic_view,
)
from wuerstchen_core.models.prior import PriorParams, latents_from_features

TOLERANCE = 1e-5  # observed: S 1.4e-6 in the backbone and 1.7e-6 in the latents, L 2.1e-6 and 1.2e-6
V1_UNITS = replace(PriorParams(), feature_scale=1.0, feature_shift=0.0)  # unscaled features


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "stages", "units", "scaling"),
    [
        ("s", EFFICIENTNET_V2_S, PriorParams(), "scaled"),  # v2's
        ("l", EFFICIENTNET_V2_L, V1_UNITS, "raw"),  # v1's: 117 M weights, hashed in 3 s
    ],
    ids=["S", "L"],
)
def test_latents(size: str, stages: tuple[EfficientNetStage, ...], units: PriorParams, scaling: str) -> None:
    golden = Golden("effnet_procedural")
    encoder = ImageEncoder(ImageEncoderParams(stages), device="meta").eval()
    state = {key: hashed_weight(key, tuple(value.shape)) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(state, assign=True)
    images = 2 * hashed("input", (2, 3, 64, 96))
    assert_near(state["mapper.0.weight"].flatten()[:8], golden[f"check/{size}_mapper_weight_first8"], 1e-7)
    assert_near(images, golden["in/x"], 1e-7)
    assert_near(encoder.backbone(images[:1]), golden[f"out/{size}_backbone"], TOLERANCE)
    latents = encoder(images)
    assert_near(latents, golden[f"out/{size}_latent_raw"], TOLERANCE)
    assert_near(latents_from_features(latents), golden[f"out/{size}_latent_scaled"], TOLERANCE / 42)
    assert_near(latents_from_features(latents, units), golden[f"out/{size}_latent_{scaling}"], TOLERANCE)


@pytest.mark.parametrize("size", [(64, 64), (256, 128), (192, 320), (1024, 1536)])
def test_view_has_the_prior_size(size: tuple[int, int]) -> None:
    view = semantic_view(torch.rand(1, 3, *size))
    assert tuple(view.shape[-2:]) == (32 * prior_side(size[0]), 32 * prior_side(size[1]))


def test_view_has_imagenet_scale() -> None:
    white, black = semantic_view(torch.ones(1, 3, 64, 64)), semantic_view(torch.zeros(1, 3, 64, 64))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert_near(white[0, :, 5, 5], (1 - mean) / std, 1e-5)
    assert_near(black[0, :, 5, 5], -mean / std, 1e-5)


def test_small_encoder_compresses_by_32() -> None:
    with torch.no_grad():
        assert ImageEncoder(IMAGE).eval()(torch.zeros(1, 3, 96, 64)).shape == (1, 16, 3, 2)


def torchvisions_backbone() -> nn.Sequential:
    """Returns torchvision's network of the sizes of IMAGE."""
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    kinds = {FUSED: FusedMBConvConfig, MB: MBConvConfig}
    stages = [kinds[kind](*numbers) for kind, *numbers in IMAGE.stages]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return EfficientNet(stages, dropout=0.0, last_channel=IMAGE.last_channel, norm_layer=norm).features


def test_backbone_equals_torchvisions_in_training_too() -> None:
    """With stochastic depth, batch statistics, and gradients of all weights."""
    ours, theirs = ImageEncoder(IMAGE).backbone, torchvisions_backbone()
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(16, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    outputs = []
    for network in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(network.train()(images))
        outputs[-1].square().mean().backward()
        with torch.no_grad():
            outputs.append(network.eval()(images))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


def test_new_weights_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    encoder, theirs = ImageEncoder(IMAGE), torchvisions_backbone().state_dict()
    encoder.init_weights()
    for name, x in encoder.backbone.state_dict().items():
        one, other = x.double(), theirs[name].double()
        scale = float(other.std(correction=0))
        assert float(one.std(correction=0)) == pytest.approx(scale, rel=0.3), name
        assert float(one.mean()) == pytest.approx(float(other.mean()), abs=0.3 * scale), name


def test_unknown_kinds_of_stages_are_rejected() -> None:
    with pytest.raises(ValueError, match="'dense'"):
        ImageEncoder(replace(IMAGE, stages=(("dense", 1, 3, 1, 8, 8, 1),)))
