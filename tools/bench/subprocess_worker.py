"""Memory of one side, measured in a process that does nothing else."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from .measure import Setting, memory_in_use, reset_peak, side_class


def measure_in_subprocess(side: str, setting: Setting, threads: int) -> int | None:
    """Returns bytes of peak memory. Raises ValueError if the process dies."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, side, setting, threads).result()
        except BrokenProcessPool:
            raise ValueError(
                f"the process that measured {side} ({setting.case.label}) died, probably for lack of memory: choose "
                "smaller --sizes, or leave its measurement out with --no-memory"
            ) from None


def _measure(side: str, setting: Setting, threads: int) -> int | None:
    case, device = setting.case, setting.device
    load_side = side_class(side, case)  # before the measurement: imports are not measured,
    if threads:
        torch.set_num_threads(threads)
    torch.zeros(1, device=device)  # nor is the device's context
    before = memory_in_use(device)
    with torch.inference_mode(not case.benchmark.trains):
        network = load_side(setting, setting.states())
        if case.compiled:
            network.compile()
        reset_peak(device)
        network.run(case, 1 + int(case.benchmark.steps), lambda *_: None)
    peak = memory_in_use(device, peak=True)
    return None if before is None or peak is None else peak - before
