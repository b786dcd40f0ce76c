"""A run: the weights are written, every case is measured, and nothing is left behind."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cases as catalogue
from .cases import STAGES, Case
from .child import measure_apart
from .limits import flops, gemm_peak
from .ours import Ours
from .report import Measured, Row
from .timing import Clock, Times, clock_of, interleave
from .weights import Sizes, bytes_of, write, write_sizes

Tell = Callable[[str, int, int], None]  # what is done now, the number of what is done, of how many
Apart = Callable[[str, str, Case, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What a run measures, and how."""

    stages: Sequence[str] = ("prior", "decoder", "vqgan-decode")
    sizes: Sequence[int] = (512, 1024)
    batches: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("bf16",)
    repeat: int = 3
    device: str = "cpu"
    threads: int = 0  # 0: torch's choice
    peer: bool = True
    memory: bool = True
    load: bool = True
    compile: bool = False
    networks: Sizes = field(default_factory=Sizes)

    def cases(self) -> list[Case]:
        return list(catalogue.cases(self.stages, self.sizes, self.batches, self.dtypes))


def run(plan: Plan, tell: Tell, *, clock: Clock | None = None, apart: Apart = measure_apart) -> list[Row]:
    """Measure; returns a row for each case. The temporary files are gone afterwards, also after an interruption."""
    if plan.peer:
        from .peer import check_installed, import_packages

        check_installed()
        import_packages()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    clock = clock or clock_of(plan.device)
    rows: list[Row] = []
    with weights_of(plan, tell) as folder, torch.inference_mode():
        peaks = {dtype: gemm_peak(dtype, plan.device, clock) for dtype in plan.dtypes}
        todo = plan.cases()
        for (stage, dtype), same in groupby(todo, lambda case: (case.stage, case.dtype)):
            sides = _sides(plan, stage, dtype, folder)
            for case in same:
                tell(case.label, len(rows), len(todo))
                rows.append(_timed(plan, case, sides, peaks[dtype], clock))
            del sides
            gc.collect()
        for i, row in enumerate(rows):
            if plan.memory or plan.load:
                tell(f"memory of {row.case.label}", i, len(rows))
                _apart(plan, row, folder, apart)
    return rows


@contextmanager
def weights_of(plan: Plan, tell: Tell) -> Iterator[Path]:
    """A folder with the weights of every network that a plan needs. ValueError if the disk has no room for them."""
    wanted = [(part, dtype) for dtype in plan.dtypes for part in {p: 0 for s in plan.stages for p in STAGES[s].parts}]
    needed = sum(bytes_of(part, plan.networks, dtype) for part, dtype in wanted)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise ValueError(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free and the random weights take {needed / 1e9:.1f} GB: "
            "set TMPDIR to a folder with room, or measure fewer stages or dtypes at a time"
        )
    with tempfile.TemporaryDirectory(prefix="wuerstchen-bench-") as name:
        folder = Path(name)
        write_sizes(folder, plan.networks)
        for i, (part, dtype) in enumerate(wanted):
            tell(f"weights of the {part} in {dtype}", i, len(wanted))
            write(folder, part, plan.networks, dtype)
        yield folder


def _sides(plan: Plan, stage: str, dtype: str, folder: Path) -> tuple[Ours, Any]:
    ours, peer = Ours(stage, folder, plan.networks, dtype, plan.device), None
    if plan.peer:
        from .peer import Peer

        peer = Peer(stage, folder, plan.networks, dtype, plan.device)
    for side in (ours, peer):
        if plan.compile and side is not None:
            side.compile()
    return ours, peer


def _timed(plan: Plan, case: Case, sides: tuple[Ours, Any], peak: float, clock: Clock) -> Row:
    ours, peer = sides
    wanted, given = ours.output(case), None if peer is None else peer.output(case)
    difference = None if given is None else relative(wanted, given)
    del wanted, given
    work = flops(case, plan.networks, plan.peer)
    times = interleave(ours, peer, case, plan.repeat, clock)
    weights = bytes_of(STAGES[case.stage].parts[0], plan.networks, case.dtype)
    measured = [None if time is None else _measured(time, work, peak) for time in times]
    return Row(case, work, weights, measured[0] or Measured(), measured[1], difference)


def relative(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    reference = reference.double()
    return float((x.double() - reference).norm() / reference.norm())


def _measured(times: Times, work: int, peak: float) -> Measured:
    speed = work / times.median
    return Measured(times.median, times.spread, times.first, times.seconds, speed, speed / peak)


def _apart(plan: Plan, row: Row, folder: Path, apart: Apart) -> None:
    """Fill in what is measured in processes of their own."""
    told = {"folder": str(folder), "device": plan.device, "threads": plan.threads}
    for name, side in (("ours", row.ours), ("peer", row.peer)):
        if side is None:
            continue
        if plan.memory:
            side.memory = apart(name, "memory", row.case, told)["peak"]
            if side.memory is not None:
                side.memory_above_weights = side.memory - row.weights
        if plan.load:
            found = apart(name, "load", row.case, told)
            side.load_seconds, side.load_memory = found["seconds"], found["load_private"]
