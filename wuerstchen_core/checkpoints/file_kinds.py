"""Recognises files that are no weight files, or of other programs, by their content: the ending is often wrong."""

from __future__ import annotations

import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

from ..common.text import parse_json

LARGEST_HEADER = 100_000_000  # of a safetensors file, by that format's rules

_SAFETENSORS_OR_PYTORCH = "download the .safetensors or PyTorch file of this model instead"
_EXTRACT = "extract it, and use the weight file inside"
_AGAIN = "download the file again, through the page's download button or `huggingface-cli download`"

# First bytes of files, what they are and what to do.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file, made for llama.cpp", _SAFETENSORS_OR_PYTORCH),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _EXTRACT),
    (b"Rar!\x1a\x07", "a RAR archive", _EXTRACT),
    (b"\x1f\x8b", "a gzip archive", _EXTRACT),
    (b"\xfd7zXZ\x00", "an xz archive", _EXTRACT),
    (b"BZh", "a bzip2 archive", _EXTRACT),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _EXTRACT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 (Keras) file", _SAFETENSORS_OR_PYTORCH),
    (b"\x93NUMPY", "a NumPy file", _SAFETENSORS_OR_PYTORCH),
    (b"\x89PNG", "a PNG picture", "choose the weight file"),
    (b"\xff\xd8\xff", "a JPEG picture", "choose the weight file"),
    (b"RIFF", "a WebP picture or another RIFF file", "choose the weight file"),
    (b"%PDF", "a PDF document", "choose the weight file"),
    (b"d8:announce", "a torrent file", "download the file that it describes"),
    (b"ftrt", "a TensorRT engine", _SAFETENSORS_OR_PYTORCH),
)
_ONNX = re.compile(rb"\x08[\x01-\x1f](?:[\x12\x1a\x22\x32\x3a\x42]|\x28[\x00-\x7f])")  # version, then a known field


def is_safetensors(path: Path) -> bool:
    """True if a file starts as a safetensors file does, whether or not it is complete."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] <= LARGEST_HEADER


def name_kind(path: Path) -> str | None:
    """Returns what a file is and what to do with it, if it is recognised as no weight file that this project reads."""
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        return f"is empty: {_AGAIN}"
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file() and not start.startswith((b"PK", b"\x80")):
        return f"is the data of an OpenVINO model: {_SAFETENSORS_OR_PYTORCH}"
    if not start.strip(b"\0"):
        return f"starts with zeros, as a download that never ran to its end: {_AGAIN}"
    for magic, what, advice in _STARTS:
        if start.startswith(magic):
            return f"is {what}: {advice}"
    if start[4:8] == b"TFL3":
        return f"is a TensorFlow Lite file: {_SAFETENSORS_OR_PYTORCH}"
    if start[257:262] == b"ustar":
        return f"is a tar archive: {_EXTRACT}"
    if start.startswith(b"PK"):
        return _name_zip(path)
    if _ONNX.match(start):
        return f"is an ONNX file: {_SAFETENSORS_OR_PYTORCH}"
    if is_safetensors(path) or start.startswith(b"\x80"):  # safetensors, pickle
        return None
    return _name_text(path, start)


def _name_zip(path: Path) -> str | None:
    """Returns what a zip file is that is not PyTorch's; None for one that is, or is damaged."""
    if not zipfile.is_zipfile(path):
        return None
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return f"is a TorchScript program, which can run any code: {_SAFETENSORS_OR_PYTORCH}"
        if any(name.endswith("/data.pkl") for name in names):
            return None
        if names and all(name.endswith(".npy") for name in names):
            return f"is a NumPy archive (npz): {_SAFETENSORS_OR_PYTORCH}"
        return f"is a zip archive: {_EXTRACT}"
    return None


def _name_text(path: Path, start: bytes) -> str | None:
    """Returns what a text file is; None for binary files."""
    with suppress(UnicodeDecodeError):
        start = start.decode("utf-16").encode() if start[:2] in (b"\xff\xfe", b"\xfe\xff") else start
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<html" in text or text.startswith(b"<!doctype") or re.match(rb"<(?:head|body|script|meta|!--)", text):
        return f"is a web page (HTML) saved in place of the file: {_AGAIN}, logged in if the page asks for it"
    if text.startswith(b"<?xml") or text.startswith(b"<net"):
        if b"<net" in text:
            return f"is the description of an OpenVINO model: {_SAFETENSORS_OR_PYTORCH}"
        return f"is an XML text, such as a server's error message: {_AGAIN}"
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in start):
        return None
    if text[:1] in (b"{", b"["):
        return f"is a JSON text{_error_in(path)}: {_AGAIN}"
    first = start.decode("utf-8", "replace").strip().splitlines()[:1]
    return f"is a text ({first[0][:40]!r} ...): {_AGAIN}" if first else f"holds white space only: {_AGAIN}"


def _error_in(path: Path) -> str:
    """Returns the error message of a JSON text in brackets; "" if it has none."""
    with suppress(ValueError, OSError):
        content = parse_json(path.read_bytes()) if path.stat().st_size < 1 << 20 else {}
        message = content.get("error") or content.get("message") if isinstance(content, dict) else None
        message = message.get("message") if isinstance(message, dict) else message
        if isinstance(message, str):
            return f" ({' '.join(message.split())[:80]})"
    return ""
