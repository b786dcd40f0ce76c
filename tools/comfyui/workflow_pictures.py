"""Paint the picture beside each workflow: `python -m tools.comfyui.workflow_pictures [NAME ...]`, newest ComfyUI.

The workflow of the released weights has none.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .client import Install, Server, installs
from .graphs import LORA, RELEASED, RELEASED_V1, WORKFLOWS, api_form, names, workflow

logger = logging.getLogger(__name__)

COLUMNS = 4  # of several pictures


def newest(found: list[Install]) -> Install:
    """The ComfyUI with the highest version."""
    if not found:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH to its folder")
    return max(found, key=lambda install: [int(number) for number in install.version.split(".")])


def in_rows(pictures: list[Image.Image]) -> Image.Image:
    """One picture as it is, several of one size side by side."""
    width, height = pictures[0].size
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def main(wanted: list[str]) -> None:
    """Run the workflows, and keep what they paint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        server = Server(newest(installs()), Path(folder) / "base")
        loras = server.folder / "models" / "loras"
        loras.mkdir(parents=True)
        shutil.copy(LORA, loras)
        try:
            server.start()
            info = server.get("/object_info")
            for name in wanted:
                outcome = server.run(api_form(workflow(name), info))
                if not outcome.pictures:
                    raise SystemExit(f"{name} was not painted: {outcome.status} {outcome.error}")
                in_rows(outcome.pictures).save(WORKFLOWS / f"{name}.jpg", quality=92)
                logger.info("painted %s.jpg", name)
        finally:
            server.stop()


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in names() if name not in (RELEASED, RELEASED_V1)])
