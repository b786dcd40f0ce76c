"""Tiny models in every layout that is read, for tests that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.layouts import comfyui, original, random_state, vqgan_of_diffusers
from helpers.networks import DECODER, PRIOR, TOKEN_DECODER, VQ
from helpers.tiny_model import tiny_parts
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.key_maps import text_to_transformers
from wuerstchen_core.checkpoints.quant import FP8, INT8, quantize
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams
from wuerstchen_core.models.token_decoder import TokenDecoder
from wuerstchen_core.models.vqgan import VQGAN

State = dict[str, Tensor]
Write = Callable[[Path, State], Path]  # writes a state dict into a folder and returns the source


@cache
def model() -> dict[str, nn.Module]:
    return tiny_parts()


@cache
def whole(kind: str) -> State:
    networks = {
        "prior": lambda: Prior(PRIOR),
        "prior of the tower": lambda: Prior(replace(PRIOR, c_cond=64)),
        "decoder": lambda: Decoder(DECODER),
        "token_decoder": lambda: TokenDecoder(TOKEN_DECODER),
        "vqgan": lambda: VQGAN(VQ),
        "text": lambda: TextEncoder(TextEncoderParams(width=64, heads=1, layers=1, vocab_size=9)),
    }
    return random_state(networks[kind]())


def tower() -> State:
    return {f"text_model.{key}": x for key, x in text_to_transformers(whole("text")).items()}


def behind(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: x for key, x in state.items()}


def safetensors(folder: Path, state: State) -> Path:
    save_file({key: x.clone() for key, x in state.items()}, folder / "file.safetensors")
    return folder / "file.safetensors"


def pytorch(*keys: str) -> Write:
    def write(folder: Path, state: State) -> Path:
        content: Any = {"epoch": 3, "state_dict": dict(state), "optimizer_states": [{"state": {0: {"exp_avg": {}}}}]}
        if keys:
            content = {**content, "state_dict": {"old": torch.zeros(1)}}
            for key in reversed(keys):
                state = {key: state}  # type: ignore[dict-item]
            content |= state
        torch.save(content, folder / "file.ckpt")
        return folder / "file.ckpt"

    return write


def diffusers(folder: Path, state: State) -> Path:
    (folder / "model/prior").mkdir(parents=True)
    save_file({key: x.clone() for key, x in state.items()}, folder / "model/prior/diffusion_pytorch_model.safetensors")
    (folder / "model/prior/config.json").write_text(json.dumps({"nhead": PRIOR.nhead}))
    (folder / "model/model_index.json").write_text('{"_class_name": "WuerstchenPriorPipeline"}')
    return folder / "model"


def sharded(folder: Path, state: State) -> Path:
    keys, names = list(state), ("one.safetensors", "two.safetensors")
    places = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key].clone() for key in keys if places[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def checkpoint_save(folder: Path, state: State) -> Path:
    clip = {f"cond_stage_model.clip_g.transformer.{key}": x for key, x in tower().items()}
    stage_a = {f"first_stage_model.{key}": x for key, x in whole("vqgan").items()}
    return safetensors(folder, {**comfyui(state), **clip, **stage_a})


def bundle(dtype: torch.dtype | None, name: str) -> Write:
    def write(folder: Path, state: State) -> Path:
        file = folder / "bundle.safetensors"
        save_bundle(file, model(), {"licence": "MIT"}, dtype)
        stored = {key: x for key, x in load_file(file).items() if not key.startswith(f"{name}.")}

        save_file(
            {**stored, **{f"{name}.{key}": x.clone() for key, x in state.items()}}, file, read_file_metadata(file)
        )
        return file

    return write


@cache
def part_of_bundle(dtype: torch.dtype | None, name: str) -> State:
    entries: dict[str, Any] = {}
    for key, x in model()[name].state_dict().items():
        entries |= quantize(key, x, dtype)
    return {key: x.load() for key, x in entries.items()}


def quantised(state: State) -> State:
    """Returns a state dict with one layer in ComfyUI's int8 format."""
    config = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}).encode()
    return {
        **state,
        "blocks.2.attention.to_q.weight": torch.ones(64, 64, dtype=torch.int8),
        "blocks.2.attention.to_q.weight_scale": torch.ones(64, 1),
        "blocks.2.attention.to_q.comfy_quant": torch.tensor(list(config), dtype=torch.uint8),
    }


@dataclass(frozen=True)
class Layout:
    part: str
    state: Callable[[], State]
    write: Write = safetensors
    parts: int = 1


LAYOUTS = {
    "bare": Layout("prior", lambda: whole("prior")),
    "original v2 prior": Layout("prior", lambda: original(whole("prior")), pytorch("ema_state_dict")),
    "original v2 decoder": Layout("decoder", lambda: original(whole("decoder")), pytorch()),
    "original v1": Layout("token_decoder", lambda: whole("token_decoder"), pytorch()),
    "stage a": Layout("vqgan", lambda: vqgan_of_diffusers(whole("vqgan"))),
    "text of transformers": Layout("decoder_text_encoder", tower),
    "diffusers": Layout("prior", lambda: whole("prior"), diffusers),
    "shards": Layout("prior", lambda: whole("prior"), sharded),
    "ComfyUI": Layout("prior", lambda: comfyui(whole("prior"))),
    "CheckpointSave": Layout("prior", lambda: whole("prior of the tower"), checkpoint_save, 3),
    "prefixes": Layout("prior", lambda: behind("model.module._orig_mod.")(whole("prior")), pytorch("a", "b")),
    "bundle": Layout("vqgan", lambda: part_of_bundle(None, "vqgan"), bundle(None, "vqgan"), 5),
    "image encoder": Layout(
        "image_encoder", lambda: part_of_bundle(None, "image_encoder"), bundle(None, "image_encoder"), 5
    ),
    "fp8 bundle": Layout("decoder", lambda: part_of_bundle(FP8, "decoder"), bundle(FP8, "decoder"), 5),
    "int8 bundle": Layout("decoder", lambda: part_of_bundle(INT8, "decoder"), bundle(INT8, "decoder"), 5),
    "int8": Layout("prior", lambda: quantised(whole("prior"))),
}
