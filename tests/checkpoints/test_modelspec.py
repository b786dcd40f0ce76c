"""Tests the header fields in which programs look for a file's architecture, title and trigger words."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from datetime import date
from pathlib import Path

import pytest
import torch
from helpers.lora_forms import FORMS, attention_of_prior, random_factors
from helpers.networks import NETWORKS
from safetensors.torch import load_file, save_file

from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.inspect import describe
from wuerstchen_core.checkpoints.lora_info import describe_lora
from wuerstchen_core.checkpoints.modelspec import FIELD, HASH
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.cli.main import main

STATED = {"title": "My cats", "trigger_words": ["sks cat", "fluffy"], "author": "me", "resolution": "512x512"}
REQUIRED = ("sai_model_spec", "architecture", "implementation", "title")


def tensor_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


@pytest.mark.parametrize(
    ("part", "architecture"),
    [
        ("prior", "wuerstchen-v2-prior"),
        ("decoder", "wuerstchen-v2-decoder"),
        ("token_decoder", "wuerstchen-v1-decoder"),
        ("vqgan", "wuerstchen-vqgan"),
    ],
)
@pytest.mark.parametrize("bare", [True, False])
def test_files_of_parts_say_what_they_are(part: str, architecture: str, bare: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_bundle(path, {part: NETWORKS[part].perturbed()}, {"licence": "MIT"}, bare=bare)
    header = read_file_metadata(path)
    assert header["modelspec.architecture"] == architecture and header["modelspec.license"] == "MIT"
    assert all(header.get(f"modelspec.{name}") for name in REQUIRED)
    assert header["modelspec.date"] == date.today().isoformat()
    assert header[HASH] == f"0x{hashlib.sha256(tensor_bytes(path)).hexdigest()}"


def test_the_hash_is_onetrainers(tmp_path: Path) -> None:
    """OneTrainer hashes the tensors in the order of their keys, which is that of files of one dtype."""
    save_bundle(tmp_path / "x.safetensors", {"prior": NETWORKS["prior"].perturbed()}, {}, bare=True)
    digest = hashlib.sha256()
    for _, x in OrderedDict(sorted(load_file(tmp_path / "x.safetensors").items())).items():
        digest.update(x.contiguous().numpy().tobytes())
    assert read_file_metadata(tmp_path / "x.safetensors")[HASH] == f"0x{digest.hexdigest()}"


def test_what_the_author_stated_is_shown_and_carried_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {FIELD: STATED, "sampling": {"width": 256, "height": 256}}
    parts = {name: NETWORKS[name].perturbed() for name in ("prior", "decoder")}
    save_bundle(tmp_path / "a.safetensors", parts, metadata)
    convert([tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    convert([tmp_path / "b.safetensors"], tmp_path / "parts")
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "parts" / "prior.safetensors"):
        header = read_file_metadata(path)
        assert header["modelspec.architecture"] == "wuerstchen-v2-prior"
        assert header["modelspec.title"] == "My cats" and header["modelspec.trigger_phrase"] == "sks cat, fluffy"
        assert header["modelspec.resolution"] == "512x512" and json.loads(header["trained_words"])[0] == "sks cat"
        assert describe(path).title == "My cats"
        assert main(["inspect", str(path)]) == 0
        assert "sks cat, fluffy" in capsys.readouterr().out
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_resolution_of_a_model_is_that_of_its_pictures(tmp_path: Path) -> None:
    save_bundle(
        tmp_path / "x.safetensors",
        {"prior": NETWORKS["prior"].perturbed()},
        {"sampling": {"width": 256, "height": 128}},
    )
    assert read_file_metadata(tmp_path / "x.safetensors")["modelspec.resolution"] == "256x128"


def test_a_prior_of_onetrainer_keeps_its_title(tmp_path: Path) -> None:
    state = NETWORKS["prior"].perturbed().state_dict()
    header = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": "Theirs", "modelspec.trigger_phrase": "sks"}
    save_file(state, tmp_path / "x.safetensors", header)
    assert describe(tmp_path / "x.safetensors").trigger_words == "sks"
    convert([tmp_path / "x.safetensors"], tmp_path / "y.safetensors")
    assert read_file_metadata(tmp_path / "y.safetensors")["modelspec.title"] == "Theirs"


def test_converted_loras_keep_their_fields_but_not_a_wrong_hash(tmp_path: Path) -> None:
    state = FORMS["kohya"].write(random_factors(attention_of_prior()), {})
    ours = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "Theirs",
        HASH: "0x12",
        "modelspec.date": "2024-01-02",
    }
    for name, header in {"plain": {"ss_output_name": "cats"}, "spec": ours}.items():
        save_file(state, tmp_path / f"{name}.safetensors", header)
        target = tmp_path / f"{name}_comfyui.safetensors"
        convert([tmp_path / f"{name}.safetensors"], target)
        found = read_file_metadata(target)
        assert found[HASH] == f"0x{hashlib.sha256(tensor_bytes(target)).hexdigest()}"
        assert found["modelspec.title"] == describe_lora(target).title == {"plain": "cats", "spec": "Theirs"}[name]
    assert found["modelspec.date"] == "2024-01-02"
    assert (
        read_file_metadata(tmp_path / "plain_comfyui.safetensors")["modelspec.architecture"]
        == "wuerstchen-v2-prior/lora"
    )
    flux = {f"transformer.single_blocks.0.attn.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(flux, tmp_path / "flux.safetensors")
    convert([tmp_path / "flux.safetensors"], tmp_path / "flux2.safetensors")
    assert not read_file_metadata(tmp_path / "flux2.safetensors")
