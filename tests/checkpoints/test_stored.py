"""Files that change while they are in use: loaded weights stay as they are, and what is read later is refused.

Each test runs in a process of its own, which a mapped file that is cut off would kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.networks import VQ

from tools import ROOT
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.models.vqgan import VQGAN

SETUP = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from wuerstchen_core.checkpoints import load_vqgan
from wuerstchen_core.checkpoints.convert import convert

folder, kind = Path(sys.argv[1]), sys.argv[2]
state = load_file(folder / "vqgan.safetensors")
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

def overwrite():
    with file.open("r+b") as content:
        content.seek(2000)
        content.write(bytes(file.stat().st_size - 2000))

def replace():
    save_file({key: x * 0 for key, x in state.items()}, folder / "other.safetensors")
    os.replace(folder / "other.safetensors", file)

def cut_off():
    os.truncate(file, 1000)

changes = {"overwritten": overwrite, "cut off": cut_off, "replaced": replace, "removed": file.unlink}
"""

LOADED = """
network = load_vqgan(file)
equal = [network.state_dict()[key].equal(x) for key, x in state.items()]
for change in ("overwritten", "cut off", "removed"):
    changes[change]()
    equal += [network.state_dict()[key].equal(x) for key, x in state.items()]
print(json.dumps(equal))
"""

CONVERTED = """
errors = {}
for name, change in changes.items():
    content = file.read_bytes()

    def progress(path, done, total):
        if done > total / 2 and name not in errors:
            errors[name] = None
            change()

    try:
        convert([file], folder / "out.safetensors", progress=progress)
    except ValueError as error:
        errors[name] = str(error)
    assert not list(folder.glob("*out*")), name
    file.write_bytes(content)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    save_bundle(folder / "vqgan.safetensors", {"vqgan": VQGAN(VQ)}, {}, bare=True)
    return folder


def run(script: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", SETUP + script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_a_loaded_network_does_not_follow_its_file(folder: Path, kind: str) -> None:
    equal = run(LOADED, folder, kind)
    assert len(equal) > 40 and all(equal)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_a_source_that_changes_is_not_converted(folder: Path, kind: str) -> None:
    errors = run(CONVERTED, folder, kind)
    assert len(errors) == 4
    for change, message in errors.items():
        assert message and f"x.{'pt' if kind == 'zip' else kind}" in message and "\n" not in message, change
