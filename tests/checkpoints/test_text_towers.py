"""Tests that TextEncoder equals transformers' CLIPTextModel with an attention mask, in every weight format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core.checkpoints import load_text_encoder

TOLERANCE = 1e-5  # fp32; observed 2e-6
LENGTH, VOCABULARY = 12, 60


@pytest.fixture(scope="module")
def reference() -> Any:
    """A random text tower with weights large enough for every mask and norm to matter."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def example(reference: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask (with no, some and mostly padding), and the reference's states."""
    ids = torch.randint(0, VOCABULARY - 2, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 2])[:, None]
    ids = ids.masked_fill(~mask, VOCABULARY - 1)
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        causal_only = reference(input_ids=ids).last_hidden_state
    assert (states - causal_only).abs().max() > 0.1  # the padding mask matters in this example
    return ids, mask, states


def as_open_clip(reference: Any) -> dict[str, Tensor]:
    """Returns a whole open_clip CLIP whose text tower has the reference's weights."""
    from open_clip.model import CLIP

    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {
        "context_length": LENGTH, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 3, "mlp_ratio": 2.0,
    }  # fmt: skip
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        clip.token_embedding.weight.copy_(reference.embeddings.token_embedding.weight)
        clip.positional_embedding.copy_(reference.embeddings.position_embedding.weight)
        clip.ln_final.load_state_dict(reference.final_layer_norm.state_dict())
        for block, layer in zip(clip.transformer.resblocks, reference.encoder.layers, strict=True):
            attention = layer.self_attn
            trio = (attention.q_proj, attention.k_proj, attention.v_proj)
            block.attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in trio]))
            block.attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in trio]))
            block.attn.out_proj.load_state_dict(attention.out_proj.state_dict())
            block.ln_1.load_state_dict(layer.layer_norm1.state_dict())
            block.ln_2.load_state_dict(layer.layer_norm2.state_dict())
            block.mlp.c_fc.load_state_dict(layer.mlp.fc1.state_dict())
            block.mlp.c_proj.load_state_dict(layer.mlp.fc2.state_dict())
    return clip.state_dict()


def assert_equal(source: Path, example: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, mask, states = example
    for which in ("prior", "decoder"):
        network = load_text_encoder(source, which=which)
        with torch.no_grad():
            torch.testing.assert_close(network(ids, mask), states, rtol=0, atol=TOLERANCE)


def test_transformers_folder(reference: Any, example: tuple[Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    assert_equal(tmp_path, example)


def test_transformers_file_of_a_whole_clip(
    reference: Any, example: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    state = {f"text_model.{key}": x for key, x in reference.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    state |= {"text_projection.weight": torch.ones(4, 128), "logit_scale": torch.ones(())}
    state["vision_model.embeddings.class_embedding"] = torch.ones(8)
    save_file(state, tmp_path / "clip.safetensors")
    assert_equal(tmp_path / "clip.safetensors", example)


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip(reference: Any, example: tuple[Tensor, Tensor, Tensor], tmp_path: Path, custom_text: bool) -> None:
    state = as_open_clip(reference)
    if custom_text:  # CustomTextCLIP has its text tower in a submodule
        others = ("visual.", "logit_scale")
        state = {key if key.startswith(others) else f"text.{key}": x for key, x in state.items()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    assert_equal(tmp_path / "open_clip_pytorch_model.bin", example)


def test_config_json_gives_heads_and_activation(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    for name, activation in (("right", "gelu"), ("wrong", "quick_gelu")):
        config = CLIPTextConfig(**sizes, num_attention_heads=4, hidden_act=activation, eos_token_id=19, bos_token_id=18)
        CLIPTextModel(config).save_pretrained(tmp_path / name)
    assert load_text_encoder(tmp_path / "right").params.heads == 4
    with pytest.raises(ValueError, match="quick_gelu"):
        load_text_encoder(tmp_path / "wrong")
