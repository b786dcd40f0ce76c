"""The benchmark on tiny networks: both sides compute the same, and results are computed right. No time is asserted."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_bench import TINY, fixed_memory, no_progress

from tools.bench import diffusers_baseline, wuerstchen
from tools.bench import run as bench
from tools.bench.cases import BENCHMARKS, PICTURE, Case, fast_dtypes, stage_names
from tools.bench.measure import Setting, alternate, side_class
from tools.bench.report import Measured, Row, table
from tools.bench.run import BenchConfig
from tools.bench.subprocess_worker import measure_in_subprocess
from tools.bench.train_step import shallower
from tools.bench.weights import ModelSizes
from wuerstchen_core.common.devices import has_int8, native_bf16

CONFIG = BenchConfig(list(BENCHMARKS), [128], dtypes=["fp32"], repeat=1, steps=(2, 1), networks=TINY)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def side_of(name: str, case: Case, **changes: Any) -> Any:
    setting = replace(CONFIG.setting(case, name), **changes)
    return side_class(name, case)(setting, setting.states())


def test_both_sides_compute_the_same_and_write_no_files(folder: Path) -> None:
    written: list[int] = []

    def progress(*_: Any) -> None:
        written.extend(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    report = bench.run(CONFIG, progress, measure_memory=fixed_memory)
    assert [row.case.stage for row in report.rows] == list(BENCHMARKS)
    for row in report.rows:
        assert row.weights > 0 and row.ours.median > 0 and row.peer is not None and row.memory_ratio == 0.5
        assert (row.difference is None) == (row.case.stage == PICTURE)
        assert row.difference is None or row.difference < 2e-5, row.case
    assert any("2+1" in note and "30+12" in note for note in report.notes)
    assert sum(written) < 1000  # torch makes folders for its caches


def test_int8_is_compared_with_the_same_peer() -> None:
    config = replace(CONFIG, stages=["prior", "vqgan-decode"], dtypes=["fp32", "int8", "bf16"])
    rows = bench.run(replace(config, device="cpu"), no_progress, measure_memory=fixed_memory).rows
    companion = "bf16" if native_bf16(torch.device("cpu")) else "fp32"
    found = {(row.case.stage, row.case.dtype): row for row in rows}
    assert len(found) == len(rows) == 6
    for stage in config.stages:
        assert found[stage, "int8"].peer is found[stage, companion].peer
        assert found[stage, "int8"].weights < found[stage, companion].weights
        assert 0 < found[stage, "int8"].difference < 0.3


def test_fast_dtypes() -> None:
    found = fast_dtypes(torch.device("cpu"))
    assert found[0] == ("bf16" if native_bf16(torch.device("cpu")) else "fp32")
    assert found[1:] == (["int8"] if has_int8() else [])


def test_cases_that_no_longer_fit_are_left_out() -> None:
    report = bench.run(replace(CONFIG, stages=["prior", "vqgan-decode"], seconds=-1.0, memory=False), no_progress)
    assert not report.rows and "prior" in report.notes[-1] and "vqgan-decode" in report.notes[-1]
    assert report.text()


def test_both_sides_generate_the_same_pictures_and_samples() -> None:
    with torch.inference_mode():
        for stage in ("prior", "decoder", PICTURE):
            case = Case(stage, 128, 2, "fp32", "fp32")
            ours, peer = (side_of(name, case, steps=(2, 2)) for name in ("ours", "peer"))
            if stage == PICTURE:
                x, y = ours.output(case), peer.output(case)
            else:
                data = ours._inputs(case)
                x, y = (side.sample(case, data, 2, lambda *_: None) for side in (ours, peer))
                y = y * TINY.vqgan.scale_factor if stage == "decoder" else y
            assert (x - y).norm() < 2e-3 * y.norm(), stage


def test_every_layer_affects_the_output() -> None:
    stages = ("prior", "decoder", "vqgan-decode", "vqgan-encode")
    layers = {"vqgan-decode": ("up_blocks", "out_block"), "vqgan-encode": ("in_block", "down_blocks")}
    with torch.inference_mode():
        for stage in stages:
            case = Case(stage, 128, 1, "fp32", "fp32")
            side = side_of("ours", case)
            first = side.output(case)
            assert first.isfinite().all() and 0.01 < first.std() < 100
            for name, tensor in side.networks[case.benchmark.parts[0]].state_dict().items():
                if not tensor.is_floating_point() or not name.startswith(layers.get(stage, "")):
                    continue
                if name.endswith("to_k.bias"):  # cancels in the softmax
                    continue
                original = tensor.clone()
                tensor.mul_(1.5)
                assert (side.output(case) - first).norm() > 1e-6 * first.norm(), name
                tensor.copy_(original)


def test_both_sides_train_with_dropout_on_copies_of_the_weights() -> None:
    case = Case("train-prior", 128, 2, "bf16", "bf16")
    states = CONFIG.setting(case, "ours").states()
    before = {key: x.clone() for key, x in states["prior"].items()}
    for name in ("ours", "peer"):
        side = side_class(name, case)(CONFIG.setting(case, name), states)
        dropouts = [layer.p for layer in side.network.modules() if isinstance(layer, torch.nn.Dropout)]
        assert dropouts and set(dropouts) == {0.1} and side.network.training
        old = [p.detach().clone() for p in side.network.parameters()]
        side.run(case, 2, lambda: None)
        assert not any(torch.equal(p, q) for p, q in zip(side.network.parameters(), old, strict=True))
        assert {p.dtype for p in side.network.parameters()} == {torch.float32}
    assert all(torch.equal(x, before[key]) for key, x in states["prior"].items())


def test_without_a_compiler_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    for compile, rows in (((True,), 1), ((False, True), 1)):
        config = replace(CONFIG, stages=["vqgan-decode"], compile=compile, memory=False, peer=False)
        report = bench.run(config, no_progress)
        assert any("no compiler" in note for note in report.notes)
        assert [row.case.compiled for row in report.rows] == [False] * rows


def test_both_sides_are_compiled_here_and_in_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    in_subprocess: list[bool] = []
    monkeypatch.setattr(bench, "can_compile", lambda device: True)
    monkeypatch.setattr(wuerstchen.Wuerstchen, "compile", lambda self: compiled.append("ours"))
    monkeypatch.setattr(diffusers_baseline.DiffusersBaseline, "compile", lambda self: compiled.append("peer"))

    def measure_memory(side: str, setting: Setting, threads: int) -> int:
        in_subprocess.append(setting.case.compiled)
        return 1

    config = replace(CONFIG, stages=["prior", "vqgan-decode"], compile=(False, True))
    bench.run(config, no_progress, measure_memory=measure_memory)
    assert compiled == ["ours", "peer"] * 2 and in_subprocess == [False] * 4 + [True] * 4


def test_sides_take_turns_and_the_first_step_of_a_turn_does_not_count() -> None:
    now, log = 0.0, []

    def side(name: str, *seconds: float) -> Callable[[Callable[[], None]], None]:
        def run(after: Callable[[], None]) -> None:
            nonlocal now
            for one in seconds:
                now += one
                log.append(name)
                after()

        return run

    found = alternate({"ours": side("a", 9.0, 1.0, 2.0), "peer": side("b", 8.0, 4.0)}, 2, 1, lambda: now)
    assert "".join(log) == "aaabb" * 2
    assert found == {"ours": [1.0, 2.0] * 2, "peer": [4.0] * 2}


def test_numbers_of_a_row() -> None:
    case = Case("decoder", 1024, 2, "bf16", "bf16")
    ours = Measured([1.0, 2.0, 2.5], memory=3 * 10**9)
    peer = Measured([5.0], memory=4 * 10**9)
    row = Row(case, weights=2 * 10**9, ours=ours, peer=peer)
    values = json.loads(json.dumps(row.as_dict()))
    assert (values["times_faster"], values["memory_ratio"], values["ours"]["median"]) == (2.5, 0.75, 2.0)
    head, _, line = table([row]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)), strict=True))
    assert cells == {
        "stage": "decoder", "pixels": "1024²", "batch": "2", "dtype": "bf16", "ours s": "2", "±": "38%",
        "peer s": "5", "peer ±": "0%", "times faster": "2.50x", "weights GB": "2.00", "ours GB": "3.00",
        "peer GB": "4.00", "memory ratio": "0.75x",
    }  # fmt: skip


def test_shallower_networks() -> None:
    sizes = shallower(ModelSizes(), 8)
    assert (sizes.prior.depth, sizes.decoder.blocks) == (8, (1, 1, 4, 1)) and sizes.prior.c == ModelSizes().prior.c


def test_groups_of_stages() -> None:
    assert stage_names(["vqgan", "prior", "vqgan-decode"]) == ["vqgan-decode", "vqgan-encode", "prior"]
    assert set(BENCHMARKS) - set(stage_names(["all", "train"])) == {PICTURE}


def test_memory_in_a_subprocess() -> None:
    case = Case("vqgan-decode", 128, 1, "fp32", "fp32")
    setting = CONFIG.setting(case, "ours")
    memory = measure_in_subprocess("ours", setting, 1)
    if sys.platform == "linux":
        assert memory is not None and 0 < memory < 10**9
    broken = replace(setting, sizes=replace(TINY, vqgan=replace(TINY.vqgan, c_hidden=0)))
    with pytest.raises((ValueError, ZeroDivisionError, RuntimeError)):
        measure_in_subprocess("ours", broken, 1)
