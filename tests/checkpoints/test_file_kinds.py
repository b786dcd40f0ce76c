"""Files that are no weight files are named by their content, under any ending."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layouts import random_state
from helpers.networks import PRIOR
from PIL import Image
from safetensors.torch import save, save_file

from wuerstchen_core.checkpoints import describe, read_part
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.file_kinds import name_kind
from wuerstchen_core.models.prior import Prior


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return out.getvalue()


def numpy_file(archive: bool) -> bytes:
    out = io.BytesIO()
    np.savez(out, np.zeros(3)) if archive else np.save(out, np.zeros(3))
    return out.getvalue()


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, kind)
    return out.getvalue()


# Starts as onnx.save writes them: the version, then the producer's name, an empty name, the graph or the opset.
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xba\x01\n\x0b\n\x01x"
ONNX_BARE = b'\x08\x0a:\x10\n\x0b\n\x01x\x12\x01y"\x04Relu'
KINDS = {
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "ONNX": ONNX,
    "ONNX file": ONNX_BARE,
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3974739662\n",
    "HTML": b"<!DOCTYPE html>\n<html lang=en><head><title>Sign in</title></head></html>",
    "(HTML)": b"\xef\xbb\xbf\n\n<HTML><body>404</body></HTML>",
    "page (HTML)": "<html><body>Anmeldung</body></html>".encode("utf-16"),
    "Invalid username": b'{"error":"Invalid username or password."}',
    "no access": json.dumps({"error": {"code": 403, "message": "no access to this model"}}, indent=2).encode(),
    "JSON": b'{"data":{"a":1}}',
    "XML": b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
    "OpenVINO": b'<?xml version="1.0"?>\n<net name="Model0" version="11">\n<layers></layers></net>',
    "Access denied": b"Access denied\n",
    "zip archive": zipped("model.safetensors", "README.md"),
    "TorchScript": zipped("m/data.pkl", "m/constants.pkl", "m/code/x.py"),
    "npz": numpy_file(archive=True),
    "NumPy file": numpy_file(archive=False),
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "RAR": b"Rar!\x1a\x07\x01\0",
    "gzip": gzip.compress(b"weights"),
    "xz": lzma.compress(b"weights"),
    "bzip2": bz2.compress(b"weights"),
    "tar archive": tar(),
    "HDF5": b"\x89HDF\r\n\x1a\n\0\0",
    "TensorFlow Lite": b"\x1c\0\0\0TFL3\0\0",
    "PNG": picture("PNG"),
    "JPEG": picture("JPEG"),
    "PDF": b"%PDF-1.7\n",
    "empty": b"",
    "white space": b"  \n",
    "zeros": bytes(4096),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".gguf", ""])
@pytest.mark.parametrize("fact", KINDS)
def test_kinds_are_named_by_content(tmp_path: Path, fact: str, ending: str) -> None:
    file = tmp_path / f"file{ending}"
    file.write_bytes(KINDS[fact])
    with pytest.raises(ValueError, match=rf"file.*{fact.replace('(', '.').replace(')', '.')}.*: \w+ ") as raised:
        describe(file)
    assert "\n" not in str(raised.value)
    if not ending:
        with pytest.raises(ValueError, match=raised.value.args[0][-20:]):
            read_part(file, "prior")
        with pytest.raises(ValueError, match=raised.value.args[0][-20:]):
            convert([file], tmp_path / "out.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("start", [b"", bytes(1024), b"\x08\x07\x12"])
def test_the_data_of_openvino_is_named_by_its_description(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(start + np.random.default_rng(0).bytes(4096))
    with pytest.raises(ValueError, match=r"model\.bin"):
        describe(tmp_path / "model.bin")
    (tmp_path / "model.xml").write_bytes(KINDS["OpenVINO"])
    with pytest.raises(ValueError, match=r"model\.bin.*OpenVINO"):
        describe(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("prior/model.onnx", "ONNX"), ("openvino_model.xml", "OpenVINO"), ("prior-q8.gguf", "GGUF"),
        ("prior/diffusion_pytorch_model.safetensors", "LFS pointer"), ("prior/diffusion_flax_model.msgpack", "Flax"),
    ],
)  # fmt: skip
def test_folders_without_weights_say_what_is_there(tmp_path: Path, name: str, fact: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(KINDS.get(fact, b"\x82"))
    with pytest.raises(ValueError, match=rf"{Path(name).name}.*{fact}"):
        describe(tmp_path)


def test_weight_files_are_not_taken_for_others(tmp_path: Path) -> None:
    state = random_state(Prior(PRIOR))
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for size in range(2, 300):  # headers of every length start with other bytes
        (tmp_path / "d.safetensors").write_bytes(save({"x": torch.zeros(1)}, {"note": "x" * size}))
        assert name_kind(tmp_path / "d.safetensors") is None, size
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert name_kind(tmp_path / name) is None
        assert [part.name for part in describe(tmp_path / name).parts] == ["prior"]
