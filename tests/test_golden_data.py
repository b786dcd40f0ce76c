"""The storage of golden files."""

from __future__ import annotations

import safetensors.torch
import torch

from tools.golden_files import pack, unpack


def test_a_packed_file_is_the_same_when_unpacked() -> None:
    tensors = {"noise": torch.randn(5, 3), "indices": torch.arange(7), "loss": torch.tensor(1.5)}
    data = safetensors.torch.save(tensors, {"config": "{}"})
    assert unpack(pack(data)) == data
