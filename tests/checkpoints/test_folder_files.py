"""Finds the weights in diffusers' folders with variants, and in the hub's cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers.layouts import random_state
from helpers.networks import PRIOR
from safetensors.torch import load_file, save_file
from torch import Tensor

from wuerstchen_core.checkpoints import describe, load_prior, read_part
from wuerstchen_core.checkpoints.folder_files import weights_in
from wuerstchen_core.models.prior import Prior

CONFIG = json.dumps({"_class_name": "WuerstchenPrior", "nhead": PRIOR.nhead})


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    return [random_state(Prior(PRIOR), seed) for seed in range(2)]


def write(folder: Path, name: str, state: dict[str, Tensor]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.json").write_text(CONFIG)
    if not name.endswith(".json"):
        return save_file(state, path)
    places = {key: f"shard-{i % 2}.safetensors" for i, key in enumerate(state)}
    for shard in set(places.values()):
        save_file({key: x for key, x in state.items() if places[key] == shard}, path.parent / shard)
    path.write_text(json.dumps({"weight_map": places}))


def is_state(folder: Path, state: dict[str, Tensor]) -> bool:
    found = read_part(folder, "prior").state_dict
    return found.keys() == state.keys() and all(x.equal(state[key]) for key, x in found.items())


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.fp32.safetensors",
        "diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
        "diffusion_pytorch_model.mine.safetensors", "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.bf16.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.non_ema.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["prior", "prior_ema", "."])
def test_variants(states: list[dict[str, Tensor]], tmp_path: Path, name: str, part: str) -> None:
    write(tmp_path, f"{part}/{name}", states[0])
    assert is_state(tmp_path, states[0])
    load_prior(tmp_path)
    assert [info.name for info in describe(tmp_path).parts] == ["prior"]


@pytest.mark.parametrize(
    ("used", "other"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.ema.safetensors"),
        ("diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
        ("diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.mine.safetensors"),
        ("diffusion_pytorch_model.mine.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
    ],
)
def test_full_weights_precede_variants(
    states: list[dict[str, Tensor]], tmp_path: Path, used: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, used, states[0])
    write(tmp_path, other, states[1])
    with caplog.at_level(logging.WARNING):
        assert weights_in(tmp_path) == tmp_path / used
        assert is_state(tmp_path, states[0])
    is_full = used.count(".") == 1 or used.endswith("safetensors.index.json")
    assert (used in caplog.text) != is_full  # a choice between variants is logged


def test_the_average_beside_a_network(
    states: list[dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "prior/diffusion_pytorch_model.safetensors", states[0])
    write(tmp_path, "prior_ema/diffusion_pytorch_model.safetensors", states[1])
    assert is_state(tmp_path, states[0])
    assert "prior_ema" in caplog.text


def hub(root: Path, snapshots: dict[str, dict[str, Tensor]], main: str | None) -> Path:
    """Writes a model as huggingface_hub caches it: files are links into `blobs`."""
    cache = root / "models--warp-ai--wuerstchen-prior"
    for name, state in snapshots.items():
        blob = cache / "blobs" / f"{name}-blob"
        blob.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, blob)
        folder = cache / "snapshots" / name / "prior"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(CONFIG)
        (folder / "diffusion_pytorch_model.safetensors").symlink_to(blob)
    if main is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    return cache


def test_the_hubs_cache(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    cache = hub(tmp_path, {"aaa": states[0], "bbb": states[1]}, "bbb\n")
    for source in (cache, cache / "snapshots", cache / "snapshots" / "bbb"):
        assert is_state(source, states[1])
    assert is_state(cache / "snapshots" / "aaa", states[0])
    with pytest.raises(ValueError, match="models--warp-ai--wuerstchen-prior"):
        describe(tmp_path)
    (cache / "refs" / "main").write_text("ccc")
    with pytest.raises(ValueError, match=r"refs.main.*ccc"):
        describe(cache)
    (cache / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="2 snapshots .aaa, bbb"):
        describe(cache)


def test_the_hubs_cache_with_one_snapshot_needs_no_ref(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    cache = hub(tmp_path, {"aaa": states[0]}, None)
    assert is_state(cache, states[0])
    [blob] = (cache / "blobs").iterdir()
    assert load_file(blob).keys() == states[0].keys()
    blob.unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors.*missing"):
        describe(cache)
