"""Hostile files in ComfyUI's folders: all others can still be chosen, and loading one gives one line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import TINY, V1
from errors import check_error
from hostile import DEMO, prompt
from node_list import NODES, list_inputs
from safetensors.torch import save_file

from tools.comfyui.client import Server

FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "embeddings", "controlnet")
LOADERS = {
    "WuerstchenBundleLoader": ("bundle", "checkpoints"),
    "WuerstchenModelLoader": ("model_name", "diffusion_models"),
    "WuerstchenTokenDecoderLoader": ("model_name", "diffusion_models"),
    "WuerstchenCLIPLoader": ("clip_name", "text_encoders"),
    "WuerstchenVAELoader": ("vae_name", "vae"),
    "WuerstchenLoraLoader": ("lora_name", "loras"),
    "WuerstchenControlNetLoader": ("control_net_name", "controlnet"),
}
DEEP = "[" * 100_000 + "]" * 100_000
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header(content: Any) -> bytes:
    """Returns a safetensors file of a header, JSON or already a text, and four bytes of data."""
    text = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + bytes(4)


def bundle(key: str = "prior.out.1.bias", **content: Any) -> bytes:
    """Returns a bundle of one tensor, with other metadata."""
    text = json.dumps({"format": 1, "parts": {"prior": {}}, **content})
    return header({"__metadata__": {"wuerstchen": text}, key: TENSOR})


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08",
    "zeros": bytes(100),
    "long header": (2**62).to_bytes(8, "little") + b"{}",
    "no data": header({"a": {**TENSOR, "data_offsets": [0, 10**12], "shape": [10**12 // 4]}}),
    "only a header": header({})[:-4],
    "deep header": header(DEEP),
    "deep entry": header(f'{{"a": {DEEP}}}'),
    "deep metadata": header({"__metadata__": {"wuerstchen": DEEP}, "a": TENSOR}),
    "deep parts": header({"__metadata__": {"wuerstchen": f'{{"format": 1, "parts": {DEEP}}}'}, "a": TENSOR}),
    "metadata is a list": header({"__metadata__": [1], "a": TENSOR}),
    "metadata is a number": header({"__metadata__": {"wuerstchen": 3}, "a": TENSOR}),
    "metadata is null": header({"__metadata__": {"wuerstchen": "null"}, "a": TENSOR}),
    "metadata is no JSON": header({"__metadata__": {"wuerstchen": "{\x1b[31m\ud800"}, "a": TENSOR}),
    "a list": header([1, 2]),
    "entry is a number": header({"prior.a": 1}),
    "dtype is a number": header({"prior.a": {**TENSOR, "dtype": 3}}),
    "negative shape": header({"prior.a": {**TENSOR, "shape": [-1]}}),
    "control characters": header({"prior.\x1b[31m\n\0": TENSOR, "\u202eprior": TENSOR}),
    "odd keys": header({key: TENSOR for key in ("prior.", ".", "", "decoder..", "text_encoder.a")}),
    "parts are a list": bundle(parts=[1]),
    "a part is a number": bundle(parts={"prior": 3}),
    "parts of v1 are odd": bundle(version="v1", parts={"": {}, "a" * 3000: {}, "\x1b[31m": {}, "vqgan": None}),
    "version is a list": bundle(version=["v1"]),
    "version is a number": bundle(version=1e400),
    "params are odd": bundle(parts={"prior": {"c": "x", "depth": 10**30, "nhead": -1}}),
    "many layers": bundle(parts={"prior": {"depth": 10**9}}),
    "layers by a key": bundle(key="prior.blocks.999999999.norm.weight"),
    "ControlNet is odd": bundle(
        key="control_net.hint_stem.weight",
        parts={"control_net": {"prior_depth": 10**30, "widths": "x", "prior_values": [10**400]}},
    ),
    "vocabulary is odd": bundle(vocabulary={"words": {"a": 1}}, sampling={"prior_steps": "x"}),
    "many rows": header(
        {
            "__metadata__": {
                "wuerstchen": json.dumps({"format": 1, "parts": {"prior_text_encoder": {"vocab_size": 10**10}}})
            },
            "prior_text_encoder.token_embedding.weight": {**TENSOR, "shape": [1, 1]},
            "prior_text_encoder.token_embedding.rows": {"dtype": "I64", "shape": [0], "data_offsets": [4, 4]},
        }
    ),
    "adapter": header(
        {"__metadata__": {"lora_adapter_metadata": DEEP, "ss_network_args": DEEP}, "a.lora_A.weight": TENSOR}
    ),
    "quantised": header({"__metadata__": {"_quantization_metadata": DEEP, "config": DEEP}, "a": TENSOR}),
}


@pytest.fixture(scope="module")
def hostile(models: Path) -> Iterator[list[str]]:
    """Puts the hostile files into all folders; yields their names."""
    made = [f"hostile/{name}.{kind}" for name in CONTENTS for kind in ("safetensors", "pt")]
    paths = [models / folder / name for folder in FOLDERS for name in made]
    odd = [models / folder / "hostile" for folder in FOLDERS]
    for folder in odd:
        folder.mkdir()
    for path in paths:
        path.write_bytes(CONTENTS[path.stem])
    for folder in odd:
        (folder / "folder.safetensors").mkdir()
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        (folder / "gone.safetensors").symlink_to("nowhere.safetensors")
        (folder / os.fsdecode(b"\xff\x1b[31m\n.safetensors")).write_bytes(b"x")
        os.mkfifo(folder / "pipe.safetensors")
        save_file({"a": torch.zeros(1)}, folder / "prior of x.safetensors")
    yield [*made, "hostile/loop.safetensors", "hostile/gone.safetensors", "hostile/pipe.safetensors"]
    for folder in odd:
        for path in folder.iterdir():
            path.rmdir() if path.name == "folder.safetensors" else path.unlink()
        folder.rmdir()


def offered(info: dict[str, Any], node: str, name: str) -> list[str]:
    [(kind, options)] = [(kind, options) for key, kind, options in list_inputs(info[node]) if key == name]
    return kind if isinstance(kind, list) else options["options"]


def load(server: Server, info: dict[str, Any], node: str, file: str) -> None:
    graph = prompt(node, info)
    graph[node]["inputs"][LOADERS[node][0]] = file
    outcome = server.run(graph)
    assert outcome.status in ("execution_error", "invalid"), f"{node} {file}"
    if outcome.status == "execution_error":
        check_error(outcome.error)
        assert outcome.error.isprintable(), f"{node} {file}: {outcome.error!r}"


def test_all_other_files_can_be_chosen(server: Server, hostile: list[str]) -> None:
    info = server.get("/object_info")
    assert set(NODES) <= set(info)
    assert {DEMO, TINY, *hostile[:2:2]} <= set(offered(info, "WuerstchenBundleLoader", "bundle"))
    assert f"prior of {V1}" in offered(info, "WuerstchenModelLoader", "model_name")
    for node, (name, _) in LOADERS.items():
        assert any("hostile" in file for file in offered(info, node, name)), node


@pytest.mark.newest
def test_loading_a_hostile_file_gives_one_line(server: Server, hostile: list[str]) -> None:
    info, rng = server.get("/object_info"), random.Random(22)
    for file in rng.sample(hostile, 8):
        load(server, info, rng.choice(list(LOADERS)), file)


@pytest.mark.long
def test_loading_any_hostile_file_gives_one_line(server: Server, hostile: list[str]) -> None:
    info = server.get("/object_info")
    for node in LOADERS:
        for file in hostile:
            load(server, info, node, file)
    assert server.run(prompt("WuerstchenVAEDecode", info)).status == "execution_success"
