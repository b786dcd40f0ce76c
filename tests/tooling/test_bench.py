"""The benchmark on tiny networks: both sides compute the same, and results are computed right. No time is asserted."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_bench import TINY, fixed_memory, no_progress

from tools.bench import diffusers_baseline, wuerstchen
from tools.bench import run as bench
from tools.bench.cases import BENCHMARKS, PICTURE, Case, stage_names
from tools.bench.measure import alternate, side_class
from tools.bench.report import Measured, Row, table
from tools.bench.run import BenchConfig
from tools.bench.subprocess_worker import measure_in_subprocess
from tools.bench.train_step import shallower
from tools.bench.weights import ModelSizes, random_weights, weight_file

CONFIG = BenchConfig(list(BENCHMARKS), [128], dtypes=["fp32"], repeat=1, steps=(2, 1), networks=TINY)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_both_sides_compute_the_same_and_leave_no_files(folder: Path) -> None:
    report = bench.run(CONFIG, no_progress, measure_memory=fixed_memory)
    assert [row.case.stage for row in report.rows] == list(BENCHMARKS)
    for row in report.rows:
        assert row.weights > 0 and row.ours.median > 0 and row.peer is not None and row.memory_ratio == 0.5
        assert (row.difference is None) == (row.case.stage == PICTURE)
        assert row.difference is None or row.difference < 2e-5, row.case
    assert "2+1" in report.notes[0] and "30+12" in report.notes[0]
    assert not list(folder.glob("wuerstchen-bench-*"))


def test_both_sides_generate_the_same_pictures_and_samples(folder: Path) -> None:
    files = [(part, "fp32") for part in BENCHMARKS[PICTURE].parts]
    with random_weights(files, TINY, no_progress) as weights, torch.inference_mode():
        for stage in ("prior", "decoder", PICTURE):
            case = Case(stage, 128, 2, "fp32")
            ours, peer = (
                side_class(name, case)(replace(CONFIG.setting(case, weights, name), steps=(2, 2)))
                for name in ("ours", "peer")
            )
            if stage == PICTURE:
                x, y = ours.output(case), peer.output(case)
            else:
                data = ours._inputs(case)
                x, y = (side.sample(case, data, 2, lambda *_: None) for side in (ours, peer))
                y = y * TINY.vqgan.scale_factor if stage == "decoder" else y
            assert (x - y).norm() < 2e-3 * y.norm(), stage


def test_every_layer_affects_the_output(folder: Path) -> None:
    stages = ("prior", "decoder", "vqgan-decode", "vqgan-encode")
    layers = {"vqgan-decode": ("up_blocks", "out_block"), "vqgan-encode": ("in_block", "down_blocks")}
    with random_weights([(part, "fp32") for part in TINY_PARTS], TINY, no_progress) as weights, torch.inference_mode():
        for stage in stages:
            case = Case(stage, 128, 1, "fp32")
            side = wuerstchen.Wuerstchen(CONFIG.setting(case, weights, "ours"))
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


TINY_PARTS = ("prior", "decoder", "vqgan")


def test_both_sides_train_with_dropout_on_copies_of_the_weights(folder: Path) -> None:
    case = Case("train-prior", 128, 2, "bf16")
    with random_weights([("prior", case.weight_dtype)], TINY, no_progress) as weights:
        before = weight_file(weights, "prior", "fp32").read_bytes()
        for name in ("ours", "peer"):
            side = side_class(name, case)(CONFIG.setting(case, weights, name))
            dropouts = [layer.p for layer in side.network.modules() if isinstance(layer, torch.nn.Dropout)]
            assert dropouts and set(dropouts) == {0.1} and side.network.training
            old = [p.detach().clone() for p in side.network.parameters()]
            side.run(case, 2, lambda: None)
            assert not any(torch.equal(p, q) for p, q in zip(side.network.parameters(), old, strict=True))
            assert {p.dtype for p in side.network.parameters()} == {torch.float32}
        assert weight_file(weights, "prior", "fp32").read_bytes() == before


def test_without_a_compiler_a_note_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    config = replace(CONFIG, stages=["vqgan-decode"], compile=True, memory=False, peer=False)
    [note] = bench.run(config, no_progress).notes
    assert "no compiler" in note


def test_both_sides_are_compiled_here_and_in_subprocesses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    in_subprocess: list[bool] = []
    monkeypatch.setattr(bench, "can_compile", lambda device: True)
    monkeypatch.setattr(wuerstchen.Wuerstchen, "compile", lambda self: compiled.append("ours"))
    monkeypatch.setattr(diffusers_baseline.DiffusersBaseline, "compile", lambda self: compiled.append("peer"))

    def measure_memory(side: str, setting: object, threads: int, compiles: bool) -> tuple[int, float, float]:
        in_subprocess.append(compiles)
        return 1, 1.0, 1.0

    config = replace(CONFIG, stages=["prior", "vqgan-decode"], compile=True)
    bench.run(config, no_progress, measure_memory=measure_memory)
    assert compiled == ["ours", "peer"] * 2 and in_subprocess == [True] * 4


def test_an_interruption_leaves_no_files(folder: Path) -> None:
    def interrupt(text: str, done: int, total: int) -> None:
        assert list(folder.glob("wuerstchen-bench-*"))
        if text.startswith("prior"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(replace(CONFIG, stages=["prior"]), interrupt)
    assert not list(folder.glob("wuerstchen-bench-*"))


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
    case = Case("decoder", 1024, 2, "bf16")
    ours = Measured([1.0, 2.0, 2.5], memory=3 * 10**9, load=0.5, cold=2.0)
    peer = Measured([5.0], memory=4 * 10**9, load=1.0, cold=5.0)
    row = Row(case, weights=2 * 10**9, ours=ours, peer=peer)
    values = json.loads(json.dumps(row.as_dict()))
    assert (values["times_faster"], values["memory_ratio"], values["ours"]["median"]) == (2.5, 0.75, 2.0)
    head, _, line = table([row]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)), strict=True))
    assert cells == {
        "stage": "decoder", "pixels": "1024²", "batch": "2", "dtype": "bf16", "ours s": "2", "±": "38%",
        "peer s": "5", "peer ±": "0%", "times faster": "2.50x", "weights GB": "2.00", "ours GB": "3.00",
        "peer GB": "4.00", "memory ratio": "0.75x", "load s": "0.50", "peer load s": "1.00",
        "cold s": "2.00", "peer cold s": "5.00",
    }  # fmt: skip


def test_shallower_networks() -> None:
    sizes = shallower(ModelSizes(), 8)
    assert (sizes.prior.depth, sizes.decoder.blocks) == (8, (1, 1, 4, 1)) and sizes.prior.c == ModelSizes().prior.c


def test_groups_of_stages() -> None:
    assert stage_names(["vqgan", "prior", "vqgan-decode"]) == ["vqgan-decode", "vqgan-encode", "prior"]
    assert set(BENCHMARKS) - set(stage_names(["all", "train"])) == {PICTURE}


def test_memory_and_loading_in_a_subprocess(folder: Path) -> None:
    case = Case("vqgan-decode", 128, 1, "fp32")
    with random_weights([("vqgan", "fp32")], TINY, no_progress) as weights:
        setting = CONFIG.setting(case, weights, "ours")
        memory, load, cold = measure_in_subprocess("ours", setting, 1, False)
        assert 0 < load <= cold
        if sys.platform == "linux":
            assert memory is not None and 0 < memory < 10**9
        with pytest.raises(ValueError, match="prior"):
            measure_in_subprocess("ours", replace(setting, case=replace(case, stage="prior")), 1, False)
