"""Tests that files which cannot be loaded are rejected in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    Payload,
    State,
    comfyui,
    encoder_state,
    manifest_keys,
    random_state,
    stage_c_previewer,
    vae_save,
    write_folder,
)
from helpers.networks import PRIOR, VQ
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import describe, load_prior, load_vqgan, read_metadata, read_part
from wuerstchen_core.checkpoints.damage import names_source
from wuerstchen_core.checkpoints.embeddings import read_embedding
from wuerstchen_core.checkpoints.key_maps import LORA
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.source import ForeignFile
from wuerstchen_core.checkpoints.weight_files import read_json
from wuerstchen_core.cli.prompt_file import read_lines
from wuerstchen_core.common import files
from wuerstchen_core.common.text import LONGEST
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.vqgan import VQGAN
from wuerstchen_core.training.config import read_config


@pytest.fixture(scope="module")
def prior() -> State:
    return random_state(Prior(PRIOR))


@pytest.fixture(scope="module")
def vqgan() -> State:
    return random_state(VQGAN(VQ))


Damage = Callable[[State], None]


def drop(state: State) -> None:
    del state["out.1.bias"]


def add(state: State) -> None:
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}


def reshape(state: State) -> None:
    state["projection.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (drop, r"missing: 1 \(out\.1\.bias\)$"),
        (add, r"unexpected: 5 \(extra\.0, extra\.1, extra\.2 and 2 more\)$"),
        (reshape, r"shape: 1 \(projection\.bias is \[3\], expected \[64\]\)$"),
    ],
)
def test_strict_loading_names_the_keys(prior: State, damage: Damage, fact: str, tmp_path: Path) -> None:
    state = dict(prior)
    damage(state)
    save_file(state, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=fact):
        load_prior(tmp_path / "prior.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_rejected_and_not_run(prior: State, tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": prior, "extra": Payload(tmp_path / "output")}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="Python objects") as raised:
        load_prior(tmp_path / "bad.pt")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "output").exists()


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["safetensors", "pt", "old.pt"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_rejected(vqgan: State, tmp_path: Path, ending: str, fraction: float) -> None:
    path = tmp_path / f"whole.{ending}"
    if ending == "safetensors":
        save_file(vqgan, path)
    else:
        torch.save({"state_dict": vqgan}, path, _use_new_zipfile_serialization=ending == "pt")
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="cut.*download") as raised:
        load_vqgan(write_bytes(tmp_path / "cut", whole[: int(len(whole) * fraction)]))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"<!doctype html><html></html>", "HTML"),
        (b"PK\x03\x04 a zip of something else", "damaged"),
    ],
)
def test_other_files_are_rejected(tmp_path: Path, content: bytes, fact: str) -> None:
    with pytest.raises(ValueError, match=fact) as raised:
        load_prior(write_bytes(tmp_path / "file.safetensors", content))
    assert "\n" not in str(raised.value)


def test_pytorch_file_without_weights_is_rejected(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "log.pt")
    with pytest.raises(ValueError, match=r"log\.pt"):
        load_prior(tmp_path / "log.pt")


def test_missing_parts_files_and_folders_are_named(prior: State, tmp_path: Path) -> None:
    save_file(prior, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"prior\.safetensors.*vqgan"):
        load_vqgan(tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"nothing\.pt"):
        load_prior(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load_prior(tmp_path / "empty")
    with pytest.raises(ValueError, match="unet"):
        read_part(tmp_path / "prior.safetensors", "unet")
    assert read_metadata(tmp_path / "prior.safetensors") == {}
    assert read_metadata(tmp_path) == {}


@pytest.mark.parametrize(
    ("key", "contents"),
    [
        ("double_blocks.0.weight", "a Flux model"),
        # A bundle's prior has the same prefix.
        ("prior.blocks.2.attention.to_q.lora_A.weight", LORA),
        ("prior.blocks.2.attention.processor.to_q_lora.down.weight", LORA),
        *((f"diffusion_model.projection.{name}", LORA) for name in ("hada_w1_a", "lokr_w1", "oft_blocks", "diff_b")),
    ],
)
def test_foreign_file_says_what_it_holds(tmp_path: Path, key: str, contents: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ForeignFile, match=rf"foreign\.safetensors.*{contents}") as raised:
        load_prior(tmp_path / "foreign.safetensors")
    assert raised.value.contents == (contents,)


def test_folder_of_another_pipeline_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "prior", {"clip_txt_pooled_mapper.weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="Stable Cascade"):
        load_prior(tmp_path)


@pytest.mark.parametrize(("levels", "fact"), [(2, "previewer of v2"), (3, "Stable Cascade")])
def test_previewers_are_named(tmp_path: Path, levels: int, fact: str) -> None:
    state = stage_c_previewer(levels)
    if levels == 2:
        assert state.keys() == manifest_keys("v2_previewer")
    torch.save({"state_dict": state, "optimizer_state_dict": {}}, tmp_path / "previewer.pt")
    with pytest.raises(ForeignFile, match=fact) as raised:
        describe(tmp_path / "previewer.pt")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def cascade_stage_c() -> State:
    return {"clip_txt_mapper.weight": torch.zeros(1), "blocks.0.0.weight": torch.zeros(1)}


def cascade_stage_b() -> State:
    names = ("effnet_mapper.0.weight", "pixels_mapper.0.weight", "clip_mapper.weight", "embedding.1.weight")
    return {name: torch.zeros(1) for name in names}


def cascade_encoder() -> State:
    return {key: x for key, x in encoder_state().items() if key not in ("mapper.1.weight", "mapper.1.bias")}


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (cascade_stage_c, dict), (cascade_stage_b, dict), (cascade_encoder, dict), (cascade_stage_c, comfyui),
        (cascade_stage_b, comfyui), (cascade_encoder, vae_save),
    ],
)  # fmt: skip
def test_stable_cascade_is_named_whatever_saved_it(
    tmp_path: Path, make: Callable[[], State], wrap: Callable[[State], State]
) -> None:
    torch.save(wrap(make()), tmp_path / "model.pt")
    with pytest.raises(ForeignFile, match=r"model\.pt.*Stable Cascade"):
        open_source(tmp_path / "model.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.safetensors")
    for read in (describe, read_lora, load_prior, read_embedding):
        with pytest.raises(ValueError, match="it.safetensors is a pipe"):
            read(tmp_path / "it.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [read_json, read_lines, lambda path: read_config(path, [])])
def test_texts_from_pipes_and_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "it")
    monkeypatch.setattr(files, "LARGEST_TEXT", 1000)
    (tmp_path / "large").write_text(" " * 1001)
    for path in (tmp_path / "it", tmp_path / "large", Path("/dev/zero")):
        with pytest.raises(ValueError, match=path.name):
            read(path)


def test_an_error_of_the_disk_names_the_file() -> None:
    @names_source
    def read(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="it.safetensors"):
        read(Path("it.safetensors"))


def test_deeply_nested_metadata_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"wuerstchen": "[" * 100_000})
    for read in (describe, read_metadata):
        with pytest.raises(ValueError, match="it.safetensors"):
            read(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"self_attn": ' + "[" * 600 + "]" * 600 + "}"),
        ("diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "\\u001b[31m"}}'),
        ("diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "' + "x" * 100_000 + '"}}'),
    ],
)
def test_odd_texts_in_a_folder_are_refused_in_one_short_line(
    prior: State, tmp_path: Path, name: str, content: str
) -> None:
    write_folder(tmp_path / "it", prior, {})
    if name != "config.json":
        (tmp_path / "it" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "it" / name).write_text(content)
    for read in (describe, load_prior):
        with pytest.raises(ValueError, match=name) as caught:
            read(tmp_path / "it")
        assert str(caught.value).isprintable() and len(str(caught.value)) <= LONGEST


def test_old_versions_of_torch_read_safetensors_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(VQGAN(VQ))
    torch.save(state, tmp_path / "it.pt")
    save_file(state, tmp_path / "it.safetensors")
    monkeypatch.setattr("wuerstchen_core.common.versions._version", {"torch": "2.9.1+cu128"}.get)
    load_vqgan(tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=r"it\.pt .*2\.9\.1"):
        load_vqgan(tmp_path / "it.pt")
