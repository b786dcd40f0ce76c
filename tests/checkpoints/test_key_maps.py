"""Tests that the full-size networks have the published keys and shapes, and that params are inferred from these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.golden_data import manifests
from helpers.layouts import clip_of_open_clip, clip_of_transformers
from helpers.networks import DECODER, PRIOR, VQ
from torch import Tensor

from wuerstchen_core.checkpoints.components import COMPONENTS
from wuerstchen_core.checkpoints.infer_params import (
    decoder_params,
    image_encoder_params,
    prior_params,
    text_encoder_params,
    vqgan_params,
)
from wuerstchen_core.checkpoints.key_maps import COMFYUI_PREFIX, split_attention, strip_prefix, text_from_any
from wuerstchen_core.checkpoints.source import to_ours
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import CLIP_BIGG, CLIP_H, TextEncoder, TextEncoderParams
from wuerstchen_core.models.token_decoder import TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

DTYPES = {"F32": torch.float32, "I64": torch.int64}


def manifest(name: str) -> dict[str, Tensor]:
    """Returns the tensors of a published file, without data."""
    tensors = manifests()[name]["tensors"]
    return {key: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for key, (shape, dtype) in tensors.items()}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Returns the shapes and dtypes, which strict loading compares."""
    return {key: (*x.shape, x.dtype) for key, x in state.items()}


@pytest.mark.parametrize(
    ("name", "kind", "params"),
    [
        ("diffusers_prior", "prior", PriorParams()),
        ("orig_v2_stage_c_prior", "prior", PriorParams()),
        ("orig_v1_stage_c_prior", "prior", PriorParams(c_cond=1024)),
        ("diffusers_diffnext", "decoder", DecoderParams()),
        ("orig_v2_stage_b_diffnext", "decoder", DecoderParams()),
        ("orig_v1_stage_b_paella", "token_decoder", TokenDecoderParams()),
        ("diffusers_paella_vqmodel", "vqgan", VQGANParams()),
        ("orig_stage_a_vqmodel", "vqgan", VQGANParams()),
        ("orig_v2_effnet_s", "image_encoder", ImageEncoderParams()),
        ("orig_v1_effnet_l", "image_encoder", ImageEncoderParams(EFFICIENTNET_V2_L)),
    ],
)
def test_full_size_network_has_the_keys_of_the_published_file(name: str, kind: str, params: Any) -> None:
    found, ours = to_ours(manifest(name))
    assert found == kind
    assert COMPONENTS[kind].infer_params(ours) == params
    with torch.device("meta"):
        network = COMPONENTS[kind].network(params)
    assert shapes(ours) == shapes(network.state_dict())


@pytest.mark.parametrize(
    ("key", "fact"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("down_blocks.0.resnets.0.conv1.weight", "Stable Diffusion"),
        ("model.diffusion_model.clip_txt_pooled_mapper.weight", "Stable Cascade"),
        ("pixels_mapper.0.weight", "Stable Cascade"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("projections.0.0.weight", "ControlNet"),
        ("prior.blocks.2.attention.to_q.lora_A.weight", "LoRA"),
        ("prior.blocks.2.attention.processor.to_q_lora.down.weight", "LoRA"),
        ("decoder.conv_in.weight encoder.down.0.block.0.norm1.weight", "a VAE"),
        ("encoder.down_blocks.0.resnets.0.norm1.weight", "a VAE"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("something.else", "something.else"),
    ],
)
def test_other_models_are_named(key: str, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        to_ours(dict.fromkeys(key.split(), torch.zeros(1)))


def test_image_encoder_of_stable_cascade_is_recognised_by_its_norm() -> None:
    state = manifest("orig_v2_effnet_s")
    del state["mapper.1.weight"], state["mapper.1.bias"]
    with pytest.raises(ValueError, match="Stable Cascade"):
        to_ours(state)


def test_attention_is_split_in_the_order_query_key_value() -> None:
    weight = torch.arange(6.0)[:, None].expand(6, 2)
    state = {
        "blocks.2.attention.attn.in_proj_weight": weight,
        "blocks.2.attention.attn.in_proj_bias": torch.arange(6.0),
        "blocks.2.attention.attn.out_proj.weight": torch.full((2, 2), 7.0),
        "blocks.2.attention.attn.out_proj.bias": torch.full((2,), 8.0),
        "projection.weight": torch.zeros(1),
    }
    ours = split_attention(state)
    assert list(ours) == [
        *(f"blocks.2.attention.{name}.weight" for name in ("to_q", "to_k", "to_v")),
        *(f"blocks.2.attention.{name}.bias" for name in ("to_q", "to_k", "to_v")),
        "blocks.2.attention.to_out.0.weight",
        "blocks.2.attention.to_out.0.bias",
        "projection.weight",
    ]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert ours[f"blocks.2.attention.{name}.weight"].equal(weight[2 * i : 2 * i + 2])
        assert ours[f"blocks.2.attention.{name}.bias"].tolist() == [2 * i, 2 * i + 1]
    assert ours["blocks.2.attention.to_out.0.weight"].unique().item() == 7
    assert split_attention(ours) == ours  # diffusers' names are ours


def test_comfyuis_prefix_is_stripped() -> None:
    state = {"model.diffusion_model.out.1.bias": torch.zeros(1), "model_sampling.sigmas": torch.zeros(1)}
    assert list(strip_prefix(state, COMFYUI_PREFIX)) == ["out.1.bias"]


@pytest.mark.parametrize("params", [CLIP_H, CLIP_BIGG])
def test_published_text_towers(params: TextEncoderParams) -> None:
    from open_clip import get_model_config
    from open_clip.model import CLIP

    name = {1024: "ViT-H-14", 1280: "ViT-bigG-14"}[params.width]
    with torch.device("meta"):
        ours = TextEncoder(params).state_dict()
        bare, theirs = (
            clip_of_transformers(params.width, params.layers, prefix=prefix) for prefix in ("", "text_model.")
        )
        open_clip = CLIP(**get_model_config(name)).state_dict()
    without_projection = {key: x for key, x in theirs.items() if "projection" not in key}
    for state in (bare, theirs, without_projection, open_clip):
        kind, remapped = to_ours(dict(state))
        assert kind == "text_encoder"
        assert shapes(remapped) == shapes(ours)
        assert text_encoder_params(remapped) == params


@pytest.mark.parametrize(
    ("width", "layers", "fact"),
    [(1024, 23, "lacks the last layer.*warp-ai/wuerstchen "), (768, 12, "CLIP-L.*quick_gelu.*warp-ai")],
)
@pytest.mark.parametrize("layout", [clip_of_transformers, clip_of_open_clip])
def test_text_towers_of_other_models_are_rejected(layout: Any, width: int, layers: int, fact: str) -> None:
    with torch.device("meta"):
        _, state = to_ours(layout(width, layers))
    with pytest.raises(ValueError, match=fact) as raised:
        text_encoder_params(state)
    assert len(str(raised.value)) < 250


def test_text_tower_of_a_custom_text_model_has_a_prefix() -> None:
    state = {"text.token_embedding.weight": torch.zeros(1), "text.text_projection": torch.zeros(1)}
    assert list(text_from_any(state | {"visual.proj": torch.zeros(1)})) == ["token_embedding.weight"]


@pytest.mark.parametrize(
    "params",
    [
        DECODER,
        DecoderParams(
            c_hidden=(64, 128),
            nhead=(1, 2),
            blocks=(3, 1),
            level_config=("CTFA", "CFTA"),
            inject_effnet=(True, False),
            effnet_embd=7,
            c_cond=24,
            clip_embd=40,
            c_r=32,
            patch_size=1,
            kernel_size=5,
        ),
    ],
)
def test_decoder_sizes_come_from_its_tensors(params: DecoderParams) -> None:
    assert decoder_params(Decoder(params, device="meta").state_dict()) == params


def test_other_sizes_come_from_their_tensors() -> None:
    assert prior_params(Prior(PRIOR, device="meta").state_dict()) == PRIOR
    for params in (VQ, VQGANParams(levels=3, bottleneck_blocks=1, c_hidden=64, codebook_size=9, c_latent=6)):
        assert vqgan_params(VQGAN(params, device="meta").state_dict()) == params
    text = TextEncoderParams(width=128, heads=2, layers=3, vocab_size=11, context_length=5, mlp_ratio=2.0)
    assert text_encoder_params(TextEncoder(text).state_dict()) == text


def test_heads_that_are_not_64_wide_must_be_given() -> None:
    state = Prior(PriorParams(c=32, c_cond=8, depth=1, nhead=4), device="meta").state_dict()
    assert prior_params(state, nhead=4).nhead == 4
    with pytest.raises(ValueError, match="32.*64"):
        prior_params(state)


def test_an_unknown_stage_table_is_rejected() -> None:
    params = ImageEncoderParams(stages=(("fused", 1, 3, 1, 8, 8, 1),), last_channel=16)
    with pytest.raises(ValueError, match="stage table"):
        image_encoder_params(ImageEncoder(params).state_dict())
