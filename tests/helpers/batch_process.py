"""Runs the command line as one of several processes; process 1 is killed while it writes its second image."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen_core.cli.main import main


def die_at(number: int) -> None:
    """Kills this process when half of the image of that number is written."""
    write, written = Image.Image.save, 0

    def save(image: Image.Image, path: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        write(image, path, *args, **kwargs)
        if written == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    Image.Image.save = save  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        die_at(2)
    sys.exit(main(sys.argv[1:]))
