"""Tests what `inspect` says about LoRA files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.lora_forms import FORMS, attention_of_prior, attention_of_tower, random_factors
from safetensors.torch import save_file

from tools.demo.lora import LORA
from wuerstchen_core.checkpoints.lora_info import describe_lora
from wuerstchen_core.cli.main import main

NETWORK, TEXT = random_factors(attention_of_prior()), random_factors(attention_of_tower(32), seed=1)


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_format_rank_strength_stages_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    tags = {"10_cats": {"sks cat": 10, "grass": 3}, "5_dogs": {"grass": 4}}
    state = FORMS["kohya"].write(NETWORK, TEXT) | {"bundle_emb.tok.clip_g": torch.ones(1, 32), "odd": torch.ones(1)}
    save_file(state, path, {"ss_tag_frequency": json.dumps(tags), "ss_output_name": "my cats"})
    info = describe_lora(path)
    assert (info.formats, info.ranks, info.alphas, info.strength) == (("LoRA",), (4,), (2.0,), "alpha")
    assert info.targets == {"prior (Stage C)": 8, "text encoder (clip_g)": 4}
    lines = inspect(path, capsys)
    facts = ("my cats", "sks cat, grass", "rank 4", "alpha 2", "models/loras", "Würstchen LoRA Loader", "tok", "odd")
    assert all(fact in lines for fact in facts), lines


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"oft_blocks": (8, 8, 8)}, "OFT"),
        ({"lokr_w1": (8, 8), "lokr_w2": (8, 8)}, "LoKr"),
        ({"lora_A.weight": (2, 64), "lora_B.weight": (64, 2), "dora_scale": (64, 1)}, "LoRA with DoRA"),
        ({f"hada_{w}_{side}": (64, 2)[:: 1 if side == "a" else -1] for w in ("w1", "w2") for side in "ab"}, "LoHa"),
        ({"diff": (64, 64)}, "differences"),
    ],
)
def test_every_format_has_a_name(tensors: dict[str, tuple[int, ...]], name: str, tmp_path: Path) -> None:
    state = {f"up_blocks.0.2.attention.to_q.{key}": torch.ones(size) for key, size in tensors.items()}
    save_file(state, tmp_path / "x.safetensors")
    info = describe_lora(tmp_path / "x.safetensors")
    assert info.formats == (name,) and info.targets == {"decoder (Stage B)": 1}


def test_a_lora_of_another_model_has_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora"
    save_file({f"{key}_A.weight": torch.ones(2, 4), f"{key}_B.weight": torch.ones(4, 2)}, tmp_path / "flux.safetensors")
    text = inspect(tmp_path / "flux.safetensors", capsys)
    assert "Flux" in text and "models/" not in text


def test_the_shipped_lora_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(LORA), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["targets"] == {"prior (Stage C)": 24} and table["folder"] == "loras" and not table["ignored"]
