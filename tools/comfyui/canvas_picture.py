"""Writes docs/canvas.webp, the first workflow on ComfyUI's canvas after a run: `tools.comfyui.canvas_picture`.

Uses the newest ComfyUI that it finds, and Chromium.
"""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .browser import canvas, chromium
from .client import PACK, REPOSITORY, Server, installs
from .graphs import workflow
from .workflow_pictures import newest

TEMPLATE = "text_to_image"
CLIP = {"x": 0, "y": 0, "width": 1900, "height": 880}
# Fits the graph's groups into that, below and to the right of ComfyUI's own bars.
FIT = """([width, height]) => {
  const boxes = app.graph.groups.map(({pos, size}) => [...pos, pos[0] + size[0], pos[1] + size[1]]);
  const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
  const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])));
  const {ds} = app.canvas, scale = Math.min((width - 130) / (right - left), (height - 150) / (bottom - top));
  ds.scale = scale;
  ds.offset = [90 / scale - left, 110 / scale - top];
  app.canvas.setDirty(true, true);
}"""


def main() -> None:
    """Opens the template, runs it and takes the picture."""
    executable = chromium()
    if executable is None:
        raise SystemExit("no Chromium found: install Debian's chromium")
    with TemporaryDirectory() as folder:
        server = Server(newest(installs()), Path(folder) / "base")
        (server.folder / "models").mkdir()
        try:
            server.start()
            server.post("/settings", {"Comfy.Minimap.Visible": False})
            with canvas(server, executable) as page:
                page.open_template(PACK, TEMPLATE, len(workflow(TEMPLATE)["nodes"]))
                if page.in_app_mode():
                    page.show_canvas()
                page.run()
                page.evaluate(FIT, [CLIP["width"], CLIP["height"]])
                page.page.wait_for_timeout(8000)  # until the note about the completed run has gone
                image = Image.open(io.BytesIO(page.page.screenshot(clip=CLIP)))
        finally:
            server.stop()
    image.convert("RGB").save(REPOSITORY / "docs" / "canvas.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
