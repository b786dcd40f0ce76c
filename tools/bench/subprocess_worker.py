"""One measurement in a process of its own: `python -m ...bench.child WORDS`, with and printing JSON.

Loads a side's networks and does their work: what that takes in memory, and how long it takes from the file, which the
system has in memory already, to the end of the first round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import STAGES, Case

LAST_WORDS = 200  # characters


def measure_apart(side: str, case: Case, rounds: int, told: dict[str, Any]) -> dict[str, Any]:
    """Run this file in a fresh interpreter: `rounds` of a side's work; ValueError with its last words if it fails."""
    words = {"side": side, "case": asdict(case), "rounds": rounds, **told}
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A place of its own for what is compiled, that compiling is not finding what was compiled before.
    place = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=told["folder"])} if told["compile"] else {}
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.subprocess_worker", json.dumps(words)],
        env={**os.environ, **place, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{side} could not be measured apart ({case.label}): {last[-LAST_WORDS:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _main(words: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    import torch

    make = _side(words["side"], words["case"]["stage"])
    imported = time.perf_counter() - begun

    from wuerstchen_core.inference.compile import can_compile

    from .memory import Peak, Private
    from .setting import Setting
    from .timing import clock_of
    from .weights import sizes_of

    if words["threads"]:
        torch.set_num_threads(words["threads"])
    case, device, folder = Case(**words["case"]), torch.device(words["device"]), Path(words["folder"])
    clock, sizes = clock_of(device), sizes_of(folder)
    torch.zeros(1, device=device)  # a device's own context isn't the model's
    if words["compile"]:  # nor is what the compiler imports
        can_compile(device)
    peak, started = Peak(device), clock()
    with torch.inference_mode(not STAGES[case.stage].learns):
        with Private() as private:
            side = make(Setting(case.stage, case.dtype, folder, sizes, device, clock, tuple(words["steps"])))
        loaded, load_peak = clock() - started, peak.read()
        peak.restart()
        ends: list[float] = []
        if words["compile"]:
            side.compile()
        side.run(case, words["rounds"], lambda: ends.append(clock() - started))
    return {
        "peak": peak.read(),
        "load_peak": load_peak,
        "load_private": private.highest,
        "import_seconds": imported,
        "load_seconds": loaded,
        "first_seconds": ends[0],
    }


def _side(name: str, stage: str) -> Any:
    """A side's class, with all that it needs imported."""
    from .sides import side_of

    if name == "peer":
        from .diffusers_baseline import import_packages

        import_packages()
    return side_of(name, stage)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
