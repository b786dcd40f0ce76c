"""Trained LoRAs and embeddings in ComfyUI's lists and its model library, with their pictures and metadata."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundles import TINY, Generate, Graph, find
from helpers.picture_folders import examples, write_folder
from images import JPEG, LIMIT, deviation, difference
from PIL import Image

from tools.comfyui.client import Server
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.training.run import run

CONFIG = """
[inputs]
prior = {bundle}
encoder = {bundle}
text = {bundle}
decoder = {bundle}
vqgan = {bundle}
[data]
source = {pictures}
size = 64
multiple = 64
workers = 0
[train]
steps = 1
batch = 2
lr = 0.1
warmup = 0
decay = 0.0
ema = 0.0
[modelspec]
title = "My foxes"
trigger_words = ["sks fox"]
"""
TABLES = {"lora": '[lora]\ntext_targets = ["q_proj"]\n', "embedding": '[embedding]\nname = "my-fox"\ninit = "red"\n'}
FILES = {"loras": ("lora", "my foxes"), "embeddings": ("embedding", "my-fox")}  # stage and name by ComfyUI's folder


@pytest.fixture(scope="module")
def trained(models: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained files in ComfyUI's folders, by folder; each has its picture beside it."""
    root = tmp_path_factory.mktemp("training")
    pictures = write_folder(root / "pictures", examples(range(2), 64, 64))
    places = {"bundle": json.dumps(str(checkpoints / TINY)), "pictures": json.dumps(str(pictures))}
    files = {}
    for folder, (stage, name) in FILES.items():
        path = root / f"{stage}.toml"
        path.write_text(f"run = {json.dumps(str(root))}\n{CONFIG.format(**places)}{TABLES[stage]}", encoding="utf-8")
        weights = run(stage, path, [])
        files[folder] = models / folder / f"{name}.safetensors"
        for file in (weights, weights.with_suffix(".png")):
            shutil.copyfile(file, files[folder].with_suffix(file.suffix))
    return files


@pytest.mark.parametrize("folder", FILES)
def test_a_trained_file_has_its_picture_and_metadata(folder: str, server: Server, trained: dict[str, Path]) -> None:
    name = trained[folder].name
    path = name.replace(" ", "%20")
    [listed] = [file for file in server.get(f"/experiment/models/{folder}") if file["name"] == name]
    shown = Image.open(io.BytesIO(server.read(f"/experiment/models/preview/{folder}/{listed['pathIndex']}/{path}")))
    with Image.open(trained[folder].with_suffix(".png")) as picture:
        assert shown.size == picture.size
        assert difference(*(x.resize((8, 8), Image.Resampling.BOX) for x in (shown, picture))) < JPEG
    header = server.get(f"/view_metadata/{folder}?filename={path}")
    assert header["modelspec.title"] == "My foxes" and json.loads(header["trained_words"]) == ["sks fox"]
    assert header["modelspec.architecture"].startswith("wuerstchen-v2-prior/")


def test_a_trained_lora_and_embedding_give_the_image_that_python_generates(
    server: Server, graph: Graph, generate: Generate, trained: dict[str, Path], checkpoints: Path
) -> None:
    for node in ("WuerstchenLoraLoader", "LoraLoader", "LoraLoaderModelOnly"):
        spec: Any = server.get(f"/object_info/{node}")[node]["input"]["required"]["lora_name"]
        assert trained["loras"].name in (spec[0] if isinstance(spec[0], list) else spec[1]["options"]), node
    word = trained["embeddings"].stem
    assert word in server.get("/embeddings")
    prompt, size = f"a embedding:{word} apple", {"width": 128, "height": 128}
    source = next(key for key, node in graph.items() if node["class_type"] == "WuerstchenBundleLoader")
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    inputs = {"model": [source, 0], "clip": [source, 2], "lora_name": trained["loras"].name, **strengths}
    graph["lora"] = {"class_type": "LoraLoader", "inputs": inputs}
    find(graph, "PrimitiveInt")["value"] = 4
    find(graph, "WuerstchenEmptyLatents").update(size)
    find(graph, "WuerstchenTextEncode")["text"] = prompt
    for node in graph.values():
        if "prior_clip" in node["inputs"]:  # of the prompt and of the negative one
            node["inputs"]["prior_clip"] = ["lora", 1]
    find(graph, "WuerstchenPriorSample")["model"] = ["lora", 0]
    [shown] = generate(graph).pictures
    pipe = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    pipe.load_embeddings(trained["embeddings"])
    [without] = pipe.generate(prompt, seed=4, **size)
    pipe.load_lora(trained["loras"])
    [expected] = pipe.generate(prompt, seed=4, **size)
    assert deviation(shown, expected) <= LIMIT and difference(expected, without) > 1
