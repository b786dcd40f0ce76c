"""Reads the files of `tests/golden`, which are stored small."""

from __future__ import annotations

import lzma
from functools import cache

import numpy as np

from . import ROOT

FOLDER = ROOT / "tests" / "golden"


def pack(data: bytes) -> bytes:
    """Returns a safetensors file as golden files are stored: xz of its header and of the four byte planes of its data.

    The first bytes of all 32-bit words come first, then all second bytes, and so on: a fifth smaller than the file.
    """
    start = data_start(data)
    return lzma.compress(data[:start] + np.frombuffer(data, np.uint8, offset=start).reshape(-1, 4).T.tobytes())


def unpack(packed: bytes) -> bytes:
    """Returns the safetensors file that was packed."""
    data = lzma.decompress(packed)
    start = data_start(data)
    return data[:start] + np.frombuffer(data, np.uint8, offset=start).reshape(4, -1).T.tobytes()


def data_start(data: bytes) -> int:
    """Returns where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


@cache
def golden_file(name: str) -> bytes:
    """Returns a golden file as safetensors."""
    return unpack((FOLDER / f"{name}.safetensors.xz").read_bytes())
