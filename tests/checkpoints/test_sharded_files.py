"""Tests folders with sharded weights, with every file name of diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.layouts import State, random_state
from helpers.networks import PRIOR
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import load_prior
from wuerstchen_core.models.prior import Prior

# File names of the shards by that of the index.
SPELLINGS = {
    "diffusion_pytorch_model.safetensors.index.json": "diffusion_pytorch_model-0000{}-of-00002.safetensors",
    "diffusion_pytorch_model.bin.index.json": "diffusion_pytorch_model-0000{}-of-00002.bin",
    "pytorch_model.bin.index.json": "pytorch_model-0000{}-of-00002.bin",
    "diffusion_pytorch_model.safetensors.index.fp16.json": "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
    "diffusion_pytorch_model.fp16.safetensors.index.json": "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
    "model.safetensors.index.fp16.json": "model.fp16-0000{}-of-00002.safetensors",
    "pytorch_model.bin.index.fp16.json": "pytorch_model.fp16-0000{}-of-00002.bin",
    "pytorch_model.fp16.bin.index.json": "pytorch_model.fp16-0000{}-of-00002.bin",
}


def write_shards(folder: Path, index: str, state: State) -> Path:
    """Writes two shards and their index; returns the second shard."""
    files = [folder / SPELLINGS[index].format(number) for number in (1, 2)]
    weight_map: dict[str, str] = {}
    for half, file in enumerate(files):
        own = {key: state[key] for key in list(state)[half::2]}
        (save_file if file.suffix == ".safetensors" else torch.save)(own, file)
        weight_map |= dict.fromkeys(own, file.name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files[1]


@pytest.mark.parametrize("index", SPELLINGS)
def test_a_sharded_folder_is_read_completely_or_rejected(tmp_path: Path, index: str) -> None:
    dtype = torch.float16 if "fp16" in index else torch.float32
    state = {key: x.to(dtype) for key, x in random_state(Prior(PRIOR)).items()}
    second = write_shards(tmp_path, index, state)
    loaded = load_prior(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(x.dtype == dtype and x.equal(state[key]) for key, x in loaded.items())
    for names in (3, None, "../other.safetensors", "/other.safetensors"):
        damaged = tmp_path / "damaged" / index
        damaged.parent.mkdir(exist_ok=True)
        damaged.write_text(json.dumps({"weight_map": dict.fromkeys(state, names)}))
        with pytest.raises(ValueError, match=r"index.*json"):
            load_prior(damaged.parent)
    second.unlink()
    with pytest.raises(ValueError, match=second.name):
        load_prior(tmp_path)
