"""Frozen networks in 16 bits and int8: their gradients, what stays in fp32, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_training import write_config
from helpers.networks import NETWORKS
from helpers.recording_trainer import CONFIG, LineStage
from torch import Tensor

from wuerstchen_core.models.int8 import Int8Linear, is_int8, set_dtype, use_int8
from wuerstchen_core.models.operations import Linear
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.loop import train
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run_folder import changes
from wuerstchen_core.training.stages.adapters import AdapterConfig, attach
from wuerstchen_core.training.stages.decoder import DecoderStage
from wuerstchen_core.training.stages.lora import LoraStage

pytest.importorskip("peft", reason="LoRAs are trained with peft")
KINDS = ("lora", "loha", "lokr")


@pytest.mark.parametrize("name", ["prior", "decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_int8_have_the_gradients_of_the_restored_weights(name: str, kind: str) -> None:
    network = NETWORKS[name].perturbed()
    use_int8(network)
    restored = copy.deepcopy(network)
    set_dtype(restored, torch.float32)
    gradients = []
    for one in (network, restored):
        torch.manual_seed(0)
        attach(one, AdapterConfig(kind=kind, targets=("to_q", "kv_mapper.1", "channelwise.4")))
        for p in one.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        one.train()(*NETWORKS[name].inputs()).square().mean().backward()
        gradients.append({key: p.grad for key, p in one.named_parameters() if p.requires_grad})
    assert is_int8(network) and gradients[0]
    for key, x in gradients[0].items():
        assert x is not None and x.any()
        assert_near(x, gradients[1][key], 1e-5 * float(gradients[1][key].abs().max()))


def test_a_step_keeps_no_restored_weights() -> None:
    layer, sizes = Int8Linear.of(Linear(48, 40)), []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(3, 48, requires_grad=True)).sum().backward()
    assert max(sizes, default=0) < 48 * 40


@pytest.mark.parametrize(("frozen", "autocast"), [("bf16", True), ("int8", False), ("int8", True)])
def test_a_lora_trains_on_a_rounded_model(frozen: str, autocast: bool, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    config, losses = write_config(tmp_path, bundle), []
    for each in (frozen, "fp32"):
        torch.manual_seed(0)
        stage = LoraStage(read_config(config, [f"run='{tmp_path}'", "lora.dropout=0", f"train.frozen='{each}'"]))
        rng = StepRandom(0, 0, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and each == frozen):
            loss = stage.loss(stage.net.train(), *stage.batch(0, rng))
        loss.backward()
        losses.append(loss.item())
        trained = [p for p in stage.net.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained) and sum(bool(p.grad.any()) for p in trained) > 10
        dtypes = {p.dtype for p in stage.net.parameters() if not p.requires_grad and p.ndim == 2}
        assert {"bf16": torch.bfloat16, "int8": torch.int8, "fp32": torch.float32}[each] in dtypes
        assert next(stage.encoder.parameters()).dtype == torch.float32
    assert 0 < abs(losses[0] - losses[1]) < 0.01 * losses[1]


class TowerStage(LineStage):
    has_large_frozen = True


def test_what_is_impossible_is_refused(bundle: Path, tmp_path: Path) -> None:
    for stage, frozen, message in ((LineStage(), "int8", "no effect"), (TowerStage(), "bf16", "precision")):
        with pytest.raises(ValueError, match=message):
            train(stage, replace(CONFIG, frozen=frozen), tmp_path)
    overrides = [f"run='{tmp_path}'", "lora.kind='dora'", "train.frozen='int8'"]
    with pytest.raises(ValueError, match="dora"):
        LoraStage(read_config(write_config(tmp_path, bundle), overrides))
    assert DecoderStage.has_large_frozen
    differences: dict[str, Any] = changes({"train": {"frozen": "fp32"}}, {"train": {"frozen": "int8"}})
    assert list(differences) == ["[train] frozen"]
