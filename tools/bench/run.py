"""One run: measures every case. Weights are in memory only, so that nothing is left behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch

from wuerstchen_core.inference.compile import can_compile

from .cases import PICTURE, STEPS, Case, all_cases
from .measure import Clock, Setting, Side, alternate, clock_of, describe_machine, memory_in_use, reset_peak, side_class
from .report import Measured, Report, Row
from .subprocess_worker import measure_in_subprocess
from .weights import ModelSizes

Progress = Callable[[str, int, int], None]  # current work, number of finished items, total
PEER = "peer"


@dataclass(frozen=True)
class BenchConfig:
    """The options of a run."""

    stages: Sequence[str]
    sizes: Sequence[int]
    batch: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("bf16",)
    repeat: int = 3
    device: str = "cpu"
    threads: int = 0  # 0: torch's default
    steps: tuple[int, int] = STEPS  # of our pictures; the peer's always take STEPS
    peer: bool = True
    memory: bool = True
    compile: Sequence[bool] = (False,)
    seconds: float | None = None  # after which no other case is started
    networks: ModelSizes = field(default_factory=ModelSizes)

    def cases(self) -> list[Case]:
        device = torch.device(self.device)
        return all_cases(self.stages, self.sizes, self.batch, self.dtypes, device, self.compile)

    def setting(self, case: Case, side: str) -> Setting:
        return Setting(case, self.networks, self.device, STEPS if side == PEER else self.steps)


def run(
    config: BenchConfig,
    progress: Progress,
    save: Callable[[Report], None] = lambda report: None,
    measure_memory: Callable[[str, Setting, int], int | None] = measure_in_subprocess,
) -> Report:
    """Measures all cases and calls `save` as the report grows.

    Raises ModuleNotFoundError without diffusers. Tests replace `measure_memory`, which is used on CPUs.
    """
    end = None if config.seconds is None else time.monotonic() + config.seconds
    if config.peer:
        from .diffusers_baseline import import_packages

        import_packages()
    if config.threads:
        torch.set_num_threads(config.threads)
    cases = config.cases()
    compiles, clock = any(config.compile) and can_compile(config.device), clock_of(config.device)
    report = Report(describe_machine(config.device, config.threads), notes=list(_notes(config, compiles)))
    if not compiles:
        cases = [case for case in cases if not case.compiled] or [replace(case, compiled=False) for case in cases]
    left_out: list[Case] = []
    for _, group in groupby(cases, lambda case: (case.compiled, case.compute, case.stage)):
        same = list(group)
        if end is not None and time.monotonic() > end:
            left_out += same
            continue
        with torch.inference_mode(not same[0].benchmark.trains):
            progress(same[0].label, len(report.rows), len(cases))
            for row in _time(config, same, clock, end, left_out):
                report.rows.append(row)
                progress(row.case.label, len(report.rows) + len(left_out), len(cases))
                save(report)
    if left_out:
        report.notes.append(f"left out for lack of time: {', '.join(case.label for case in left_out)}")
    if config.memory and torch.device(config.device).type == "cpu":
        for i, row in enumerate(report.rows):
            progress(f"memory of {row.case.label}", i, len(report.rows))
            for name in ("ours", PEER) if config.peer else ("ours",):
                setting = config.setting(row.case, name)
                getattr(row, name).memory = measure_memory(name, setting, config.threads)
            save(report)
    return report


def _time(
    config: BenchConfig, cases: list[Case], clock: Clock, end: float | None, left_out: list[Case]
) -> Iterator[Row]:
    """Yields the rows of cases that differ only in sizes, batches and, on our side, int8.

    Adds the cases to `left_out` that would start after the time `end`.
    """
    first = cases[0]
    variants = {case.dtype: case for case in cases}
    states = config.setting(first, PEER).states()
    sides: dict[str, Side] = {
        dtype: side_class("ours", case)(config.setting(case, "ours"), states) for dtype, case in variants.items()
    }
    if config.peer:
        sides[PEER] = side_class(PEER, first)(config.setting(first, PEER), states)
    weights = {name: side.num_bytes() for name, side in sides.items()}
    if first.compiled:
        for side in sides.values():
            side.compile()
    for _, group in groupby(cases, lambda case: (case.batch, case.size)):
        same = list(group)
        case = same[0]
        if end is not None and time.monotonic() > end:
            left_out += same
            continue
        # Comparing whole pictures would double the time. By the second case, the sides have trained with other dropout.
        compare = case.stage != PICTURE and (case is first or not case.benchmark.trains)
        outputs = {name: side.output(case).double() for name, side in sides.items()} if compare and config.peer else {}
        warm_up = int(case.benchmark.steps)  # a sampler's first step also does one-time work
        runs = {name: partial(side.run, case, 1 + warm_up) for name, side in sides.items()}
        seconds = alternate(runs, config.repeat, warm_up, clock)
        peaks = {name: _peak(config, side, case, weights[name]) for name, side in sides.items()}
        measured = {name: Measured(seconds[name], peaks[name]) for name in sides}
        for one in same:
            difference = None
            if outputs:
                peer = outputs[PEER]
                difference = float((outputs[one.dtype] - peer).norm() / peer.norm())
            yield Row(one, weights[one.dtype], measured[one.dtype], measured.get(PEER), difference)
    del sides, states
    gc.collect()


def _peak(config: BenchConfig, side: Side, case: Case, weights: int) -> int | None:
    """Returns the peak of a side's memory on a GPU; the sides' weights are there together, and count once each."""
    if not config.memory or torch.device(config.device).type != "cuda":
        return None
    reset_peak(config.device)
    before = memory_in_use(config.device)
    side.run(case, 1, lambda *_: None)
    peak = memory_in_use(config.device, peak=True)
    return None if before is None or peak is None else weights + peak - before


def _notes(config: BenchConfig, compiles: bool) -> Iterator[str]:
    """Yields the notes below the table."""
    if PICTURE in config.stages:
        ours, peer = ("+".join(map(str, steps)) for steps in (config.steps, STEPS))
        yield f"{PICTURE}: ours in {ours} steps, the peer in {peer}"
    if config.networks.prior.depth < ModelSizes().prior.depth:
        blocks = "+".join(map(str, config.networks.decoder.blocks))
        yield f"networks with {config.networks.prior.depth} blocks of Stage C, or {blocks} of Stage B down and up"
    if compiles:
        yield "compiled: the blocks of our Stages C and B, and all of the peer's networks"
    elif any(config.compile):
        yield "torch.compile finds no compiler here: both sides ran without it"
