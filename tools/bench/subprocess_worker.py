"""Memory and loading time of one side, measured in a process that does nothing else."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from wuerstchen_core.inference.compile import can_compile

from .measure import Setting, clock_of, memory_in_use, reset_peak, side_class

Result = tuple[int | None, float, float]


def measure_in_subprocess(side: str, setting: Setting, threads: int, compiles: bool) -> Result:
    """Returns bytes of peak memory, and seconds of loading and up to the end of the first round.

    Both times start at the weight files, which the system has cached. Raises ValueError if the process dies.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, side, setting, threads, compiles).result()
        except BrokenProcessPool:
            raise ValueError(
                f"the process that measured {side} ({setting.case.label}) died, probably for lack of memory: choose "
                "smaller --sizes, or leave its measurement out with --no-memory"
            ) from None


def _measure(side: str, setting: Setting, threads: int, compiles: bool) -> Result:
    case, device = setting.case, setting.device
    load_side = side_class(side, case)  # before the measurement: imports are not measured,
    if threads:
        torch.set_num_threads(threads)
    torch.zeros(1, device=device)  # nor is the device's context,
    if compiles:  # nor the compiler's import; the empty cache makes it compile everything
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=setting.folder)
        can_compile(device)
    clock, before = clock_of(device), memory_in_use(device)
    begin = clock()
    with torch.inference_mode(not case.benchmark.trains):
        network = load_side(setting)
        ends = [clock() - begin]
        reset_peak(device)
        if compiles:
            network.compile()
        network.run(case, 1 + int(case.benchmark.steps), lambda *_: ends.append(clock() - begin))
    peak = memory_in_use(device, peak=True)
    return None if before is None or peak is None else peak - before, ends[0], ends[1]
