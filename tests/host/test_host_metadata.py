"""Pictures of Python and the command line, whose metadata has the graph that generates them in ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import TINY, V1, Generate, Graph, find
from images import LIMIT, deviation
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools.comfyui.client import Server
from tools.comfyui.graphs import api_form
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, read_part, save_bundle
from wuerstchen_core.cli.main import main
from wuerstchen_core.inference.comfyui_nodes import NODES
from wuerstchen_core.inference.metadata import PROMPT, RECORD, WORKFLOW
from wuerstchen_core.inference.workflow import build_graph

TEXT, SIZE = "a red apple", (192, 128)


def tree(graph: Graph, key: str) -> Any:
    """Returns a node with all nodes that it depends on, without ids."""
    node = graph[key]
    inputs = {
        name: (tree(graph, value[0]), value[1]) if isinstance(value, list) else value
        for name, value in node["inputs"].items()
    }
    return node["class_type"], inputs


def result(graph: Graph) -> Any:
    return tree(graph, next(key for key, node in graph.items() if node["class_type"] == "SaveImage"))


def source_image(server: Server) -> Path:
    """Returns a picture in ComfyUI's input folder."""
    path = server.folder / "input" / "start.png"
    path.parent.mkdir(exist_ok=True)
    picture = Image.linear_gradient("L").resize(SIZE)
    Image.merge("RGB", [picture, picture.rotate(180), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]).save(path)
    return path


def test_the_nodes_are_as_comfyui_describes_them(object_info: dict[str, Any]) -> None:
    for name, kind in NODES.items():
        info = object_info[name]
        described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        types = {x: "COMBO" if isinstance(spec[0], list) else spec[0] for x, spec in described.items()}
        assert types == {**kind.sockets, **kind.widgets}, name
        assert list(kind.outputs.values()) == info["output"] or name == "SaveImage", name
        if name.startswith("Wuerstchen"):
            assert list(kind.outputs) == info["output_name"], name


@pytest.mark.parametrize(("model", "name"), [("demo", "text_to_image"), ("demo-v1", "text_to_image_v1")])
def test_the_graph_of_a_shipped_model_is_the_shipped_workflow(
    load: Callable[[str], Graph], model: str, name: str
) -> None:
    pipe = WuerstchenPipeline.load(model, device="cpu")
    record = {"prompt": "a red apple on a blue background", "negative": "", "seed": 1, "model": model}
    graph, _ = build_graph({**record, **pipe.sampling.as_dict()})
    assert result(graph) == result(load(name))


EDITS: dict[str, Callable[[WuerstchenPipeline, Path], list[Image.Image]]] = {
    "two pictures": lambda pipe, _: pipe.generate(TEXT, seed=7, count=2),
    "guidance": lambda pipe, _: pipe.generate(
        "a (red:1.3) apple", negative="a [blue] (car", seed=2, decoder_guidance=2.0, prior_guidance=2.5
    ),
    "schedule": lambda pipe, _: pipe.generate(TEXT, schedule="fast", width=128, height=192, prior_guidance=0.5),
    "variations": lambda pipe, path: pipe.variations(path, TEXT, strength=0.6, seed=4, negative="blue"),
    "reconstruct": lambda pipe, path: pipe.reconstruct([path, Image.open(path)], prompt=TEXT, seed=3),
}


@pytest.mark.parametrize("model", [TINY, V1])
@pytest.mark.parametrize("edit", EDITS)
def test_comfyui_repeats_a_picture(
    server: Server, object_info: dict[str, Any], generate: Generate, checkpoints: Path, model: str, edit: str
) -> None:
    pipe = WuerstchenPipeline.load(checkpoints / model, device="cpu", dtype="fp32")
    for picture in EDITS[edit](pipe, source_image(server)):
        prompt = json.loads(picture.info[PROMPT])
        assert api_form(json.loads(picture.info[WORKFLOW]), object_info) == prompt
        [same] = generate(prompt).pictures
        assert deviation(same, picture) <= LIMIT


def test_comfyui_repeats_a_picture_with_a_lora(object_info: dict[str, Any], generate: Generate) -> None:
    pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32", lora={"demo-pink": 0.8})
    [picture] = pipe.generate("a red apple on a blue background", seed=1)
    prompt = json.loads(picture.info[PROMPT])
    assert api_form(json.loads(picture.info[WORKFLOW]), object_info) == prompt
    [same] = generate(prompt).pictures
    assert deviation(same, picture) <= LIMIT
    pipe.unload_lora()
    [without] = pipe.generate("a red apple on a blue background", seed=1)
    assert "loras" not in json.loads(without.info[RECORD]) and deviation(same, without) > 5


@pytest.mark.parametrize("model", [TINY, V1])
def test_the_command_line_repeats_a_picture_that_comfyui_saved(
    server: Server, generate: Generate, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    pipe = WuerstchenPipeline.load(checkpoints / model, device="cpu", dtype="fp32")
    graph, _ = build_graph(json.loads(pipe.generate(TEXT, seed=6, decoder_guidance=1.5)[0].info[RECORD]))
    find(graph, "WuerstchenEmptyLatents")["batch_size"] = 2
    pictures = generate(graph).pictures
    pictures[0].save(tmp_path / "saved.png", pnginfo=pnginfo(pictures[0]))
    monkeypatch.chdir(checkpoints)
    command = ["generate", "--like", tmp_path / "saved.png", "--device", "cpu", "--output", tmp_path / "again.png"]
    assert main([str(argument) for argument in command]) == 0
    for picture, name in zip(pictures, ("again-1.png", "again-2.png"), strict=True):
        assert deviation(picture, Image.open(tmp_path / name)) <= LIMIT


def pnginfo(picture: Image.Image) -> PngInfo:
    """Returns the texts that ComfyUI wrote into a picture."""
    info = PngInfo()
    for key, text in picture.info.items():
        info.add_text(key, text)
    return info


def test_comfyui_repeats_a_picture_of_several_files(
    object_info: dict[str, Any], generate: Generate, checkpoints: Path, models: Path, tmp_path: Path
) -> None:
    """A prior of its own in a bundle, and all parts from files."""

    folders = {"prior": "diffusion_models", "decoder": "diffusion_models", "vqgan": "vae"}
    files = {}
    for name in PARTS_OF["v2"][:-3] + PARTS_OF["v2"][-2:]:
        files[name] = models / folders.get(name, "text_encoders") / f"meta_{name}.safetensors"
        part = read_part(checkpoints / TINY, name)
        save_bundle(files[name], {name: part}, {})
    try:
        settings = {"width": 128, "height": 128, "prior_steps": 2, "decoder_steps": 2}
        for source, parts in ((checkpoints / TINY, {"prior": files["prior"]}), (files, {})):
            pipe = WuerstchenPipeline.load(source, device="cpu", dtype="fp32", **parts)
            [picture] = pipe.generate(TEXT, **settings)
            prompt = json.loads(picture.info[PROMPT])
            assert api_form(json.loads(picture.info[WORKFLOW]), object_info) == prompt
            [same] = generate(prompt).pictures
            assert deviation(same, picture) <= LIMIT
            assert str(models) not in json.dumps(picture.info)
    finally:
        for file in files.values():
            file.unlink()
