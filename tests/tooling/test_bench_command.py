"""The command of the benchmark on tiny networks: output, files and refused options. No time is asserted."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli_runs
from helpers.tiny_bench import TINY, fixed_memory

from tools.bench import run as bench
from tools.bench.__main__ import main
from tools.bench.cases import fast_dtypes, stage_names
from tools.bench.report import Report
from tools.bench.run import BenchConfig

run, failure = partial(cli_runs.run, main=main), partial(cli_runs.failure, main=main)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes the command run tiny networks without subprocesses."""
    original = bench.run

    def tiny(config: BenchConfig, *args: Any) -> Report:
        return original(replace(config, networks=TINY), *args, measure_memory=fixed_memory)

    monkeypatch.setattr(bench, "run", tiny)


def test_command(small: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--stages prior,vqgan --sizes 128 --batch 1,2 --dtypes fp32 --repeat 1 --device cpu"
    assert run(*command.split(), "--json", folder / "results" / "b.json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("| prior ", "| vqgan-decode ", "| vqgan-encode ", "times faster", "memory ratio", "difference"):
        assert words in out
    result = json.loads((folder / "results" / "b.json").read_text("utf-8"))
    assert torch.__version__.startswith(result["machine"]["packages"]["torch"])
    assert [(row["stage"], row["batch"]) for row in result["rows"]] == [
        (stage, batch) for stage in ("prior", "vqgan-decode", "vqgan-encode") for batch in (1, 2)
    ]
    row = result["rows"][0]
    assert row["times_faster"] == row["peer"]["median"] / row["ours"]["median"]
    assert row["memory_ratio"] == 0.5
    assert [path.name for path in (folder / "results").iterdir()] == ["b.json"]  # the folder is created


def test_ours_alone(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.utils.logging", None)
    command = ("--stages", "decoder", "--sizes", "128", "--dtypes", "fp32", "--repeat", "1", "--device", "cpu")
    message = failure(capsys, *command)
    assert "diffusers" in message and "requirements-bench.txt" in message and "--no-peer" in message
    assert run(*command, "--no-peer") == 0
    out = capsys.readouterr().out
    assert "| decoder " in out and "peer" not in out and "times faster" not in out


def test_quick_and_fast(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quick", "--sizes", "128", "--no-peer", "--device", "cpu") == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in out.splitlines() if line.startswith("| ")][2:]
    assert list(dict.fromkeys(row[0] for row in rows)) == ["prior", "decoder", "vqgan-decode", "vqgan-encode"]
    assert list(dict.fromkeys(row[3] for row in rows)) == fast_dtypes(torch.device("cpu"))
    options = "--stages text-to-picture --sizes 64 --dtypes fp32 --repeat 1 --no-peer --no-memory --steps fast"
    assert run(*options.split()) == 0
    assert "6+4" in capsys.readouterr().out


def test_training_steps(small: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--stages train --sizes 128 --batch 2,3 --dtypes bf16 --repeat 2 --device cpu --depth 8"
    assert run(*command.split(), "--json", folder / "b.json") == 0
    out = capsys.readouterr().out
    assert "| train-prior " in out and "| train-decoder " in out and "2 blocks" in out
    first, second, *others = json.loads((folder / "b.json").read_text("utf-8"))["rows"]
    assert second["difference"] is None  # both sides have trained by then
    for row in (first, others[0]):
        assert 0 < row["difference"] < 0.1 and row["memory_ratio"] == 0.5


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ("--stages cellar", "'cellar'"),
        ("--sizes 500", "512x512"),
        ("--sizes big", "'big'"),
        ("--batch 0", "--batch 0"),
        ("--dtypes fp8", "'fp8'"),
        ("--repeat 0", "--repeat 0"),
        ("--steps 30", "'30'"),
        ("--device cuda:7", "cuda:7"),
        ("--comfyui .", "main.py"),
        ("--stages train --compile", "--compile"),
        ("--stages train --dtypes fp16", "fp16"),
        ("--stages train --dtypes int8", "--dtypes"),
        ("--stages train --depth 0", "1 to 32"),
    ],
)
def test_bad_arguments(options: str, fact: str, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert fact in failure(capsys, *options.split())


def test_gpu_writes_one_page(small: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    assert run("--gpu", "--device", "cpu", "--sizes", "64", "--repeat", "1", "--steps", "1+1", "--no-peer") == 0
    [page] = folder.iterdir()
    text = page.read_text("utf-8")
    table, _, numbers = text.partition("```json")
    rows = json.loads(numbers.partition("```")[0])["rows"]
    assert page.name == "bench-gpu.md" and "| text-to-picture " in table and "no compiler" in table
    assert {(row["stage"], row["dtype"]) for row in rows} == {
        (stage, dtype) for stage in stage_names(["all", "text-to-picture"]) for dtype in ("bf16", "fp16", "int8")
    }


def test_gpu_needs_a_gpu(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("wuerstchen_core.common.devices.pick_device", lambda device: torch.device("cpu"))
    assert "--device" in failure(capsys, "--gpu")
