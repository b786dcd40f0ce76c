"""The canvas as a user sees it: the real frontend of each ComfyUI in a headless Chromium."""

from __future__ import annotations

import json
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY, find, skip_if_too_old
from images import LIMIT, deviation
from PIL import Image

from tools.comfyui.client import PACK, Server
from tools.comfyui.graphs import api_form, files, workflow
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import Scene, caption
from wuerstchen_core.inference.metadata import PROMPT

pytest.importorskip("playwright", reason="playwright is not installed")
from tools.comfyui.browser import Canvas, canvas, chromium  # noqa: E402 (playwright may be missing)

pytestmark = [pytest.mark.browser, pytest.mark.packages]

SMALL_CAT = Scene(23, 2, 1)
BLUEPRINT = "Wuerstchen text to image"


@pytest.fixture
def page(server: Server) -> Iterator[Canvas]:
    """The canvas in a browser."""
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium found")
    with canvas(server, executable) as page:
        yield page


def shape(graph: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the content of a saved graph, without the view and the sizes."""
    nodes = {node["id"]: (node["type"], node["pos"][0], node.get("widgets_values")) for node in graph["nodes"]}
    return nodes, sorted(tuple(link) for link in graph["links"]), [group["title"] for group in graph["groups"]]


def test_a_template_can_be_opened_edited_run_and_restored_from_its_image(
    server: Server, object_info: dict[str, Any], page: Canvas
) -> None:
    template = workflow("text_to_image")
    page.open_template(PACK, "text_to_image", len(template["nodes"]))
    names, shown = [path.stem for path in files().values()], len(page.offered)
    assert shown >= 12 and page.offered == names[:shown]  # frontend 1.27 adds the others while it scrolls
    assert page.problems() == []
    if page.in_app_mode():
        page.show_canvas()
    assert page.prompt() == api_form(template, object_info)  # all other tests run this

    look = page.add_node("Wurst", "Würstchen Quick Look")
    ids = {node["type"]: node["id"] for node in page.graph()["nodes"]}
    page.connect(ids["WuerstchenPriorSample"], "stage_c", look, "stage_c")
    page.write(caption(Scene(0, 4, 0)), caption(SMALL_CAT))
    prompt, graph = page.prompt(), page.graph()
    assert prompt[str(look)]["inputs"] == {"stage_c": [str(ids["WuerstchenPriorSample"]), 0], "scale": 1}

    page.run()
    assert page.problems() == []
    previews = page.previews()
    for stage, least in (("WuerstchenPriorSample", 5), ("WuerstchenDecoderSample", 1)):
        assert previews[str(ids[stage])] >= least
    for node in (look, ids["SaveImage"]):
        assert page.pictures_on(node) == 1

    file = max((server.folder / "output").glob("*.png"), key=lambda path: path.stat().st_mtime)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert Judge().identify(pixels, SMALL_CAT) == SMALL_CAT

    page.write(caption(SMALL_CAT), "another prompt")
    page.drop(file)
    page.wait_for_text(caption(SMALL_CAT))
    assert page.prompt() == prompt
    assert shape(page.graph()) == shape(graph)
    assert page.problems() == []


@pytest.mark.parametrize(
    ("model", "ending"), [("demo", ".png"), ("demo", ".webp"), ("demo-v1", ".png")], ids=lambda text: text
)
def test_a_picture_of_python_dropped_on_the_canvas_opens_as_its_graph_and_is_repeated(
    server: Server, page: Canvas, tmp_path: Path, model: str, ending: str
) -> None:
    pipe = WuerstchenPipeline.load(model, device="cpu", dtype="fp32")
    [picture] = pipe.generate(caption(SMALL_CAT) + " (not a weight:1.5)", seed=5)
    file = tmp_path / f"picture{ending}"
    picture.save(file)
    page.drop(file)
    prompt = json.loads(picture.info[PROMPT])
    page.wait_for_text(prompt["2" if model == "demo" else "5"]["inputs"]["text"])
    assert page.prompt() == prompt and page.problems() == []
    page.run()
    saved = max((server.folder / "output").glob("*.png"), key=lambda path: path.stat().st_mtime)
    assert deviation(Image.open(saved), picture) <= LIMIT


def test_the_first_template_is_an_app_for_a_prompt(page: Canvas) -> None:
    template = workflow("text_to_image")
    page.open_template(PACK, "text_to_image", len(template["nodes"]))
    if not page.in_app_mode():
        pytest.skip("this ComfyUI has no App Mode")
    page.write(caption(Scene(0, 4, 0)), caption(SMALL_CAT))
    page.run()
    pixels = np.asarray(page.app_picture())
    assert Judge().identify(pixels, SMALL_CAT) == SMALL_CAT


# Empty latents and a preview of them; the latents' node in a subgraph or not.
SMALL_GRAPH = """(inside) => {
  app.graph.clear();
  const [latents, look] = ["WuerstchenEmptyLatents", "WuerstchenQuickLook"].map((type) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    return node;
  });
  latents.pos = [900, 300];
  look.pos = [1350, 300];
  latents.connect(0, look, 0);
  const shown = inside ? app.graph.convertToSubgraph(new Set([latents])).node : latents;
  window.setSize = (width, height) => {
    const node = shown.subgraph?.nodes[0] ?? latents;
    for (const [name, value] of Object.entries({width, height}))
      node.widgets.find((widget) => widget.name === name).value = value;
  };
  const isNotice = (widget) => String(widget.value).startsWith("⚠");
  window.height = () => shown.widgets.find(isNotice).computeLayoutSize(shown).minHeight;
  window.notice = () => shown.widgets?.find(isNotice)?.value ?? null;
}"""


@pytest.mark.parametrize("inside", [False, True], ids=["node", "subgraph"])
def test_a_notice_stays_on_its_node_until_it_runs_without_one(page: Canvas, inside: bool) -> None:
    page.evaluate(SMALL_GRAPH, inside)
    for size in ("300x72", "72x300"):
        page.evaluate("([width, height]) => window.setSize(width, height)", list(map(int, size.split("x"))))
        page.run()
        page.wait("size => window.notice()?.includes(size)", size)
        page.run()  # from the cache
        page.wait("size => window.notice()?.includes(size)", size)
        assert page.evaluate("() => window.height()") > 2 * 16 + 30  # more than two lines
        assert size not in str(page.graph()) and size not in str(page.prompt())  # not saved
    page.evaluate("() => window.setSize(320, 64)")
    page.run()
    assert page.evaluate("() => window.notice()") is None
    assert page.problems() == []


@pytest.mark.newest
def test_the_workflow_that_trains_a_lora_runs(server: Server, object_info: dict[str, Any], page: Canvas) -> None:
    skip_if_too_old("train_lora", object_info)
    template = workflow("train_lora")
    page.open_template(PACK, "train_lora", len(template["nodes"]))
    assert page.problems() == []
    assert page.prompt() == api_form(template, object_info)
    ids = {node["type"]: node["id"] for node in page.graph()["nodes"]}
    page.set_widget(ids["TrainLoraNode"], "steps", 2)
    page.run()
    assert page.problems() == []
    for node in (ids["SaveImage"], ids["LossGraphNode"]):
        assert page.pictures_on(node) == 1
    assert len(list((server.folder / "output" / "loras").glob("wuerstchen_trained_2_steps_*"))) == 1


def structure(prompt: dict[str, Any]) -> Counter[Any]:
    """Returns the nodes of a prompt without their ids, which subgraphs change: each with all nodes before it.

    Nodes that only show images are left out, and the values of number nodes inserted.
    """

    def value(given: Any) -> Any:
        if not isinstance(given, list):
            return given
        source = prompt[given[0]]
        return source["inputs"]["value"] if source["class_type"] == "PrimitiveInt" else (tree(source), given[1])

    def tree(node: dict[str, Any]) -> tuple[str, frozenset[Any]]:
        return node["class_type"], frozenset((name, value(given)) for name, given in node["inputs"].items())

    unused = ("PrimitiveInt", "PreviewImage", "SaveImage")
    return Counter(tree(node) for node in prompt.values() if node["class_type"] not in unused)


@pytest.fixture
def blueprints(server: Server) -> set[str]:
    """The names of the subgraphs that the node search offers."""
    try:
        return {entry["name"] for entry in server.get("/global_subgraphs").values()}
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no blueprints")


def test_the_subgraph_is_the_template_in_one_node(
    server: Server, object_info: dict[str, Any], blueprints: set[str], page: Canvas
) -> None:
    assert BLUEPRINT in blueprints
    page.clear()
    whole, view = page.add_node("Wurst", BLUEPRINT), page.add_node("Preview Image", "Preview Image", (1500, 400))
    page.connect(whole, "image", view, "images")
    assert page.problems() == []
    prompt = page.prompt()
    assert structure(prompt) == structure(api_form(workflow("text_to_image"), object_info))

    find(prompt, "WuerstchenBundleLoader")["bundle"] = TINY
    find(prompt, "WuerstchenEmptyLatents").update(width=64, height=64)
    with ThreadPoolExecutor() as threads:  # the browser's event loop runs in this thread
        outcome = threads.submit(server.run, prompt).result()
    assert [picture.size for picture in outcome.pictures] == [(64, 64)], outcome.error
