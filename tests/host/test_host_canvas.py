"""Help pages, node search and translations; and that loading the pack changes nothing in ComfyUI."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import find
from errors import check_error
from host_names import OPTIONAL, used_names
from images import pixels
from node_list import NODES, list_inputs

from tools.comfyui.client import PACK, REPOSITORY, Install, Server, run_inside
from wuerstchen_core.demo.vocabulary import COLOURS

INPUTS = {node: inputs.split() for node, (inputs, _) in NODES.items()}


def cells(page: str, heading: str) -> list[str]:
    """Returns the names in the first column of the table under a heading."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| .+ \|$", section, re.MULTILINE)


@pytest.mark.packages
@pytest.mark.parametrize("node", NODES)
def test_each_help_page_lists_all_inputs_and_outputs(server: Server, object_info: dict[str, Any], node: str) -> None:
    with urllib.request.urlopen(f"http://{server.address}/extensions/{PACK}/docs/{node}.md", timeout=30) as response:
        page = response.read().decode()
    info = object_info[node]
    assert page.startswith(f"# {info['display_name']}\n\n")
    assert cells(page, "Inputs") == [name for name, _, _ in list_inputs(info)]
    assert cells(page, "Outputs") == info["output_name"]
    assert page.partition("\n## Example\n")[2].strip().endswith(".")


def test_each_help_page_belongs_to_a_node() -> None:
    assert {page.stem for page in (REPOSITORY / "web" / "docs").iterdir()} == set(NODES)


@pytest.mark.packages
@pytest.mark.parametrize("language", sorted(path.name for path in (REPOSITORY / "locales").iterdir()))
def test_comfyui_serves_the_texts_of_every_node(server: Server, language: str) -> None:
    served = server.get("/i18n")[language]["nodeDefs"]
    assert served == json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {node: list(texts["inputs"]) for node, texts in served.items()} == INPUTS


def test_the_node_search_finds_every_node_by_the_packs_words(object_info: dict[str, Any]) -> None:
    knows = any(info.get("search_aliases") for name, info in object_info.items() if name not in NODES)
    for node in NODES:
        aliases = object_info[node].get("search_aliases") or []
        assert {"wuerstchen", "wurst", "cascade"} <= set(aliases) if knows else not aliases
        assert len(set(aliases)) == len(aliases)


@pytest.fixture(scope="module")
def facts(install: Install, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The changes that loading the pack made in this ComfyUI."""
    return run_inside(install, "inside_canvas.py", tmp_path_factory.mktemp("canvas"))[1]


def test_loading_twice_registers_the_same_nodes_and_replaces_none(facts: dict[str, Any]) -> None:
    assert facts["imported"] and facts["imported again"]
    assert facts["nodes"] == facts["nodes after a reload"] == sorted(NODES)
    assert facts["replaced nodes"] == []


def test_the_pack_imports_no_other_package(facts: dict[str, Any]) -> None:
    assert facts["other packages imported"] == []


def test_one_function_of_comfyui_is_wrapped(facts: dict[str, Any]) -> None:
    """Masks would be interpolated before any of our code runs (nodes/host/masks.py)."""
    assert facts["watched"] > 50
    assert facts["changed"] == ["comfy.samplers.CFGGuider.sample"]


def test_comfyui_has_every_name_that_the_pack_uses(facts: dict[str, Any]) -> None:
    names = set(used_names())
    assert len(names) > 100 and names >= OPTIONAL
    assert set(facts["missing"]) <= OPTIONAL


def test_comfy_import_guard_finds_no_missing_name(install: Install, tmp_path: Path) -> None:
    """comfy-import-guard reads ComfyUI from a git repository, which is made here from this ComfyUI's modules."""
    pytest.importorskip("comfy_import_guard", reason="comfy-import-guard is not installed")
    host, pack = tmp_path / "ComfyUI", tmp_path / "install" / "custom_nodes" / PACK
    shutil.copytree(REPOSITORY / "nodes", pack / "nodes")
    git = ["git", f"--work-tree={install.root}", f"--git-dir={host / '.git'}"]
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    files = ["comfy", "comfy_api", "comfy_execution", "folder_paths.py", "latent_preview.py"]
    host.mkdir()
    for step in (["init", "-q"], ["add", "-f", "--", *files], [*identity, "commit", "-qm", "host"]):
        subprocess.run([*git, *step], check=True, timeout=60, cwd=install.root)
    guard = [sys.executable, "-m", "comfy_import_guard.cli", "--cache-dir", str(tmp_path), "--offline", "--json"]
    check = ["check", "--comfy-dir", str(tmp_path / "install"), "--target", "HEAD"]
    report = json.loads(subprocess.run([*guard, *check], capture_output=True, timeout=120).stdout)
    [found] = report["packs"]
    assert found["references"] > 40 and found["signature_drift"] == found["unparseable"] == []
    # The one name that older ComfyUI versions lack is used with a fallback.
    newer = "CoreModelPatcher" not in (install.root / "comfy" / "model_patcher.py").read_text(encoding="utf-8")
    assert [entry["dotted"] for entry in found["breaking"]] == ["comfy.model_patcher.CoreModelPatcher"] * newer


@pytest.mark.packages
def test_the_quick_look_shows_stage_cs_image(server: Server, shipped: dict[str, Any]) -> None:
    """It needs neither Stage B nor a node after it, and has the chosen size."""
    ids = {node["class_type"]: key for key, node in shipped.items()}
    del shipped[ids["SaveImage"]]
    shipped["look"] = {"class_type": "WuerstchenQuickLook", "inputs": {"scale": 0.5}}
    find(shipped, "WuerstchenQuickLook")["stage_c"] = [ids["WuerstchenPriorSample"], 0]
    outcome = server.run(shipped)
    [picture] = outcome.pictures
    assert picture.size == (128, 128) and ids["WuerstchenDecoderSample"] not in outcome.progress
    array = pixels(picture).astype(float)
    corners = np.stack([array[:16, :16], array[:16, -16:], array[-16:, :16], array[-16:, -16:]])
    for mean, colour in ((corners.mean(axis=(0, 1, 2)), "blue"), (array[56:72, 56:72].mean(axis=(0, 1)), "red")):
        assert min(COLOURS, key=lambda name, mean=mean: np.abs(mean - COLOURS[name]).sum()) == colour

    find(shipped, "WuerstchenQuickLook")["stage_c"] = [ids["WuerstchenEmptyLatents"], 1]
    check_error(server.run(shipped).error, "Würstchen Quick Look", "Stage C")
