"""One of several processes of the command line, of which number 1 is killed amid the writing of its second picture."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen_core.cli.main import main


def die_at(number: int) -> None:
    """Kill this process when half of that picture's file is written."""
    write, written = Image.Image.save, 0

    def save(image: Image.Image, path: Path, *told: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        write(image, path, *told, **options)
        if written == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    Image.Image.save = save  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        die_at(2)
    sys.exit(main(sys.argv[1:]))
