"""One run: writes the weights, measures every case, and leaves no files behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from wuerstchen_core.inference.compile import can_compile

from .cases import BENCHMARKS, PICTURE, STEPS, Case, all_cases
from .measure import Clock, Setting, Side, alternate, clock_of, describe_machine, side_class
from .report import Measured, Report, Row
from .subprocess_worker import measure_in_subprocess
from .weights import ModelSizes, num_bytes, random_weights

Progress = Callable[[str, int, int], None]  # current work, number of finished items, total


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
    compile: bool = False
    networks: ModelSizes = field(default_factory=ModelSizes)

    @property
    def side_steps(self) -> dict[str, tuple[int, int]]:
        """Steps of a whole picture, by side."""
        return {"ours": self.steps, "peer": STEPS} if self.peer else {"ours": self.steps}

    def cases(self) -> list[Case]:
        return all_cases(self.stages, self.sizes, self.batch, self.dtypes)

    def setting(self, case: Case, folder: Path, side: str) -> Setting:
        return Setting(case, folder, self.networks, self.device, self.side_steps[side])


def run(
    config: BenchConfig,
    progress: Progress,
    save: Callable[[Report], None] = lambda report: None,
    measure_memory: Callable[..., tuple[int | None, float, float]] = measure_in_subprocess,
) -> Report:
    """Measures all cases and calls `save` as the report grows. Removes its temporary files even if interrupted.

    Raises ModuleNotFoundError without diffusers, ValueError if the disk is too small. Tests replace `measure_memory`.
    """
    if config.peer:
        from .diffusers_baseline import import_packages

        import_packages()
    if config.threads:
        torch.set_num_threads(config.threads)
    compiles, clock = config.compile and can_compile(config.device), clock_of(config.device)
    report = Report(describe_machine(config.device, config.threads), notes=list(_notes(config, compiles)))
    cases = config.cases()
    files = ((part, case.weight_dtype) for case in cases for part in case.benchmark.parts)
    with random_weights(files, config.networks, progress) as folder:
        for _, group in groupby(cases, lambda case: (case.stage, case.dtype)):
            same = list(group)
            with torch.inference_mode(not same[0].benchmark.trains):
                for row in _time(config, same, folder, compiles, clock):
                    report.rows.append(row)
                    progress(row.case.label, len(report.rows), len(cases))
                    save(report)
        if config.memory:
            for i, row in enumerate(report.rows):
                progress(f"memory of {row.case.label}", i, len(cases))
                for name in config.side_steps:
                    side, setting = getattr(row, name), config.setting(row.case, folder, name)
                    side.memory, side.load, side.cold = measure_memory(name, setting, config.threads, compiles)
                save(report)
    return report


def _time(config: BenchConfig, cases: list[Case], folder: Path, compiles: bool, clock: Clock) -> Iterator[Row]:
    """Yields the rows of cases that share their networks."""
    first = cases[0]
    sides: dict[str, Side] = {
        side: side_class(side, first)(config.setting(first, folder, side)) for side in config.side_steps
    }
    if compiles:
        for side in sides.values():
            side.compile()
    for case in cases:
        # Comparing whole pictures would double the time. By the second case, the sides have trained with other dropout.
        compare = case.stage != PICTURE and (case is first or not case.benchmark.trains)
        difference = None
        if compare and len(sides) == 2:
            ours, peer = (side.output(case).double() for side in sides.values())
            difference = float((ours - peer).norm() / peer.norm())
            del ours, peer
        warm_up = int(case.benchmark.steps)  # a sampler's first step also does one-time work
        runs = {name: partial(side.run, case, 1 + warm_up) for name, side in sides.items()}
        seconds = alternate(runs, config.repeat, warm_up, clock)
        measured = {name: Measured(seconds[name]) for name in sides}
        weights = sum(num_bytes(part, config.networks, case.weight_dtype) for part in case.benchmark.parts)
        yield Row(case, weights, **measured, difference=difference)
    del sides
    gc.collect()


def _notes(config: BenchConfig, compiles: bool) -> Iterator[str]:
    """Yields the notes below the table."""
    if PICTURE in config.stages:
        ours, peer = ("+".join(map(str, steps)) for steps in (config.steps, STEPS))
        yield f"{PICTURE}: ours in {ours} steps, the peer in {peer}"
    if any(BENCHMARKS[name].trains for name in config.stages):
        blocks = "+".join(map(str, config.networks.decoder.blocks))
        yield f"trained: {config.networks.prior.depth} blocks of Stage C, or {blocks} of Stage B down and as many up"
    if compiles:
        yield "compiled: the blocks of our Stages C and B, and all of the peer's networks"
    elif config.compile:
        yield "torch.compile finds no compiler here: both sides ran without it"
