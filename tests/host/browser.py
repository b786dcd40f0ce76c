"""A headless Chromium in front of a running ComfyUI: what a person does on the canvas, with mouse and keyboard."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, TimeoutError, sync_playwright

from tools.comfyui.client import RUN_SECONDS, Server

Place = tuple[float, float]

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZE = {"width": 1900, "height": 1000}
FREE = (1250, 820)  # nothing of the workflow is there
WAIT = RUN_SECONDS * 1000

TRIES = 20

# Counts, for each node, the live previews that the frontend is given while it runs.
COUNT_PREVIEWS = """() => {
  const api = window.comfyAPI.api.api, seen = (window.previews = {});
  let running = null;
  api.addEventListener("executing", (event) => { running = event.detail?.node ?? event.detail; });
  api.addEventListener("b_preview", () => { seen[running] = (seen[running] ?? 0) + 1; });
}"""

# Where a node's slot, or its title, is on the screen.
PLACE = """([id, part, slot]) => {
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

DROP = """([text, name]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, {type: "image/png"}));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    const where = {clientX: 1250, clientY: 820, bubbles: true, cancelable: true, dataTransfer};
    document.getElementById("graph-canvas").dispatchEvent(new DragEvent(kind, where));
  }
}"""


def chromium() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


class Canvas:
    """The frontend of a ComfyUI in a browser."""

    def __init__(self, page: Page):
        self.page = page

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=WAIT)

    def open_template(self, pack: str, name: str, nodes: int) -> None:
        """By the sidebar's button, the pack's entry at the dialog's left, and the picture of the template."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_role("dialog").get_by_text(pack).first.click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.wait("count => app.graph.nodes.length === count", nodes)
        self.page.get_by_role("dialog").wait_for(state="hidden")

    def clear(self) -> None:
        self.evaluate("() => app.graph.clear()")

    def add_node(self, words: str, title: str, place: Place = FREE) -> int:
        """By a double click on a free place and a search for `words`, then dragged there; its id."""
        box = self.page.locator("input:focus")
        for _ in range(TRIES):  # a busy frontend may take a double click for two
            self.page.mouse.dblclick(*place)
            with suppress(TimeoutError):
                box.wait_for(timeout=WAIT / TRIES)
                break
        box.wait_for()
        self.page.keyboard.type(words, delay=20)
        self.page.get_by_role("option").filter(has_text=title).first.click()
        self.wait("title => app.graph.nodes.some((node) => node.title === title)", title)
        node = self.evaluate("title => app.graph.nodes.find((node) => node.title === title).id", title)
        self.page.mouse.click(*place)  # the newer frontend lets it hang on the pointer
        self.drag(self.evaluate(PLACE, [node, "title", None]), place)
        return node

    def drag(self, start: Place, end: Place) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=8)
        self.page.mouse.up()

    def connect(self, start: int, output: str, end: int, name: str) -> None:
        """By dragging from an output to an input."""
        linked = "([id, name]) => app.graph.getNodeById(id).inputs.find((slot) => slot.name === name).link != null"
        for _ in range(TRIES):  # a busy frontend may lose a part of a drag
            self.drag(self.evaluate(PLACE, [start, "output", output]), self.evaluate(PLACE, [end, "input", name]))
            with suppress(TimeoutError):
                self.page.wait_for_function(linked, arg=[end, name], timeout=WAIT / TRIES)
                return
        raise AssertionError(f"dragging from {output} to {name} did not connect them")

    def write(self, old: str, new: str) -> None:
        """By clicking into the text field that shows `old`."""
        [field] = [area for area in self.page.locator("textarea").all() if area.input_value() == old]
        field.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(new, delay=5)
        self.page.keyboard.press("Escape")

    def run(self) -> None:
        """By the button; ends when the last node has."""
        self.evaluate("""() => {
          window.ended = null;
          for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
            window.comfyAPI.api.api.addEventListener(kind, () => { window.ended = kind; }, {once: true});
        }""")
        self.page.get_by_role("button", name=re.compile("^Run$")).first.click()
        self.wait("() => window.ended")
        assert self.evaluate("() => window.ended") == "execution_success"

    def drop(self, file: Path) -> None:
        """A file from elsewhere onto the canvas."""
        self.evaluate(DROP, [base64.b64encode(file.read_bytes()).decode(), file.name])

    def wait_for_text(self, text: str) -> None:
        """Until a node holds it."""
        self.wait("text => app.graph.nodes.some((node) => node.widgets?.some(({value}) => value === text))", text)

    def problems(self) -> list[str]:
        """What a person would see in red, or in a dialog."""
        dialogs = [dialog.inner_text() for dialog in self.page.get_by_role("dialog").all() if dialog.is_visible()]
        return dialogs + self.evaluate(PROBLEMS)

    def previews(self) -> dict[str, int]:
        """How many live previews each node was shown."""
        return self.evaluate("() => window.previews")

    def pictures_on(self, node: int) -> int:
        self.wait("id => app.graph.getNodeById(id).imgs?.length", node)
        return self.evaluate("id => app.graph.getNodeById(id).imgs.length", node)

    def prompt(self) -> dict[str, Any]:
        """What the frontend sends when the button is pressed."""
        output = self.evaluate("async () => (await app.graphToPrompt()).output")
        return {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in output.items()}

    def graph(self) -> dict[str, Any]:
        return self.evaluate("() => app.graph.serialize()")


@contextmanager
def canvas(server: Server, executable: str, locale: str = "en-US") -> Iterator[Canvas]:
    """A browser on the server's page, past the greeting of a first visit."""
    server.post("/settings", {"Comfy.TutorialCompleted": True})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport=SIZE, locale=locale)
            page.set_default_timeout(WAIT)
            page.goto(f"http://{server.address}/")
            seen = Canvas(page)
            seen.wait("() => window.app?.graph && window.app.extensionManager")
            seen.wait("() => Object.keys(LiteGraph.registered_node_types).length > 100")
            seen.evaluate(COUNT_PREVIEWS)
            yield seen
        finally:
            browser.close()
