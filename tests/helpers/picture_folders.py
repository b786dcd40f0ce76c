"""Training images for tests, each of one colour that identifies it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Files = Mapping[str, bytes]


def picture(number: int, width: int = 64, height: int = 64, kind: str = "PNG", **options: Any) -> bytes:
    """Returns the file of an image whose red is its number."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number, 100, 200)).save(file, kind, **options)
    return file.getvalue()


def examples(numbers: Sequence[int], width: int = 64, height: int = 64) -> dict[str, bytes]:
    """Returns images with captions: 007.png and 007.txt, which contains "picture 7"."""
    files = {}
    for number in numbers:
        files[f"{number:03d}.png"] = picture(number, width, height)
        files[f"{number:03d}.txt"] = f"picture {number}".encode()
    return files


def write_folder(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def shard(files: Files) -> bytes:
    """Returns a tar file."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def table(**values: Any) -> bytes:
    return json.dumps(values).encode()
