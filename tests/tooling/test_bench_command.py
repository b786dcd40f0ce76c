"""The bench command on tiny networks: what it prints, writes, draws and refuses. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli_runs
from helpers.tiny_bench import TINY, made_up
from PIL import Image

from tools.bench import run as running
from tools.bench import train_step
from tools.bench.__main__ import main
from tools.bench.cases import STAGES, stage_names
from tools.bench.report import Report
from tools.bench.run import Plan
from tools.bench.weights import Sizes

run, failure = partial(cli_runs.run, main=main), partial(cli_runs.failure, main=main)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The command on tiny networks, without processes of their own."""
    real = running.run

    def tiny(plan: Plan, *given: Any) -> Report:
        return real(replace(plan, networks=TINY, gemm_side=64), *given, apart=made_up)

    monkeypatch.setattr(running, "run", tiny)


def test_command(small: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--stages prior,vqgan --sizes 128 --batch 1,2 --dtypes fp32 --repeat 1 --device cpu"
    assert run(*command.split(), "--json", folder / "b.json", "--plot", folder / "b.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("| prior ", "| vqgan-decode ", "| vqgan-encode ", "times faster", "of GEMM peak", "difference"):
        assert words in out
    told = json.loads((folder / "b.json").read_text("utf-8"))
    assert told["gemm_flops_per_second"]["fp32"] > 0 and told["machine"]["packages"]["torch"] == torch.__version__
    assert [(row["stage"], row["batch"]) for row in told["rows"]] == [
        (stage, batch) for stage in ("prior", "vqgan-decode", "vqgan-encode") for batch in (1, 2)
    ]
    row = told["rows"][0]
    assert row["times_faster"] == row["peer"]["median"] / row["ours"]["median"]
    assert row["ours"]["share_of_peak"] == pytest.approx(
        row["flops"] / row["ours"]["median"] / told["gemm_flops_per_second"]["fp32"]
    )
    assert row["memory_ratio"] == 0.5 and row["cold_times_faster"] == 2.0
    assert "load_seconds" in told["rows"][2]["ours"] and told["rows"][1]["ours"]["load_seconds"] is None  # once each
    with Image.open(folder / "b.png") as image:
        assert image.width == 1000
    assert {path.name for path in folder.glob("*b*") if path.is_file()} == {"b.json", "b.png"}


def test_ours_alone(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    command = ("--stages", "decoder", "--sizes", "128", "--dtypes", "fp32", "--repeat", "1", "--device", "cpu")
    words = failure(capsys, *command)
    assert "diffusers" in words and "requirements-bench.txt" in words and "--no-peer" in words
    assert run(*command, "--no-peer") == 0
    out = capsys.readouterr().out
    assert "| decoder " in out and "peer" not in out.replace("above", "") and "times faster" not in out


def test_the_fast_schedule_of_ours(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--stages text-to-picture --sizes 64 --dtypes fp32 --repeat 1 --no-peer --no-memory --steps fast"
    assert run(*given.split()) == 0
    assert "ours in 6+4 steps" in capsys.readouterr().out


def test_training_steps(
    small: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "--stages train --sizes 128 --batch 2,3 --dtypes bf16 --repeat 2 --device cpu --depth 8"
    assert run(*command.split(), "--json", folder / "b.json") == 0
    out = capsys.readouterr().out
    for words in ("| train-prior ", "| train-decoder ", "samples/s", "with our optimiser", "trained were 2 blocks"):
        assert words in out
    first, more, *others = json.loads((folder / "b.json").read_text("utf-8"))["rows"]
    assert more["difference"] is None and more["samples_per_second"] == 3 / more["ours"]["median"]  # after some steps
    for row in (first, others[0]):
        ours, peer = row["ours"], row["peer"]
        assert 0 < row["difference"] < 0.1 and row["memory_ratio"] == 0.5 and ours["load_seconds"] is None
        assert 0 < ours["optimizer"] < ours["median"] and row["samples_per_second"] == 2 / ours["median"]
        alike = (peer["median"] - peer["optimizer"] + ours["optimizer"]) / ours["median"]
        assert row["times_faster_with_our_optimizer"] == pytest.approx(alike)
    monkeypatch.setattr(train_step, "_room", lambda device: 10**6)
    assert "train fewer blocks" in failure(capsys, *command.split())


def test_shallower_networks() -> None:
    sizes = train_step.shallower(Sizes(), 8)
    assert (sizes.prior.depth, sizes.decoder.blocks) == (8, (1, 1, 4, 1)) and sizes.prior.c == Sizes().prior.c


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--stages cellar", "stage 'cellar' is unknown"),
        ("--sizes 500", "nearest legal size is 512x512"),
        ("--sizes big", "--sizes 'big' is no list of numbers"),
        ("--batch 0", "holds no picture"),
        ("--dtypes fp8", "dtype 'fp8' is unknown"),
        ("--repeat 0", "measure nothing"),
        ("--steps 30", "--steps takes those of Stage C and of Stage B"),
        ("--device cuda:7", "cuda:7"),
        ("--json nowhere/b.json", "does not exist"),
        ("--plot b.gif", "no PNG"),
        ("--plot b.png --no-peer", "compares ours with the peer"),
        ("--comfyui .", "holds no ComfyUI"),
        ("--comfyui . --compile --accuracy", "leave out --compile, --accuracy"),
        ("--comfyui . --plot b.png --steps fast", "leave out --plot, --steps"),
        ("--comfyui . --no-peer", "leave out --no-peer"),
        ("--quick --compile", "--quick leaves no time for --compile"),
        ("--stages train --compile", "--compile is for what paints"),
        ("--stages train --dtypes fp16", "leave out fp16"),
        ("--stages prior,train --depth 4", "--depth is for training steps"),
        ("--stages train --depth 0", "give 1 to 32"),
    ],
)
def test_bad_arguments(options: str, words: str, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in failure(capsys, *options.split())


def test_a_full_disk_is_told_before_the_work(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    assert "set TMPDIR" in failure(capsys, "--stages", "prior", "--no-peer")


def test_groups_of_stages() -> None:
    assert stage_names(["vqgan", "prior", "vqgan-decode"]) == ["vqgan-decode", "vqgan-encode", "prior"]
    assert stage_names(["all", "train"]) == list(STAGES)
    assert set(STAGES) - set(stage_names(["all"])) == {"train-prior", "train-decoder"}
