"""LoRA training of a prior and its text encoder in a tiny size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from helpers.networks import TEXT
from wuerstchen_core.models.text_encoder import tokenize
from wuerstchen_core.training.stages.adapters import AdapterConfig

INPUTS = ("prior", "encoder", "text", "decoder", "token-decoder", "vqgan")
RANK, ALPHA = 2, 5.0
CONFIG = f"""
run = "overridden"
[data]
canvas = 64
things = 4
background = "pink"
[lora]
rank = {RANK}
alpha = {ALPHA}
targets = ["to_q", "to_out.0", "kv_mapper.1"]
text_targets = ["q_proj", "self_attn.out_proj", "fc2"]
dropout = 0.2
[train]
steps = 4
batch = 4
lr = 5e-2
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 4
[modelspec]
title = "Pink"
trigger_words = ["sks apple", "pink"]
"""
CONFIGURED = AdapterConfig(
    RANK, ALPHA, ("to_q", "to_out.0", "kv_mapper.1"), ("q_proj", "self_attn.out_proj", "fc2")
)  # fmt: skip
WORDS = {"attn.q_proj": "self_attn.q_proj", "attn.out_proj": "self_attn.out_proj", "mlp.c_proj": "mlp.fc2"}
CHANGED = {  # our paths and those in the file
    f"blocks.{i}.{name}": f"diffusion_model.blocks.{i}.{name}"
    for i in (2, 5)
    for name in ("attention.to_q", "attention.to_out.0", "kv_mapper.1")
} | {
    f"text_encoder.transformer.resblocks.{i}.{ours}": f"text_encoder.text_model.encoder.layers.{i}.{theirs}"
    for i in range(TEXT.layers)
    for ours, theirs in WORDS.items()
}
TOKENS = tokenize(["a red apple", ""])


def write_config(folder: Path, bundle: Path, text: str = CONFIG, inputs: Iterable[str] = INPUTS) -> Path:
    """Writes a configuration, with networks of a bundle as inputs."""
    path = folder / "training.toml"
    sources = "\n".join(f"{stage} = {json.dumps(bundle.as_posix())}" for stage in inputs)
    path.write_text(f"{text}\n[inputs]\n{sources}\n", encoding="utf-8")
    return path
