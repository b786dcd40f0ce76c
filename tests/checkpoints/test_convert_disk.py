"""Tests that `convert` writes a complete file or none, and needs little memory."""

from __future__ import annotations

import errno
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wuerstchen_core.checkpoints import describe, writer
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.cli.main import main
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
import sys
from pathlib import Path
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints import save_bundle
def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
small, source, target, dtype = sys.argv[1:]
convert([small], Path(target).with_name("warm.safetensors"), dtype=dtype)  # imports, allocators, threads
before, peak = anonymous_memory(), 0.0
def watch(path, done, total):
    global peak
    peak = max(peak, anonymous_memory() - before)
convert([source], target, dtype=dtype, progress=watch)
print(peak)
"""


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system has no /proc to read memory from"
)


@needs_proc
@pytest.mark.parametrize(
    ("dtype", "ending"), [("keep", "safetensors"), ("bf16", "pt"), ("fp8", "safetensors"), ("int8", "pt")]
)
def test_memory(bundle: Path, tmp_path: Path, dtype: str, ending: str) -> None:
    """Converting a prior of 136 MB in fp32 needs little memory."""
    state = Prior(PriorParams(c=512, nhead=8, depth=10)).state_dict()
    source = tmp_path / f"prior.{ending}"
    if ending == "pt":
        torch.save({"ema_state_dict": original(state)}, source)
    else:
        save_file(state, source)
    target = tmp_path / "out.safetensors"
    assert source.stat().st_size / 2**20 > 130
    assert_small(bundle, source, target, dtype)


@pytest.fixture(scope="module")
def large_towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower of 151 MB, whose tensors are packed (from transformers) or dequantized when converted."""
    folder = tmp_path_factory.mktemp("towers")
    save_file(clip_of_transformers(256, 48, vocab_size=2000), folder / "fp32.safetensors")
    for dtype in ("fp8", "int8"):
        convert([folder / "fp32.safetensors"], folder / f"{dtype}.safetensors", dtype=dtype)
    return folder


@needs_proc
@pytest.mark.parametrize(
    ("sources", "dtype"), [("fp32", "fp8"), ("fp8", "bf16"), ("int8", "fp32"), ("fp8", "int8"), ("int8", "keep")]
)
def test_memory_of_packing_and_dequantizing(
    bundle: Path, large_towers: Path, tmp_path: Path, sources: str, dtype: str
) -> None:
    assert_small(bundle, large_towers / f"{sources}.safetensors", tmp_path / "out.safetensors", dtype)


def assert_small(bundle: Path, source: Path, target: Path, dtype: str) -> None:
    """Converts in a new process, which may use memory for a third of the file it writes."""
    command = [sys.executable, "-c", MEASURE, str(bundle), str(source), str(target), dtype]
    # glibc returns the memory of a tensor when it is freed: what remains is in use.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    written = target.stat().st_size / 2**20
    assert float(result.stdout) < 0.35 * written, (result.stdout, written)


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
