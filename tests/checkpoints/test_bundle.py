"""Tests bundles: what is saved loads back exactly, and a failed save leaves the old file."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import NETWORKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from wuerstchen_core.checkpoints import PARTS, build_part, load_prior, read_metadata, read_part, save_bundle, writer

KINDS = [(name, "text_encoder" if name.endswith("text_encoder") else name) for name in PARTS]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """All parts; both stages share one text tower."""
    built = {kind: NETWORKS[kind].perturbed() for kind in NETWORKS}
    return {name: built[kind] for name, kind in KINDS}


@pytest.fixture()
def saved(networks: dict[str, nn.Module], tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "bundle.safetensors"
    save_bundle(path, networks, {"licence": "MIT", "vocabulary": {"words": ["Würstchen"]}})
    return path


def rewrite(path: Path, metadata: dict[str, str] | None) -> None:
    """Replaces the metadata of a file and keeps its tensors."""
    tensors = {key: x.clone() for key, x in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("name", PARTS)
def test_round_trip_is_exact(networks: dict[str, nn.Module], saved: Path, name: str) -> None:
    part = read_part(saved, name)
    assert part.params == networks[name].params
    loaded, original = build_part(part).state_dict(), networks[name].state_dict()
    assert loaded.keys() == original.keys()
    assert all(x.dtype == original[key].dtype and x.equal(original[key]) for key, x in loaded.items())


def test_a_part_that_was_read_round_trips(saved: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "copy", {name: read_part(saved, name) for name in PARTS}, read_metadata(saved))
    assert (tmp_path / "copy").read_bytes() == saved.read_bytes()
    save_bundle(
        saved, {name: read_part(saved, name) for name in PARTS}, read_metadata(saved)
    )  # replaces the memory-mapped file
    assert (tmp_path / "copy").read_bytes() == saved.read_bytes()


def test_equal_towers_are_stored_once(networks: dict[str, nn.Module], saved: Path, tmp_path: Path) -> None:
    with safe_open(saved, "pt") as file:
        prefixes = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert prefixes == set(NETWORKS)
    other = NETWORKS["text_encoder"].build()
    towers = {"prior_text_encoder": networks["prior_text_encoder"], "decoder_text_encoder": other}
    save_bundle(tmp_path / "two", towers, {})
    assert set(read_metadata(tmp_path / "two")["parts"]) == set(towers)
    for name, tower in towers.items():
        assert build_part(read_part(tmp_path / "two", name)).ln_final.weight.equal(tower.ln_final.weight)


def test_metadata(networks: dict[str, nn.Module], saved: Path) -> None:
    metadata = read_metadata(saved)
    assert metadata["format"] == 1
    assert "version" not in metadata  # it holds the decoders of both releases
    assert metadata["licence"] == "MIT"
    assert metadata["vocabulary"] == {"words": ["Würstchen"]}
    assert set(metadata["parts"]) == set(NETWORKS)
    assert metadata["parts"]["prior"]["c"] == networks["prior"].params.c
    for name, version in (("token_decoder", "v1"), ("decoder", "v2"), ("vqgan", None)):
        save_bundle(saved, {name: networks[name]}, {})
        assert read_metadata(saved).get("version") == version


def test_bf16_halves_the_file_and_rounds_once(networks: dict[str, nn.Module], saved: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "small", networks, {}, dtype=torch.bfloat16)
    assert (tmp_path / "small").stat().st_size < 0.6 * saved.stat().st_size
    state = build_part(read_part(tmp_path / "small", "vqgan"), dtype=torch.float32).state_dict()
    for key, x in networks["vqgan"].state_dict().items():
        assert state[key].dtype == x.dtype
        assert state[key].equal(x.bfloat16().to(x.dtype) if x.is_floating_point() else x)


def test_a_bundle_has_the_permissions_of_any_file(saved: Path) -> None:
    (saved.parent / "other").touch()
    assert saved.stat().st_mode == (saved.parent / "other").stat().st_mode


def test_fp8_is_for_storage_only(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    key = "token_embedding.weight"
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    save_bundle(tmp_path / "small", networks, {}, dtype=lambda part, name, x: fp8 if name == key else bf16)
    stored = load_file(tmp_path / "small")
    assert stored[f"text_encoder.{key}"].dtype == fp8
    assert all(x.dtype != fp8 for name, x in stored.items() if name != f"text_encoder.{key}")
    scale = stored["text_encoder.token_embedding.weight_scale"]
    tower = build_part(read_part(tmp_path / "small", "prior_text_encoder"))
    table = networks["prior_text_encoder"].state_dict()[key]
    assert tower.state_dict()[key].equal(((table / scale).to(fp8).float() * scale).bfloat16())
    assert tower(torch.tensor([[1, 2]]), torch.ones(1, 2)).isfinite().all()


def test_a_bundle_of_some_parts(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    save_bundle(tmp_path / "prior.safetensors", {"prior": networks["prior"]}, {})
    assert load_prior(tmp_path / "prior.safetensors").params == networks["prior"].params
    with pytest.raises(ValueError, match=r"prior\.safetensors.*vqgan"):
        read_part(tmp_path / "prior.safetensors", "vqgan")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("int8", torch.int8), ("fp16", torch.float16), ("auto", torch.float32)]
)
def test_a_network_is_loaded_in_a_named_dtype(saved: Path, dtype: str, expected: torch.dtype) -> None:
    prior = load_prior(saved, dtype=dtype)
    assert prior.get_parameter("blocks.2.attention.to_q.weight").dtype == expected
    with pytest.raises(ValueError, match="int4"):
        load_prior(saved, dtype="int4")


def test_bundle_without_metadata_loads_by_its_tensors(networks: dict[str, nn.Module], saved: Path) -> None:
    rewrite(saved, None)
    for name in ("prior", "decoder", "vqgan"):
        assert read_part(saved, name).params == networks[name].params
        build_part(read_part(saved, name))
    with pytest.raises(ValueError, match="stage table"):
        read_part(saved, "image_encoder")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"format": 2}, "format 2"),
        ({"parts": []}, "damaged"),
        ({"parts": {"prior": {"colour": 1}}}, "colour"),
        ({"parts": {"prior": {"c": "wide"}}}, r"\[prior\] c .*wide"),
        ({"parts": {"prior": 5}}, "prior.*5"),
        ({"parts": {"prior": {"c": 128, "nhead": 2}}}, "prior.*wrong shape"),
    ],
)
def test_invalid_metadata_is_rejected(saved: Path, change: dict[str, Any], fact: str) -> None:
    rewrite(saved, {"wuerstchen": json.dumps(read_metadata(saved) | change)})
    with pytest.raises(ValueError, match=fact):
        load_prior(saved)


def test_damaged_metadata_is_rejected(saved: Path) -> None:
    rewrite(saved, {"wuerstchen": "{"})
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(saved)


def test_failure_leaves_the_old_file_and_nothing_else(
    networks: dict[str, nn.Module], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write", full_disk)
    with pytest.raises(OSError, match=r"bundle\.safetensors.*disk is full"):
        save_bundle(saved, networks, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_invalid_parts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        save_bundle(tmp_path / "x", {}, {})
    with pytest.raises(ValueError, match="unet"):
        save_bundle(tmp_path / "x", {"unet": nn.Linear(1, 1)}, {})
    assert not list(tmp_path.iterdir())
