"""Tests that `convert` writes a complete file or none, and needs little memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import clip_of_transformers, original
from helpers.tiny_model import write_tiny_bundle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wuerstchen_core.checkpoints import describe, writer
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.lock import file_lock, folder_lock
from wuerstchen_core.models.prior import Prior, PriorParams

ROOT = Path(__file__).parents[2]


def test_files_are_not_overwritten_without_force(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.safetensors"
    target.write_bytes(b"mine")
    (tmp_path / "vqgan.safetensors").write_bytes(b"mine")
    for goal in (target, tmp_path):
        with pytest.raises(ValueError, match=r"(mine|vqgan)\.safetensors.*--force"):
            convert([bundle], goal)
    assert target.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2
    convert([bundle], target, force=True)
    assert target.read_bytes() == bundle.read_bytes()
    convert([target], target, force=True, dtype="bf16")  # replaces the file that is being read
    assert describe(target).parts[0].dtype == "bf16"


@pytest.mark.parametrize(("target", "to"), [("x.safetensors", "comfyui"), ("parts", "comfyui"), ("parts", "diffusers")])
def test_what_another_process_writes_is_refused(tmp_path: Path, target: str, to: str) -> None:
    bundle = write_tiny_bundle(tmp_path / "c", without=("decoder", "vqgan", "image_encoder"))
    path = tmp_path / "out" / target
    with file_lock(path) if path.suffix else folder_lock(path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=rf"{target} .*{os.getpid()}"):
            convert([bundle], path, to=to, force=True)
        assert sorted(tmp_path.rglob("*")) == before
    convert([bundle], path, to=to)
    assert not [file for file in path.parent.rglob(".*")]


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_failure_keeps_what_another_process_has_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    bundle = write_tiny_bundle(tmp_path / "c", without=("decoder", "vqgan", "image_encoder"))
    lock = folder_lock

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        folder.mkdir()
        (folder / "theirs").touch()
        with lock(folder):
            yield

    monkeypatch.setattr("wuerstchen_core.checkpoints.convert.folder_lock", late)
    for name in ("save_bundle", "write_pipeline"):
        monkeypatch.setattr(f"wuerstchen_core.checkpoints.convert.{name}", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert([bundle], tmp_path / "out", to=to, force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_invalid_targets_are_rejected(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"folder\.safetensors"):
        convert([bundle], tmp_path / "folder.safetensors")
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        convert([bundle], tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="at least one"):
        convert([], tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("function", "error", "fact"),
    [
        ("replace", PermissionError(errno.EACCES, "locked"), "read-only or in use"),
        ("fsync", OSError(errno.EIO, "Input/output error"), "input/output error"),
    ],
)
def test_a_failed_write_is_one_sentence_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: OSError, fact: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise error

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(OSError, match=r"x\.safetensors") as raised:
        convert([bundle], tmp_path / "x.safetensors", force=True)
    assert fact in str(raised.value) and "\n" not in str(raised.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits files to `size` bytes, which fails like a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(bundle: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(OSError, match=r"x\.safetensors.*disk is full"):
        convert([bundle], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", [(-5, os.SEEK_END), (9, os.SEEK_SET)], ids=["a weight", "the header"])
def test_a_disk_that_stores_other_bytes_is_detected(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: tuple[int, int]
) -> None:
    verify = writer._verify

    def corrupt(path: Path, checksums: Any) -> None:
        with path.open("rb+") as file:
            file.seek(*position)
            file.write(b"?")
        verify(path, checksums)

    monkeypatch.setattr(writer, "_verify", corrupt)
    with pytest.raises(OSError, match=r"x\.safetensors.*read back"):
        convert([bundle], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    def stop(path: Path, done: int, total: int) -> None:
        assert path == tmp_path / "x.safetensors" and any(tmp_path.iterdir())
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([bundle], tmp_path / "x.safetensors", progress=stop)
    assert not list(tmp_path.iterdir())


MEASURE = """
import json, sys
from pathlib import Path
from wuerstchen_core.checkpoints.convert import convert
def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
small, target, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
shares = []
for source, dtype in cases:
    convert([small], target.with_name("warm.safetensors"), dtype=dtype, force=True)  # imports, allocators, threads
    before, peak = anonymous_memory(), 0.0
    def watch(path, done, total):
        global peak
        peak = max(peak, anonymous_memory() - before)
    convert([source], target, dtype=dtype, force=True, progress=watch)
    shares.append(peak / (target.stat().st_size / 2**20))
print(json.dumps(shares))
"""
CASES = [
    ("prior.safetensors", "keep"), ("prior.pt", "int8"), ("fp32.safetensors", "fp8"), ("fp8.safetensors", "bf16"),
]  # fmt: skip
MORE_CASES = [
    ("prior.safetensors", "fp8"), ("prior.pt", "bf16"), ("fp8.safetensors", "int8"), ("int8.safetensors", "fp32"),
    ("int8.safetensors", "keep"),
]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc to read memory from")
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.long)], ids=["some", "more"])
def test_memory(bundle: Path, tmp_path: Path, cases: list[tuple[str, str]]) -> None:
    """Converting needs memory for a third of the file that it writes: a prior of 136 MB in fp32, and a text tower of
    151 MB, whose tensors are packed (from transformers) or dequantized."""
    state = Prior(PriorParams(c=512, nhead=8, depth=10)).state_dict()
    save_file(state, tmp_path / "prior.safetensors")
    torch.save({"ema_state_dict": original(state)}, tmp_path / "prior.pt")
    save_file(clip_of_transformers(256, 48, vocab_size=2000), tmp_path / "fp32.safetensors")
    for dtype in {source.removesuffix(".safetensors") for source, _ in cases} & {"fp8", "int8"}:
        convert([tmp_path / "fp32.safetensors"], tmp_path / f"{dtype}.safetensors", dtype=dtype)
    assert all((tmp_path / name).stat().st_size > 130 * 2**20 for name in ("prior.safetensors", "fp32.safetensors"))
    listed = json.dumps([(str(tmp_path / source), dtype) for source, dtype in cases])
    command = [sys.executable, "-c", MEASURE, str(bundle), str(tmp_path / "out.safetensors"), listed]
    # glibc returns the memory of a tensor when it is freed: what remains is in use.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    shares = dict(zip(cases, json.loads(result.stdout), strict=True))
    assert max(shares.values()) < 0.35, shares


# the command


def test_command(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "half.safetensors"
    assert main(["convert", str(bundle), str(target), "--dtype", "bf16,vqgan=fp32"]) == 0
    assert capsys.readouterr() == (f"{target}\n", "")
    assert main(["convert", str(bundle), str(target)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(target) in err and "--force" in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["convert", str(bundle), str(target), "--force"]) == 0
    err = capsys.readouterr().err
    assert "half.safetensors [###" in err and err.endswith("\x1b[K")


def test_files_are_those_of_safetensors(bundle: Path, tmp_path: Path) -> None:
    """The data are those of safetensors' own writer."""
    with safe_open(bundle, "pt") as file:
        save_file(load_file(bundle), tmp_path / "theirs.safetensors", metadata=file.metadata())
    theirs, ours = (tmp_path / "theirs.safetensors").read_bytes(), bundle.read_bytes()
    assert len(theirs) == len(ours) and sorted(theirs[:8]) == sorted(ours[:8])
    assert theirs[-1_000_000:] == ours[-1_000_000:]
