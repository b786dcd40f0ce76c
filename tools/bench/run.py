"""A run: the weights are written, every case is measured, and nothing is left behind."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.inference.compile import can_compile
from wuerstchen_core.inference.stages import DENOISERS

from . import cases as catalogue
from .cases import PICTURE, STAGES, STEPS, Case, stored
from .machine import machine
from .picture import SHORT
from .report import Measured, Report, Row
from .roofline import flops, gemm_peak
from .setting import Clock, Setting
from .sides import side_of
from .subprocess_worker import measure_apart
from .timing import clock_of, interleave
from .weights import Sizes, bytes_of, weight_file, weights_of

Tell = Callable[[str, int, int], None]  # what is done now, the number of what is done, of how many
Apart = Callable[[str, Case, int, dict[str, Any]], dict[str, Any]]
QUICK, QUICK_TIMES = 95.0, 70.0  # seconds after which a quick run begins nothing, and takes no time any more
CHUNK = 2**24  # bytes that are read at once
Keep = Callable[[Report], None]  # is given the report as it grows


@dataclass(frozen=True)
class Plan:
    """What a run measures, and how."""

    stages: Sequence[str]
    sizes: Sequence[int]
    batches: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("bf16",)
    repeat: int = 3
    device: str = "cpu"
    threads: int = 0  # 0: torch's choice
    steps: tuple[int, int] = STEPS  # of our pictures; the peer's have STEPS
    full: bool = False  # pictures with every step
    peer: bool = True
    memory: bool = True
    accuracy: bool = False  # how far each side is from fp32
    compile: bool = False
    quick: bool = False  # ends within QUICK seconds
    networks: Sizes = field(default_factory=Sizes)
    gemm_side: int | None = None  # of the product that is the measure of the machine

    def cases(self) -> list[Case]:
        found = list(catalogue.cases(self.stages, self.sizes, self.batches, self.dtypes))
        # A quick run has all networks at the smallest size before any at the next, in case its time runs out.
        return sorted(found, key=lambda case: case.pixels) if self.quick else found

    def setting(self, case: Case, folder: Path, clock: Clock, compute: torch.dtype | None = None) -> Setting:
        return Setting(
            case.stage, case.dtype, folder, self.networks, self.device, clock, self.steps, self.full, compute
        )


def run(
    plan: Plan,
    tell: Tell,
    keep: Keep = lambda report: None,
    *,
    clock: Clock | None = None,
    apart: Apart = measure_apart,
) -> Report:
    """Measure. The temporary files are gone afterwards, also after an interruption.

    ValueError says what is missing. `clock` and `apart` are what takes the time and what measures in processes.
    """
    return _Run(plan, tell, keep, clock or clock_of(plan.device), apart).all()


class _Run:
    def __init__(self, plan: Plan, tell: Tell, keep: Keep, clock: Clock, apart: Apart):
        self.plan, self.tell, self.keep, self.clock, self.apart = plan, tell, keep, clock, apart
        self.begun = time.monotonic()
        if plan.peer:
            from .diffusers_baseline import check_installed, import_packages

            check_installed()
            import_packages()
        learn = [name for name in plan.stages if STAGES[name].learns]
        if learn:
            from .train_step import check_room

            check_room(learn, plan.networks, 1 + plan.peer + plan.accuracy, plan.device)
        if plan.threads:
            torch.set_num_threads(plan.threads)
        self.report = Report(machine(plan.device, plan.threads))
        self.compile = plan.compile and can_compile(plan.device)
        self.left_out: list[str] = []
        self.taken: dict[tuple[str, str], float] = {}  # seconds a pixel, by stage and dtype
        if PICTURE in plan.stages:
            self.report.notes.append(_made_of(plan))
        if learn:
            self.report.notes.append(_trained(plan))
        if plan.compile and not self.compile:
            self.report.notes.append("torch.compile finds no compiler here: both sides ran without it")
        if self.compile:
            self.report.notes.append("compiled were the blocks of our Stages C and B, and all of the peer's networks")

    def all(self) -> Report:
        plan, report = self.plan, self.report
        with weights_of(plan.stages, plan.dtypes, plan.networks, self.tell) as folder, torch.inference_mode():
            self._measure_peaks()
            todo = plan.cases()
            for (stage, _), same in groupby(todo, lambda case: (case.stage, case.dtype)):
                with torch.inference_mode(not STAGES[stage].learns):
                    for row in self._timed(list(same), folder, len(todo)):
                        report.rows.append(row)
                        self.keep(report)
            self._measure_peaks()
            if plan.memory:
                self._apart(folder)
        if self.left_out:
            report.notes.append(f"left out for lack of time: {', '.join(self.left_out)}")
        return report

    def _measure_peaks(self) -> None:
        """Before and after the rest, since a machine has better and worse moments; shares are of the better one."""
        peaks = self.report.peaks
        self.tell("a large product", 0, 1)
        for dtype in self.plan.dtypes:
            found = gemm_peak(dtype, self.plan.device, self.clock, self.plan.gemm_side)
            peaks[dtype] = max(found, peaks.get(dtype, 0.0))
        for row in self.report.rows:
            for side in filter(None, (row.ours, row.peer)):
                side.compare(peaks[row.case.dtype])

    def _timed(self, same: list[Case], folder: Path, total: int) -> Iterator[Row]:
        """Rows of cases that the same networks work on."""
        plan = self.plan
        kinds = [side_of(name, same[0].stage) for name in ("ours", "peer")[: 1 + plan.peer]]
        self.tell(same[0].label, len(self.report.rows), total)
        if self._too_late(same[0]):
            self.left_out += [case.label for case in same]
            return
        sides = [kind(plan.setting(same[0], folder, self.clock)) for kind in kinds]
        exact = None
        if plan.accuracy and same[0].dtype != "fp32":
            exact = kinds[-1](plan.setting(same[0], folder, self.clock, torch.float32))
        for side in sides:
            if self.compile:
                side.compile()
        for case in same:
            self.tell(case.label, len(self.report.rows), total)
            begun, known = time.monotonic(), (case.stage, case.dtype) in self.taken
            compare = self.compile or not (plan.quick and known)  # nobody is to compile while the time is taken
            compare = compare and not (known and STAGES[case.stage].learns)  # whose weights are others by now
            yield self._row(case, sides[0], sides[1] if plan.peer else None, exact, compare)
            self.taken[case.stage, case.dtype] = (time.monotonic() - begun) / case.pixels
        del sides, exact
        gc.collect()

    def _too_late(self, case: Case) -> bool:
        """Whether a quick run has no time for a case, going by what a smaller one of its stage took."""
        expected = self.taken.get((case.stage, case.dtype), 0.0) * case.pixels
        return self.plan.quick and self._passed() + expected > QUICK_TIMES

    def _passed(self) -> float:
        return time.monotonic() - self.begun

    def _row(self, case: Case, ours: Any, peer: Any, exact: Any, compare: bool) -> Row:
        plan = self.plan
        outputs = [side.output(case) if side is not None and compare else None for side in (ours, peer, exact)]
        alike = case.stage != PICTURE or plan.steps == STEPS
        dtype = stored(case.stage, case.dtype)
        work = {steps: flops(case, plan.networks, plan.peer, steps) for steps in {plan.steps, STEPS}}
        row = Row(
            case,
            flops=work[plan.steps],
            weights=sum(bytes_of(part, plan.networks, dtype) for part in STAGES[case.stage].parts),
            difference=_relative(outputs[0], outputs[1]) if alike else None,
        )
        row.ours.error = _relative(outputs[0], outputs[2])
        if peer is not None:
            row.peer = Measured(error=_relative(outputs[1], outputs[2]))
        del outputs
        times = interleave(ours, peer, case, plan.repeat, self.clock)
        for side, worker, time_of, steps in zip(
            (row.ours, row.peer), (ours, peer), times, (plan.steps, STEPS), strict=True
        ):
            if side is not None and time_of is not None:
                side.fill(time_of, work[steps], self.report.peaks[case.dtype])
                if STAGES[case.stage].learns:
                    side.optimizer = statistics.median(worker.optimizer_seconds[1:])
        return row

    def _apart(self, folder: Path) -> None:
        """Fill in what is measured in processes of their own: memory, and for each network once, its loading."""
        plan, rows = self.plan, self.report.rows
        told = {"folder": str(folder), "device": plan.device, "threads": plan.threads, "steps": plan.steps}
        told["compile"] = self.compile
        seen: set[tuple[str, str]] = set()
        for i, row in enumerate(rows):
            case, stage = row.case, STAGES[row.case.stage]
            network = stage.parts[0], case.dtype
            first = network not in seen and case.stage != PICTURE and not stage.learns
            seen.add(network)
            if plan.quick and first and self._passed() > QUICK:
                self.left_out.append(f"memory of {case.label}")
            if plan.quick and (not first or self._passed() > QUICK):
                continue
            for name, side in (("ours", row.ours), ("peer", row.peer)):
                if side is not None:
                    self.tell(f"memory of {case.label}, {name}", i, len(rows))
                    if first:
                        _read_through(weight_file(folder, part, case.dtype) for part in (*stage.parts, *stage.beside))
                    found = self.apart(name, case, 2 if stage.steps else 1, told)
                    compiled = self.compile and (name == "peer" or stage.parts[0] in DENOISERS)
                    side.remember(found, row.weights, loading=first, compiled=compiled)
            self.keep(self.report)


def _read_through(files: Iterable[Path]) -> None:
    """Let the system have files in memory, so that whoever loads them first has no harder time."""
    for path in files:
        with path.open("rb") as file:
            while file.read(CHUNK):
                pass


def _relative(x: Tensor | None, reference: Tensor | None) -> float | None:
    """|x - reference| / |reference|."""
    if x is None or reference is None:
        return None
    reference = reference.double()
    return float((x.double() - reference).norm() / reference.norm())


def _made_of(plan: Plan) -> str:
    """How the steps of a picture were measured."""
    asked = [f"{PICTURE}: ours in {plan.steps[0]}+{plan.steps[1]} steps, the peer in {STEPS[0]}+{STEPS[1]}"]
    if not plan.full:
        asked.append(f"{SHORT} of each stage measured, the others made up of the later of these")
    return "; ".join(asked)


def _trained(plan: Plan) -> str:
    """What learnt, and what of it differs between the sides."""
    blocks = "+".join(map(str, plan.networks.decoder.blocks))
    return (
        f"trained were {plan.networks.prior.depth} blocks of Stage C, or {blocks} of Stage B and as many again; the "
        "peer's AdamW is torch's default, as in diffusers' script, and ours its fused one, as in our loop"
    )
