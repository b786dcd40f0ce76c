"""Networks stored in few bits, loaded in part or on demand, and evicted: the results stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY, V1
from inside_memory import STORED, TIMES
from torch import Tensor

from tools.comfyui.client import Inside, Install, run_inside

pytestmark = pytest.mark.newest

STAGES = ("prior", "decoder", "token_decoder")


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    folder = tmp_path_factory.mktemp("memory")
    return run_inside(install, "inside_memory.py", folder, checkpoints / TINY, checkpoints / V1, folder)


def assert_same(tensors: dict[str, Tensor], name: str) -> None:
    torch.testing.assert_close(tensors[f"got/{name}"], tensors[f"want/{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("stage", STAGES)
def test_stored_weights_are_rounded_once_and_computed_in_fp32(inside: Inside, stage: str, dtype: str) -> None:
    """Equal to the core with rounded weights, those of norms included."""
    tensors, facts = inside
    assert facts[f"{stage} {dtype}"] == [str(STORED[dtype])]
    assert_same(tensors, f"{stage} {dtype}")
    assert (tensors[f"got/{stage} {dtype}"] - tensors[f"plain/{stage}"]).abs().max() > 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_computation_is_close_at_every_time(inside: Inside, stage: str) -> None:
    """The time embedding (up to 10,000 radians) and the head's division are computed in fp32."""
    tensors, facts = inside
    assert facts[f"{stage} computes in"] == "torch.float16"
    plain = tensors[f"plain/{stage}"]
    for i in range(len(TIMES)):
        error = (tensors[f"half/{stage}"][i] - plain[i]).std() / plain[i].std()
        assert 0 < error < (2e-3 if stage == "token_decoder" else 1e-3)  # 2^-11 is 5e-4; observed 1.5e-3 and 4e-4


@pytest.mark.parametrize("way", ["plain", "lora", "merge"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_partial_load_equals_a_full_load(inside: Inside, stage: str, way: str) -> None:
    tensors, facts = inside
    loaded, size = facts[f"{stage} got {way}"]
    assert 0 < loaded < size and facts[f"{stage} want {way}"] == [size, size]
    assert_same(tensors, f"{stage} partial {way}")
    if way != "plain":
        assert (tensors[f"got/{stage} partial {way}"] - tensors[f"plain/{stage}"]).std() > 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_layers_built_without_weights_are_loaded(inside: Inside, stage: str) -> None:
    tensors, facts = inside
    if not facts["dynamic"]:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    built, total = facts[f"{stage} weights before loading"]
    assert built < total
    assert_same(tensors, f"{stage} dynamic")


def test_models_evict_each_other_and_return_unchanged(inside: Inside) -> None:
    """A device with room for one network: two Würstchen models and another model in turn, bit for bit."""
    tensors, facts = inside
    assert facts["most at once"] == 1
    assert {"PriorModel", "DecoderModel", "VQGAN"} <= set(facts["loaded in turn"])
    assert facts["around the other model"] == [["SemanticCompressor"], ["BaseModel"]]
    for name in ("first", "second", "other", "freed"):
        assert torch.equal(tensors[f"got/{name}"], tensors[f"want/{name}"]), name


def test_unloaded_models_leave_no_memory(inside: Inside) -> None:
    _, facts = inside
    assert facts["after free_memory"] == [] and facts["after unload_all_models"] == 0
    assert facts["networks"] == 13 and facts["alive"] == 0


def test_memory_estimates_are_slightly_above_the_measured_peak(inside: Inside) -> None:
    """Bytes alive at once in one call on the "meta" device; docs/memory.md lists all."""
    rows = inside[1]["counted"]
    assert len(rows) == 12
    for case, (counted, estimate) in rows:
        name, *_, batch = case  # Stage A's estimate is per image, and a batch holds no more bands
        assert 1 < estimate / counted < 1.5 * (batch if name == "Stage A decode" else 1), case


@pytest.mark.parametrize("stage", STAGES)
def test_memory_estimates_grow_with_area_batch_and_dtype(inside: Inside, stage: str) -> None:
    estimates = inside[1][f"{stage} estimates"]
    one, twice = estimates["one"], estimates["twice the area"]
    grows = twice - one
    assert estimates["thrice the area"] == one + 2 * grows and 0 < grows <= one
    # A prior's keys and values grow with the batch; Stage B's merged matrices do not grow.
    assert estimates["batch of 2"] == (2 * one if stage == "prior" else one + grows)
    assert estimates["fp16"] == estimates["one"] / (1 if stage == "token_decoder" else 2)  # its logits are fp32's
    assert 0 < estimates["one"] < 1e6  # ComfyUI's own formula: 14 MB and 181 MB
