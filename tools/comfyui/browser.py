"""A headless Chromium in front of a running ComfyUI, with the actions of a user on the canvas."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, TimeoutError, sync_playwright

from .client import RUN_SECONDS, Server
from .graphs import files

Point = tuple[float, float]

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZE = {"width": 1900, "height": 1000}
FREE = (1250, 820)  # an empty spot of the canvas
WAIT = RUN_SECONDS * 1000

TRIES, RETRY = 60, 3000  # RETRY in milliseconds

# Counts the live previews of each node.
COUNT_PREVIEWS = """() => {
  const api = window.comfyAPI.api.api, seen = (window.previews = {});
  let running = null;
  api.addEventListener("executing", (event) => { running = event.detail?.node ?? event.detail; });
  api.addEventListener("b_preview", () => { seen[running] = (seen[running] ?? 0) + 1; });
}"""

# The screen position of a node's title or slot.
POSITION = """([id, part, slot]) => {
  const canvas = app.canvas, node = app.graph.getNodeById(id), box = canvas.canvas.getBoundingClientRect();
  const [x, y] = {
    title: () => [node.pos[0] + 60, node.pos[1] - 15],
    input: () => node.getInputPos(node.findInputSlot(slot)),
    output: () => node.getOutputPos(node.findOutputSlot(slot)),
  }[part]();
  const {scale, offset} = canvas.ds;
  return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
}"""

PROBLEMS = """() => app.graph.nodes
  .filter((node) => node.has_errors || !(node.type in LiteGraph.registered_node_types) || app.lastNodeErrors?.[node.id])
  .map((node) => node.type)"""

# The templates in the dialog, in order.
TEMPLATES = """() => [...document.querySelectorAll("[data-testid^=template-workflow-]")]
  .map((card) => card.dataset.testid.replace("template-workflow-", ""))"""

DROP = """([text, name, type]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, {type}));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    const where = {clientX: 1250, clientY: 820, bubbles: true, cancelable: true, dataTransfer};
    document.getElementById("graph-canvas").dispatchEvent(new DragEvent(kind, where));
  }
}"""


def chromium() -> str | None:
    """Returns the path of an installed Chromium or Chrome; None if there is none."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


class Canvas:
    """The frontend of a ComfyUI in a browser."""

    def __init__(self, page: Page):
        self.page = page
        self.offered: list[str] = []

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=WAIT)

    def open_template(self, pack: str, name: str, nodes: int) -> None:
        """Opens a template through the sidebar's button and the dialog, and waits for its nodes.

        `offered` then lists the templates in the dialog, in order.
        """
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_role("dialog").get_by_text(pack).first.click()
        card = self.page.get_by_test_id(f"template-workflow-{files()[name].stem}")
        card.wait_for()
        self.offered = self.evaluate(TEMPLATES)
        opened = "count => app.graph.nodes.length === count"
        for _ in range(3):  # a click on a dialog that is still being drawn can be lost
            if card.is_visible():
                card.click()
            with suppress(TimeoutError):
                self.page.wait_for_function(opened, arg=nodes, timeout=30_000)
                break
        self.wait(opened, nodes)
        self.page.get_by_role("dialog").wait_for(state="hidden")

    def in_app_mode(self) -> bool:
        """True if the frontend shows the inputs and outputs of the workflow instead of the canvas."""
        widgets = self.page.get_by_test_id("linear-widgets")
        with suppress(TimeoutError):  # it appears some time after the nodes
            widgets.wait_for(timeout=8000)
        return widgets.is_visible()

    def app_picture(self) -> Image.Image:
        """Returns the picture that App Mode shows after a run."""
        picture = self.page.locator("img[src*='type=output']").first
        picture.wait_for()
        address = picture.evaluate("picture => picture.src")
        return Image.open(io.BytesIO(self.page.request.get(address).body())).convert("RGB")

    def show_canvas(self) -> None:
        """Leaves App Mode."""
        self.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
        self.page.get_by_test_id("linear-widgets").wait_for(state="hidden")

    def clear(self) -> None:
        self.evaluate("() => app.graph.clear()")

    def add_node(self, words: str, title: str, point: Point = FREE) -> int:
        """Adds a node by a double click and a search for `words`; returns its id."""
        for _ in range(TRIES):
            if (node := self._place_node(words, title, point)) is not None:
                self.drag(self.evaluate(POSITION, [node, "title", None]), point)
                return node
            self.page.keyboard.press("Escape")
        raise AssertionError(f"a search for {words} did not add {title}")

    def _place_node(self, words: str, title: str, point: Point) -> int | None:
        """Returns the id of the node; None if the frontend was busy and missed a click, or read a double one as two."""
        box, there = self.page.locator("input:focus"), "app.graph.nodes.find((node) => node.title === title)"
        with suppress(TimeoutError):
            self.page.mouse.dblclick(*point)
            box.wait_for(timeout=RETRY)
            self.page.keyboard.type(words, delay=20)
            self.page.get_by_role("option").filter(has_text=title).first.click()
            self.page.wait_for_function(f"title => {there}", arg=title, timeout=RETRY)
            self.page.mouse.click(*point)  # newer frontends attach the node to the pointer until a click gives it an id
            placed = f"title => app.graph.getNodeById({there}?.id)?.id"
            self.page.wait_for_function(placed, arg=title, timeout=RETRY)
            return self.evaluate(placed, title)
        return None

    def drag(self, start: Point, end: Point) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=8)
        self.page.mouse.up()

    def connect(self, start: int, output: str, end: int, name: str) -> None:
        """Connects two nodes by dragging from an output to an input."""
        linked = "([id, name]) => app.graph.getNodeById(id).inputs.find((slot) => slot.name === name).link != null"
        for _ in range(TRIES):  # a busy frontend may miss a part of a drag
            self.drag(self.evaluate(POSITION, [start, "output", output]), self.evaluate(POSITION, [end, "input", name]))
            with suppress(TimeoutError):
                self.page.wait_for_function(linked, arg=[end, name], timeout=RETRY)
                return
        raise AssertionError(f"dragging from {output} to {name} did not connect them")

    def write(self, old: str, new: str) -> None:
        """Replaces the text of the text field that shows `old`."""
        for _ in range(TRIES):  # App Mode fills its fields after it shows them
            areas = self.page.locator("textarea").all()
            fields = [area for area in areas if area.is_visible() and area.input_value() == old]
            if fields:
                break
            self.page.wait_for_timeout(250)
        [field] = fields
        field.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(new, delay=5)
        self.page.keyboard.press("Escape")

    def set_widget(self, node: int, name: str, value: Any) -> None:
        find = "app.graph.getNodeById(id).widgets.find((widget) => widget.name === name)"
        self.evaluate(f"([id, name, value]) => {{ {find}.value = value; }}", [node, name, value])

    def run(self) -> None:
        """Presses the Run button and waits for success."""
        self.evaluate("""() => {
          window.ended = null;
          for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
            window.comfyAPI.api.api.addEventListener(kind, () => { window.ended = kind; }, {once: true});
        }""")
        self.page.get_by_role("button", name=re.compile("^Run$")).first.click()
        self.wait("() => window.ended")
        assert self.evaluate("() => window.ended") == "execution_success"

    def drop(self, file: Path) -> None:
        """Drops a file onto the canvas."""
        kind = f"image/{file.suffix.removeprefix('.')}"
        self.evaluate(DROP, [base64.b64encode(file.read_bytes()).decode(), file.name, kind])

    def wait_for_text(self, text: str) -> None:
        """Waits until a widget has this value."""
        self.wait("text => app.graph.nodes.some((node) => node.widgets?.some(({value}) => value === text))", text)

    def problems(self) -> list[str]:
        """Returns the texts of open dialogs and the types of nodes with errors."""
        dialogs = [dialog.inner_text() for dialog in self.page.get_by_role("dialog").all() if dialog.is_visible()]
        return dialogs + self.evaluate(PROBLEMS)

    def previews(self) -> dict[str, int]:
        """Returns the number of live previews of each node."""
        return self.evaluate("() => window.previews")

    def pictures_on(self, node: int) -> int:
        self.wait("id => app.graph.getNodeById(id).imgs?.length", node)
        return self.evaluate("id => app.graph.getNodeById(id).imgs.length", node)

    def prompt(self) -> dict[str, Any]:
        """Returns the prompt that the frontend would send."""
        output = self.evaluate("async () => (await app.graphToPrompt()).output")
        return {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in output.items()}

    def graph(self) -> dict[str, Any]:
        return self.evaluate("() => app.graph.serialize()")


@contextmanager
def canvas(server: Server, executable: str, locale: str = "en-US") -> Iterator[Canvas]:
    """Opens a server's page in a browser, without the greetings of a first visit."""
    server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.OnboardingCoachmarks.Seen": ["appMode"]})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport=SIZE, locale=locale)
            page.set_default_timeout(WAIT)
            page.goto(f"http://{server.address}/")
            loaded = Canvas(page)
            loaded.wait("() => window.app?.graph && window.app.extensionManager")
            loaded.wait("() => Object.keys(LiteGraph.registered_node_types).length > 100")
            loaded.evaluate(COUNT_PREVIEWS)
            yield loaded
        finally:
            browser.close()
