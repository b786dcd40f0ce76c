"""The bench command on tiny networks: what is compared, computed and refused. No time is asserted."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_bench import TINY, made_up, silent

from tools.bench import diffusers_baseline, subprocess_worker, wuerstchen
from tools.bench import run as running
from tools.bench.cases import PICTURE, STAGES, Case
from tools.bench.picture import Steps
from tools.bench.report import Measured, Row, table
from tools.bench.roofline import flops
from tools.bench.run import Plan
from tools.bench.sides import side_of
from tools.bench.timing import interleave
from tools.bench.weights import weight_file, weights_of

WORK = tuple(name for name in STAGES if name != "image-encoder")  # whose peer exists at its full size alone
PLAN = Plan(WORK, [128], dtypes=["fp32"], repeat=1, networks=TINY, gemm_side=64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# What both sides compute


def test_both_sides_give_the_same_and_leave_no_files(folder: Path) -> None:
    report = running.run(PLAN, silent, apart=made_up)
    assert [row.case.stage for row in report.rows] == list(WORK)
    for row in report.rows:
        assert row.difference is not None and row.difference < (2e-3 if row.case.stage == PICTURE else 2e-5), row.case
        assert row.flops > 0 and row.weights > 0
    assert not list(folder.glob("wuerstchen-bench-*"))


def test_every_layer_counts(folder: Path) -> None:
    """A weight of any layer that is changed changes the output, and nothing runs away."""
    from tools.bench.wuerstchen import Ours

    stages = ("prior", "decoder", "vqgan-decode", "vqgan-encode")
    with weights_of(stages, ["fp32"], TINY, silent) as files, torch.inference_mode():
        for stage in stages:
            case = Case(stage, 128, 1, "fp32")
            side = Ours(PLAN.setting(case, files, lambda: 0.0))
            first = side.output(case)
            assert first.isfinite().all() and 0.01 < first.std() < 100
            network = getattr(side.pipeline, STAGES[stage].parts[0])
            names = {"vqgan-decode": ("up_blocks", "out_block"), "vqgan-encode": ("in_block", "down_blocks")}
            for name, tensor in network.state_dict().items():
                if not tensor.is_floating_point() or not name.startswith(names.get(stage, "")):
                    continue
                if name.endswith("to_k.bias"):  # softmax takes no notice of it
                    continue
                kept = tensor.clone()
                tensor.mul_(1.5)
                assert (side.output(case) - first).norm() > 1e-6 * first.norm(), name
                tensor.copy_(kept)


def test_pictures_are_compared_only_in_equal_steps(folder: Path) -> None:
    plan = replace(PLAN, stages=[PICTURE], steps=(2, 2), repeat=1, memory=False)
    report = running.run(plan, silent)
    assert report.rows[0].difference is None
    assert "ours in 2+2 steps, the peer in 30+12" in report.notes[0]
    told = report.as_dict()["rows"][0]
    ours, peer = (told[side]["flops_per_second"] * told[side]["median"] for side in ("ours", "peer"))
    assert ours == pytest.approx(told["flops"]) and peer > 4 * ours  # each by its own steps


def test_how_far_both_sides_are_from_fp32(folder: Path) -> None:
    plan = replace(PLAN, stages=["prior"], dtypes=["bf16"], accuracy=True, memory=False)
    [row] = running.run(plan, silent).rows
    assert row.peer is not None and row.ours.error is not None and row.peer.error is not None
    assert 1e-4 < row.ours.error < 2e-2 and row.ours.error <= row.peer.error


def test_both_sides_learn_with_dropout_and_in_memory_of_their_own(folder: Path) -> None:
    case = Case("train-prior", 128, 2, "bf16")
    with weights_of([case.stage], ["bf16"], TINY, silent) as files:
        before = weight_file(files, "prior", "fp32").read_bytes()
        for name in ("ours", "peer"):
            side = side_of(name, case.stage)(PLAN.setting(case, files, lambda: 0.0))
            drops = [layer.p for layer in side.network.modules() if isinstance(layer, torch.nn.Dropout)]
            assert drops and set(drops) == {0.1} and side.network.training
            weights = [p.detach().clone() for p in side.network.parameters()]
            side.run(case, 2, lambda: None)
            changed = [not torch.equal(p, old) for p, old in zip(side.network.parameters(), weights, strict=True)]
            assert sum(changed) == len(weights) and {p.dtype for p in side.network.parameters()} == {torch.float32}
        assert weight_file(files, "prior", "fp32").read_bytes() == before


def test_image_encoder_alone(folder: Path) -> None:
    [row] = running.run(replace(PLAN, stages=["image-encoder"], sizes=[64], memory=False, repeat=1), silent).rows
    assert row.difference is not None and row.difference < 1e-5


def test_without_a_compiler_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "can_compile", lambda device: False)
    plan = replace(PLAN, stages=["vqgan-decode"], compile=True, memory=False, peer=False)
    report = running.run(plan, silent)
    assert report.rows[0].ours.median is not None
    assert report.notes == ["torch.compile finds no compiler here: both sides ran without it"]


def test_both_sides_are_compiled_in_every_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    told_apart: list[bool] = []
    monkeypatch.setattr(running, "can_compile", lambda device: True)
    monkeypatch.setattr(wuerstchen.Ours, "compile", lambda self: compiled.append("ours"))
    monkeypatch.setattr(diffusers_baseline.Peer, "compile", lambda self: compiled.append("peer"))

    def apart(side: str, case: Case, rounds: int, told: dict[str, Any]) -> dict[str, Any]:
        told_apart.append(told["compile"])
        return made_up(side, case, rounds, told)

    report = running.run(replace(PLAN, stages=["prior", "vqgan-decode"], compile=True), silent, apart=apart)
    assert compiled == ["ours", "peer"] * 2 and told_apart == [True] * 4
    cold = ("cold_seconds", "cold_compile_seconds")
    rows = report.as_dict()["rows"]
    assert [[row[side][name] for name in cold] for row in rows for side in ("ours", "peer")] == [
        [None, 3.0],
        [None, 6.0],
        [3.0, None],  # our Stage A is never compiled
        [None, 6.0],
    ]
    assert [row["cold_compile_times_faster"] for row in rows] == [2.0, None]
    assert "cold s, compiling" in table(report.rows[:1]) and "| cold s " not in table(report.rows[:1])
    assert report.notes == ["compiled were the blocks of our Stages C and B, and all of the peer's networks"]


def test_an_interruption_leaves_no_files(folder: Path) -> None:
    def stop(words: str, done: int, total: int) -> None:
        if words.startswith("prior"):
            assert list(folder.glob("wuerstchen-bench-*"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(replace(PLAN, stages=["prior"]), stop)
    assert not list(folder.glob("wuerstchen-bench-*"))


# What is computed of what was measured


class Clock:
    """Each look at it costs nothing; work makes it go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """A side that takes the seconds given, round by round."""

    left_out = 0.0

    def __init__(self, clock: Clock, seconds: list[float], log: list[str], name: str):
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name

    def rounds(self, case: Case, rounds: int) -> Iterator[None]:
        assert rounds == len(self.seconds)
        for seconds in self.seconds:
            self.clock.now += seconds
            self.log.append(self.name)
            yield

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        for _ in self.rounds(case, rounds):
            after()


def test_sides_take_turns_and_the_first_step_is_told_apart() -> None:
    clock, log = Clock(), []
    ours, peer = Worker(clock, [9.0, 1.0, 2.0, 1.5], log, "A"), Worker(clock, [8.0, 4.0, 3.0, 2.0], log, "B")
    mine, theirs = interleave(ours, peer, Case("prior", 512, 1, "bf16"), 3, clock)
    assert "".join(log) == "ABABABAB"
    assert (mine.first, mine.seconds, mine.median, mine.spread) == (9.0, [1.0, 2.0, 1.5], 1.5, pytest.approx(1 / 3))
    assert theirs is not None and (theirs.first, theirs.median) == (8.0, 3.0)


def test_work_without_steps_has_no_first_round() -> None:
    clock = Clock()
    worker = Worker(clock, [3.0, 1.0, 2.0], [], "A")
    worker.left_out = 10.0  # of steps that were not done
    times, nobody = interleave(worker, None, Case(PICTURE, 512, 1, "bf16"), 3, clock)
    assert nobody is None and times.first is None and times.seconds == [13.0, 11.0, 12.0]


def test_steps_left_out_take_as_long_as_the_later_ones() -> None:
    clock = Clock()
    steps = Steps(clock)
    for seconds in (10.0, 2.0, 4.0):
        clock.now += seconds
        steps.done("prior")
    clock.now += 100.0
    steps.begin()
    for seconds in (7.0, 1.0):
        clock.now += seconds
        steps.done("decoder")
    assert steps.left_out((30, 12)) == 27 * 3.0 + 10 * 1.0
    assert steps.left_out((3, 2)) == 0.0


def test_numbers_of_a_row() -> None:
    case = Case("decoder", 1024, 2, "bf16")
    row = Row(case, flops=6 * 10**12, weights=2 * 10**9, ours=Measured(median=2.0), peer=Measured(median=5.0))
    apart_of = {
        "load_seconds": 0.5,
        "first_seconds": 2.0,
        "import_seconds": 1.0,
        "load_peak": 3 * 10**9,
        "load_private": 10**9,
    }
    row.ours.remember({"peak": 3 * 10**9, **apart_of}, row.weights, loading=True, compiled=False)
    assert row.peer is not None
    row.peer.remember(
        {"peak": 4 * 10**9, **apart_of, "load_seconds": 1.0, "first_seconds": 5.0},
        row.weights,
        loading=True,
        compiled=False,
    )
    told = json.loads(json.dumps(row.as_dict()))
    assert (told["times_faster"], told["memory_ratio"]) == (2.5, 0.75)
    assert (told["load_times_faster"], told["cold_times_faster"]) == (2.0, 2.5)
    assert told["ours"]["memory_above_weights"] == 10**9
    head, _, line = table([row]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)), strict=True))
    assert cells == {
        "stage": "decoder", "pixels": "1024²", "batch": "2", "dtype": "bf16", "ours s": "2", "peer s": "5",
        "times faster": "2.50x", "ours GB": "3.00", "peer GB": "4.00", "memory ratio": "0.75x",
        "above weights GB": "1.00", "peer above": "2.00", "load s": "0.50", "peer load s": "1.00",
        "cold s": "2.00", "peer cold s": "5.00",
        "load private, of weights": "50%", "peer's": "50%",
    }  # fmt: skip


def test_the_share_of_the_peak_is_the_works() -> None:
    case = Case("vqgan-decode", 128, 3, "fp32")
    one, three = (flops(replace(case, batch=batch), TINY, False, (30, 12)) for batch in (1, 3))
    assert three == 3 * one
    side, clock = Measured(), Clock()
    times, _ = interleave(Worker(clock, [0.5], [], "A"), None, case, 1, clock)
    side.fill(times, three, peak=1e9)
    assert side.flops_per_second == three / 0.5 and side.share_of_peak == three / 0.5 / 1e9


def test_the_work_is_counted_of_the_peer_and_includes_attention() -> None:
    one, four, sixteen = (flops(Case("prior", side, 1, "bf16"), TINY, True, (30, 12)) for side in (128, 256, 512))
    # 9, 36 and 144 tokens: what grows with their square is attention, two products for both halves of the guidance.
    square = ((sixteen - one) / (144 - 9) - (four - one) / (36 - 9)) / (144 - 36)
    assert square == 2 * 2 * 2 * TINY.prior.c * TINY.prior.depth
    guided, plain = (flops(Case(name, 256, 1, "bf16"), TINY, True, (30, 12)) for name in ("decoder-guided", "decoder"))
    assert guided == 2 * plain
    parts = {name: flops(Case(name, 256, 1, "bf16"), TINY, True, (3, 2)) for name in ("prior", "decoder", PICTURE)}
    rest = flops(Case("vqgan-decode", 256, 1, "bf16"), TINY, True, (3, 2))
    assert parts[PICTURE] == 3 * parts["prior"] + 2 * parts["decoder"] + rest


# A process of its own


def test_memory_and_loading_in_a_process_of_its_own(folder: Path) -> None:
    case = Case("vqgan-decode", 128, 1, "fp32")
    with weights_of([case.stage], ["fp32"], TINY, silent) as files:
        told = {"folder": str(files), "device": "cpu", "threads": 1, "steps": [30, 12], "compile": False}
        found = subprocess_worker.measure_apart("ours", case, 1, told)
        assert 0 < found["load_seconds"] <= found["first_seconds"] and found["import_seconds"] > 0
        if sys.platform == "linux":
            assert 0 < found["peak"] < 10**9 and found["load_private"] >= 0
        with pytest.raises(ValueError, match="ours could not be measured apart"):
            subprocess_worker.measure_apart("ours", replace(case, stage="prior"), 1, told)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_process_of_its_own_compiles_from_nothing(folder: Path) -> None:
    built: list[int] = []
    with weights_of(["vqgan-decode", "prior"], ["fp32"], TINY, silent) as files:
        told = {"folder": str(files), "device": "cpu", "threads": 1, "steps": [30, 12], "compile": True}
        for stage in ("vqgan-decode", "prior"):
            subprocess_worker.measure_apart("ours", Case(stage, 128, 1, "fp32"), 1, told)
            built.append(len(list(files.rglob("*.so"))))
    trial, prior = built[0], built[1] - built[0]  # Stage A is never compiled
    assert prior > trial > 0
