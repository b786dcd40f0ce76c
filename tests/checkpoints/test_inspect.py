"""Tests `describe`, which reads no weights."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.golden_data import manifests
from helpers.networks import NETWORKS
from helpers.tiny_model import tiny_parts
from safetensors.torch import save_file
from torch.serialization import skip_data

from wuerstchen_core.checkpoints import PARTS_OF, describe, read_metadata, save_bundle
from wuerstchen_core.checkpoints.components import BUNDLE_LOADER, component
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import open_source

ROOT = Path(__file__).parents[2]


def full_size_file(path: Path, tensors: dict[str, Any]) -> Path:
    """Writes a sparse safetensors file of the published size, which takes no disk space."""
    header, offset = {}, 0
    for key, (shape, dtype) in tensors.items():
        size = int(torch.Size(shape).numel()) * {"F32": 4, "I64": 8}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return path


@pytest.mark.parametrize(
    ("name", "part", "version", "tower", "node"),
    [
        ("orig_v2_stage_c_prior", "prior", "v2", "CLIP-bigG (width 1280)", "Model"),
        ("orig_v1_stage_c_prior", "prior", "v1 (or v2's first file, of June 2023)", "CLIP-H (width 1024)", "Model"),
        ("diffusers_diffnext", "decoder", "v2", "CLIP-H (width 1024)", "Model"),
        ("orig_v1_stage_b_paella", "token_decoder", "v1", "CLIP-H (width 1024)", "Token Decoder"),
        ("orig_stage_a_vqmodel", "vqgan", "v1 and v2 alike", None, "VAE"),
        ("orig_v2_effnet_s", "image_encoder", "v2", None, "VAE"),
        ("orig_v1_effnet_l", "image_encoder", "v1", None, "VAE"),
    ],
)
def test_published_files(tmp_path: Path, name: str, part: str, version: str, tower: str | None, node: str) -> None:
    published = manifests()[name]
    description = describe(full_size_file(tmp_path / "file.safetensors", published["tensors"]))
    assert description.kind == "weights only"
    assert description.version == version
    [info] = description.parts
    assert (info.name, info.dtype, info.parameters) == (part, "fp32", published["parameters"])
    assert info.node == f"Würstchen {node} Loader"
    assert description.text_towers == ({part: tower} if tower else {})
    release = "v1" if version.startswith("v1 (") or version == "v1" else "v2"
    assert description.missing == tuple(other for other in PARTS_OF[release] if other != part)


def test_a_file_of_four_gigabytes_is_described_at_once(tmp_path: Path) -> None:
    """Both formats are described from their headers, in less than 2 seconds."""
    tensors = manifests()["orig_v1_stage_c_prior"]["tensors"]
    safetensors = full_size_file(tmp_path / "prior.safetensors", tensors)
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in tensors.items()}
    with skip_data():
        state = {key: torch.empty(x.shape) for key, x in state.items()}  # never read or written
        torch.save({"ema_state_dict": state}, tmp_path / "model_stage_c.pt")
    del state
    describe(tmp_path / "model_stage_c.pt")
    for path in (safetensors, tmp_path / "model_stage_c.pt"):
        assert path.stat().st_size > 3_970_000_000
        started = time.perf_counter()
        assert describe(path).parts[0].parameters == 993_243_680
        assert time.perf_counter() - started < 2


def test_only_headers_are_read(tmp_path: Path) -> None:
    tensors = {"embeddings.token_embedding.weight": torch.zeros(9, 64)}
    tensors |= {f"encoder.layers.0.self_attn.{name}_proj.bias": torch.zeros(64) for name in "qkv"}
    save_file(tensors, tmp_path / "model.safetensors")
    tower = open_source(tmp_path / "model.safetensors").networks["prior_text_encoder"].tensors
    assert tower["transformer.resblocks.0.attn.in_proj_bias"].shape == (192,)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tower["transformer.resblocks.0.attn.in_proj_bias"].load()


def test_bundle(tmp_path: Path) -> None:
    parts = tiny_parts()
    metadata = {"licence": "Apache-2.0", "vocabulary": {"words": ["a", "cat"]}}
    path = tmp_path / "bundle.safetensors"
    save_bundle(path, parts, metadata, dtype=torch.bfloat16)
    description = describe(path)
    assert (description.kind, description.version, description.missing) == ("bundle", "v2", ())
    assert [part.name for part in description.parts] == ["prior", "decoder", "vqgan", "image_encoder", "text_encoder"]
    assert {part.dtype for part in description.parts} == {"bf16"}
    for info in description.parts:
        network = parts.get(info.name, parts["prior_text_encoder"])
        assert info.parameters == sum(x.numel() for x in network.parameters())
    assert (description.vocabulary, description.licence) == (2, "Apache-2.0")
    lines = description.lines()
    assert lines[0] == f"{path}: bundle, v2"
    assert lines[1].startswith("  prior (Stage C): ") and "bf16" in lines[1] and "c_cond 32" in lines[1]
    assert lines[-1] == "  complete"
    assert json.loads(json.dumps(asdict(description)))["parts"][0]["sizes"]["c"] == 64


@pytest.fixture(scope="module")
def loaders() -> Iterator[Any]:
    """The module nodes/model_files.py, with `folders.root` as every folder of ComfyUI."""

    def split_bundles() -> dict[str, tuple[str, ...]]:
        bundles = {path.name: read_metadata(path) for path in folders.root.glob("*.safetensors")}
        return {name: tuple(x["parts"]) for name, x in bundles.items() if x.get("version") == "v1"}

    folders: Any = ModuleType("node_pack.nodes.host.folders")
    folders.file_names = lambda folder: []
    folders.file_path = lambda folder, name: folders.root / name
    folders.bundle_path = lambda name: folders.root / name
    folders.split_bundles = split_bundles
    sys.modules[folders.__name__] = folders
    for name, path in (("node_pack", ROOT), ("node_pack.nodes", ROOT / "nodes"), ("node_pack.nodes.host", ROOT)):
        package: Any = ModuleType(name)
        package.__path__, package.folders = [str(path)], folders
        sys.modules[name] = package
    yield importlib.import_module("node_pack.nodes.model_files")
    for name in [name for name in sys.modules if name.partition(".")[0] == "node_pack"]:
        del sys.modules[name]


WHOLE = BUNDLE_LOADER
TOWERS = ("prior_text_encoder", "decoder_text_encoder")
BUNDLES = {  # parts of a bundle, and those that no node can load from it
    "all": (PARTS_OF["v2"], ()),
    "all but the image encoder": (PARTS_OF["v2"][:3] + TOWERS, ("prior", "decoder")),
    "no towers": (("prior", "decoder", "vqgan"), ("prior", "decoder")),
    "two towers": (TOWERS, TOWERS),
    "images": (("vqgan", "image_encoder", "prior"), ("vqgan", "image_encoder")),
    "one per loader": (("decoder", "vqgan", "prior_text_encoder"), ()),
    "one": (("prior",), ()),
    "v1": (PARTS_OF["v1"], ()),
    "half of v1": (("prior", "token_decoder", "vqgan", "image_encoder"), ()),
}


@pytest.mark.parametrize("content", BUNDLES)
def test_loaders_load_what_the_description_says(tmp_path: Path, loaders: Any, content: str) -> None:
    loaders.folders.root = tmp_path
    names, unloadable = BUNDLES[content]
    parts = tiny_parts("v1" if "v1" in content else "v2")
    if content == "two towers":
        parts["decoder_text_encoder"] = NETWORKS["text_encoder"].build()
    file = tmp_path / "file.safetensors"
    save_bundle(file, {name: parts[name] for name in names}, {})
    description = describe(file)
    assert tuple(part.name for part in description.parts if part.node is None) == unloadable
    for part in description.parts:
        possible = {part.name, f"prior_{part.name}"}
        loader = component(part.name).loader
        if part.node is None:
            with pytest.raises(ValueError, match=r"file\.safetensors"):
                loaders.open_from(file.name, loader)
            assert not set(PARTS_OF["v2"]) <= set(names)  # the bundle loader needs all of them
        elif part.node == loader.node and part.folder == loader.folder:
            assert loaders.open_from(file.name, loader)[1] in possible
        elif part.node == loader.node:
            offered = [loaders.open_from(name, loader)[1] for name in loaders.choices(loader)]
            assert part.folder == "checkpoints" and possible & set(offered)
        else:
            assert (part.folder, part.node) == WHOLE and set(PARTS_OF["v2"]) <= set(names)


def test_parts_without_a_loader_are_to_be_converted(tmp_path: Path) -> None:
    """After converting, each part has a loader."""
    parts, file = tiny_parts(), tmp_path / "half.safetensors"
    save_bundle(file, {name: parts[name] for name in ("prior", "decoder", "vqgan")}, {})
    assert describe(file).lines()[-4:] == [
        "  in ComfyUI: no node loads prior, decoder from this file; use `convert` to make",
        "    single files, or one bundle with the missing parts",
        "  in ComfyUI: models/vae, Würstchen VAE Loader (vqgan)",
        "  missing for a complete model: image_encoder (only needed for images as input), prior_text_encoder, "
        "decoder_text_encoder",
    ]
    for single in (tmp_path / "single", *convert([file], tmp_path / "single")):
        assert all(part.node for part in describe(single).parts)
    missing = tmp_path / "missing.safetensors"
    save_bundle(missing, {name: parts[name] for name in describe(file).missing}, {})
    [whole] = convert([file, missing], tmp_path / "whole.safetensors")
    assert {(part.folder, part.node) for part in describe(whole).parts} == {WHOLE}


def test_original_stage_b_of_v1(tmp_path: Path) -> None:
    states = {}
    for key, name in (("state_dict", "orig_v1_stage_b_paella"), ("effnet_state_dict", "orig_v1_effnet_l")):
        tensors = manifests()[name]["tensors"]
        states[key] = {key: torch.zeros(()).expand(shape) for key, (shape, _) in tensors.items()}
    torch.save(states, tmp_path / "model_stage_b.pt")
    description = describe(tmp_path / "model_stage_b.pt")
    assert (description.kind, description.version) == ("state_dict + effnet_state_dict", "v1")
    assert [part.name for part in description.parts] == ["token_decoder", "image_encoder"]
    assert description.lines()[-3:] == [
        "  in ComfyUI: models/diffusion_models, Würstchen Token Decoder Loader (token_decoder)",
        "  in ComfyUI: models/vae, Würstchen VAE Loader (image_encoder)",
        "  missing for a complete model: prior, vqgan, prior_text_encoder, decoder_text_encoder",
    ]


def test_diffusers_folder(tmp_path: Path) -> None:
    for name, kind in (("prior", "prior"), ("text_encoder", "text_encoder")):
        (tmp_path / name).mkdir()
        save_file(NETWORKS[kind].perturbed().state_dict(), tmp_path / name / "model.safetensors")
    (tmp_path / "text_encoder" / "config.json").write_text('{"num_attention_heads": 2, "hidden_act": "gelu"}')
    description = describe(tmp_path)
    assert description.kind == "diffusers folder"
    assert [part.name for part in description.parts] == ["prior", "prior_text_encoder"]
    assert description.missing == ("decoder", "vqgan", "image_encoder", "decoder_text_encoder")


def test_another_projects_file_is_rejected(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion"):
        describe(tmp_path / "sd.safetensors")
