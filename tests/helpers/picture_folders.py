"""Training images for tests, each of one colour that identifies it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen_core.training.data.shards import add_member

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
    """Writes files by name in and below a folder, which it returns."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def shard(files: Files) -> bytes:
    """Returns a tar file of some files."""
    tar_file = io.BytesIO()
    with tarfile.open(fileobj=tar_file, mode="w") as tar:
        for name, content in files.items():
            add_member(tar, name, content)
    return tar_file.getvalue()


def table(**values: Any) -> bytes:
    """Returns a JSON file."""
    return json.dumps(values).encode()
