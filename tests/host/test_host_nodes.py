"""The nodes as ComfyUI reports them: the frozen interface, tooltips, bounds, and the workflows that use them."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from typing import Any

import pytest
from bundles import skip_if_too_old
from node_list import NODES, list_inputs

from tools.comfyui.client import PACK, REPOSITORY, Server
from tools.comfyui.graphs import files, names, workflow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENCODERS = ("WuerstchenTextEncode", "PrimitiveStringMultiline")  # nodes with a prompt


def test_the_pack_is_imported(server: Server, object_info: dict[str, Any]) -> None:
    log = server.log()
    assert "IMPORT FAILED" not in log and PACK in log
    ours = [name for name, info in object_info.items() if PACK in info["python_module"]]
    assert ours == list(NODES)


@pytest.mark.parametrize("node", NODES)
def test_ids_inputs_and_outputs_are_frozen(object_info: dict[str, Any], node: str) -> None:
    inputs, outputs = NODES[node]
    info = object_info[node]
    assert " ".join(name for name, _, _ in list_inputs(info)) == inputs
    shown = zip(info["output_name"], info["output"], strict=True)
    assert " ".join(f"{name}:{kind}" for name, kind in shown) == outputs


@pytest.mark.parametrize("node", NODES)
def test_every_input_has_a_tooltip_and_bounds(object_info: dict[str, Any], node: str) -> None:
    info = object_info[node]
    assert info["display_name"].startswith("Würstchen ") and info["description"].endswith(".")
    assert all(tooltip.endswith(".") for tooltip in info["output_tooltips"])
    for name, kind, options in list_inputs(info):
        assert options["tooltip"].endswith("."), name
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name


def test_the_shipped_model_is_the_default_before_the_users_files(object_info: dict[str, Any]) -> None:
    kind, options = object_info["WuerstchenBundleLoader"]["input"]["required"]["bundle"]
    choices = kind if isinstance(kind, list) else options["options"]
    assert choices[0] == options["default"] == "Würstchen demo (shipped)"
    assert "tiny.safetensors" in choices


def test_the_template_browser_lists_the_workflows(server: Server) -> None:
    assert sorted(server.get("/api/workflow_templates")[PACK]) == [path.stem for path in files().values()]
    for name, path in files().items():
        assert server.get(f"/api/workflow_templates/{PACK}/{path.stem}.json") == workflow(name)


def test_workflow_files_are_numbered_and_begin_with_text_to_image() -> None:
    for i, (name, path) in enumerate(files().items(), start=1):
        assert path.name.startswith(f"{i:02}_wuerstchen_{name}.") and path.name.isascii()
    assert names()[0] == "text_to_image"


def test_nodes_of_workflows_name_their_pack(object_info: dict[str, Any]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pack = project["project"]["name"]
    newest = {pack: project["project"]["version"], "comfy-core": project["tool"]["comfy"]["requires-comfyui"][2:]}
    [blueprint] = (REPOSITORY / "subgraphs").glob("*.json")
    [subgraph] = json.loads(blueprint.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    for node in [node for graph in (subgraph, *map(workflow, names())) for node in graph["nodes"]]:
        if node["type"] in object_info:  # the frontend makes notes
            source = pack if PACK in object_info[node["type"]]["python_module"] else "comfy-core"
            assert node["properties"]["cnr_id"] == source
            version, limit = (
                [int(part) for part in text.split(".")] for text in (node["properties"]["ver"], newest[source])
            )
            assert version <= limit


@pytest.mark.parametrize("name", names())
def test_app_mode_shows_prompts_and_images(object_info: dict[str, Any], name: str) -> None:
    graph, opens_as_app = workflow(name), files()[name].name.endswith(".app.json")
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["extra"].get("linearMode", False) is opens_as_app is (name == "text_to_image")
    shown = graph["extra"]["linearData"]
    for node, widget in shown["inputs"]:
        [slot] = [slot for slot in nodes[node]["inputs"] if slot["name"] == widget]
        assert slot["widget"]["name"] == widget and slot["link"] is None
    assert any(nodes[node]["type"] in ENCODERS for node, _ in shown["inputs"])
    assert shown["outputs"] and all(object_info[nodes[node]["type"]]["output_node"] for node in shown["outputs"])


@pytest.mark.parametrize("name", names())
def test_workflow_nodes_do_not_overlap_and_lie_in_groups(name: str) -> None:
    graph, title_bar = workflow(name), 30  # a node's position is below its title bar
    frames = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    boxes = [(x, y - title_bar, x + width, y + height) for x, y, width, height in frames]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in graph["groups"])]
    for box in boxes:
        assert any(g[0] < box[0] and g[1] < box[1] and box[2] < g[2] and box[3] < g[3] for g in groups), box


@pytest.mark.parametrize("name", names())
def test_workflow_sockets_match_the_nodes(object_info: dict[str, Any], name: str) -> None:
    skip_if_too_old(name, object_info)
    graph = workflow(name)
    for node in graph["nodes"]:
        info = object_info.get(node["type"])
        if info is None:
            assert node["type"] == "MarkdownNote"
            continue
        assert {slot["name"] for slot in node["inputs"]} == {name for name, _, _ in list_inputs(info)}
        if info["output_node"]:  # SaveImage has an output in newer ComfyUI versions only
            continue
        assert [slot["name"] for slot in node["outputs"]] == info["output_name"]
        assert [slot["type"] for slot in node["outputs"]] == info["output"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, start, start_slot, end, end_slot, kind in graph["links"]:
        assert link in nodes[start]["outputs"][start_slot]["links"]
        assert nodes[end]["inputs"][end_slot]["link"] == link
        assert nodes[start]["outputs"][start_slot]["type"] == kind == nodes[end]["inputs"][end_slot]["type"]
