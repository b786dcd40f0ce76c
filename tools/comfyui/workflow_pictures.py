"""Generates the pictures of the workflows: `python -m tools.comfyui.workflow_pictures [NAME ...]`.

Writes each next to its JSON file. Uses the newest ComfyUI that it finds. The workflows of the released weights have
no picture.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .client import Install, Server, installs
from .graphs import RELEASED, RELEASED_V1, api_form, names, picture_file, workflow

logger = logging.getLogger(__name__)

COLUMNS = 4
PREVIEWS = ("PreviewImage", "LossGraphNode")


def newest(installs: list[Install]) -> Install:
    """Returns the ComfyUI with the highest version. Exits if there is none."""
    if not installs:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH to its folder")
    return max(installs, key=lambda install: [int(number) for number in install.version.split(".")])


def in_rows(pictures: list[Image.Image]) -> Image.Image:
    """Returns pictures of one size in rows; a single one unchanged."""
    width, height = pictures[0].size
    columns = min(COLUMNS, len(pictures))
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def main(workflows: list[str]) -> None:
    """Runs the workflows and writes their pictures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        server = Server(newest(installs()), Path(folder) / "base")
        try:
            server.start()
            info = server.get("/object_info")
            for name in workflows:
                prompt = api_form(workflow(name), info)
                saved = {key: node for key, node in prompt.items() if node["class_type"] not in PREVIEWS}
                outcome = server.run(saved if "SaveImage" in {x["class_type"] for x in saved.values()} else prompt)
                if not outcome.pictures:
                    raise SystemExit(f"{name} failed: {outcome.status} {outcome.error}")
                path = picture_file(name)
                in_rows(outcome.pictures).save(path, quality=80, optimize=True, progressive=True)
                logger.info("wrote %s", path.name)
        finally:
            server.stop()


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in names() if name not in (RELEASED, RELEASED_V1)])
