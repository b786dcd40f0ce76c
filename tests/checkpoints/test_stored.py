"""Files that change while they are in use: loaded weights stay as they are, and what is read later is refused.

Each test runs in a process of its own, which a mapped file that is cut off would kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import VQ

from tools import ROOT
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.weight_files import read_weight_file
from wuerstchen_core.models.vqgan import VQGAN

SETUP = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from wuerstchen_core.checkpoints import load_vqgan
from wuerstchen_core.checkpoints.convert import convert

folder = Path(sys.argv[1])
state = load_file(folder / "vqgan.safetensors")

def write(kind):
    if kind == "safetensors":
        file = folder / "x.safetensors"
        save_file(state, file)
    else:
        file = folder / "x.pt"
        parts = dict(state)
        parts["in_block.1.weight"] = state["in_block.1.weight"].transpose(0, 1).contiguous().transpose(0, 1)
        content = {"step": 3, "state_dict": parts, "optimizer": {"state": {0: torch.ones(5)}}}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    os.utime(file, ns=(10**18, 10**18))
    return file

def overwrite(file):
    with file.open("r+b") as content:
        content.seek(2000)
        content.write(bytes(file.stat().st_size - 2000))

def replace(file):
    save_file({key: x * 0 for key, x in state.items()}, folder / "other.safetensors")
    os.replace(folder / "other.safetensors", file)

def cut_off(file):
    os.truncate(file, 1000)

changes = {"overwritten": overwrite, "cut off": cut_off, "replaced": replace, "removed": Path.unlink}
"""

LOADED = """
results = {}
for kind in ("safetensors", "zip", "old"):
    file = write(kind)
    network = load_vqgan(file)
    equal = [network.state_dict()[key].equal(x) for key, x in state.items()]
    for change in ("overwritten", "cut off", "removed"):
        changes[change](file)
        equal += [network.state_dict()[key].equal(x) for key, x in state.items()]
    results[kind] = equal
print(json.dumps(results))
"""

CONVERTED = """
results = {}
for kind in ("safetensors", "zip"):
    file, errors = write(kind), {}
    for name, change in changes.items():
        content = file.read_bytes()

        def progress(path, done, total):
            if done > total / 2 and name not in errors:
                errors[name] = None
                change(file)

        try:
            convert([file], folder / "out.safetensors", progress=progress)
        except ValueError as error:
            errors[name] = str(error)
        assert not list(folder.glob("*out*")), name
        file.write_bytes(content)
    results[file.name] = errors
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    save_bundle(folder / "vqgan.safetensors", {"vqgan": VQGAN(VQ)}, {}, bare=True)
    return folder


def run(script: str, folder: Path) -> Any:
    command = [sys.executable, "-c", SETUP + script, str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_loaded_network_does_not_follow_its_file(folder: Path) -> None:
    results = run(LOADED, folder)
    assert list(results) == ["safetensors", "zip", "old"]
    for kind, equal in results.items():
        assert len(equal) > 40 and all(equal), kind


def test_a_source_that_changes_is_not_converted(folder: Path) -> None:
    results = run(CONVERTED, folder)
    assert list(results) == ["x.safetensors", "x.pt"]
    for name, errors in results.items():
        assert len(errors) == 4
        for change, message in errors.items():
            assert message and name in message and "\n" not in message, change


def rezipped(file: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Writes the members of a PyTorch file again, `change`d."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), change(name, data), compress_type=method)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [-4, 4])
def test_tensors_of_another_size_than_their_data_are_refused(tmp_path: Path, method: int, size: int) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.weight": torch.ones(5), "b.weight": torch.ones(6), "c.weight": torch.ones(7)}, file)
    rezipped(file, lambda name, data: data, method)
    state = read_weight_file(file).states[""]
    assert [int(x.load().sum()) for x in state.values()] == [5, 6, 7]
    rezipped(
        file, lambda name, data: (data + bytes(4))[: len(data) + size] if name.endswith("data/1") else data, method
    )
    with pytest.raises(ValueError, match="x.pt"):
        read_weight_file(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["data/1", "data.pkl"])
def test_checksums_are_verified(tmp_path: Path, method: int, member: str) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.weight": torch.ones(5), "b.weight": torch.ones(6)}, file)
    rezipped(file, lambda name, data: data, method)
    with zipfile.ZipFile(file) as archive:
        crc = next(x.CRC for x in archive.infolist() if x.filename.endswith(member)).to_bytes(4, "little")
    content = file.read_bytes()
    assert crc in content
    file.write_bytes(content.replace(crc, bytes(x ^ 1 for x in crc)))
    with pytest.raises(ValueError, match="x.pt"):
        [x.load() for x in read_weight_file(file).states[""].values()]


def test_headers_of_members_are_verified(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.weight": torch.ones(5), "b.weight": torch.ones(6)}, file)
    with zipfile.ZipFile(file) as archive:
        start = next(x.header_offset for x in archive.infolist() if x.filename.endswith("data/1"))
    content = bytearray(file.read_bytes())
    content[start] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="x.pt"):
        read_weight_file(file)


@pytest.mark.parametrize("x", [torch.ones(3, 3).to_sparse(), torch.ones(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_numbers_are_refused(tmp_path: Path, x: torch.Tensor) -> None:
    torch.save({"a.weight": torch.ones(5), "b.weight": x}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt holds b\.weight"):
        read_weight_file(tmp_path / "x.pt")
