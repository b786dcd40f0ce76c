"""One measurement in a process of its own: `python -m ...bench.child SIDE KIND CASE FOLDER`; prints its JSON.

KIND is "memory" (the peak of two rounds) or "load" (from the file to the end of the first round).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import Case

STEPS = 2  # the first of a sampler's fills what the next ones use


def measure_apart(side: str, kind: str, case: Case, told: dict[str, Any]) -> dict[str, Any]:
    """Run this file in a fresh interpreter; RuntimeError with its last words if it fails."""
    words = {"side": side, "kind": kind, "case": asdict(case), **told}
    package = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", f"{package.name}.bench.child", json.dumps(words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{side} {case.label}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _main(words: dict[str, Any]) -> dict[str, Any]:
    import torch

    from .memory import Peak, Private
    from .timing import clock_of
    from .weights import sizes_of

    if words["threads"]:
        torch.set_num_threads(words["threads"])
    case, device, folder = Case(**words["case"]), torch.device(words["device"]), Path(words["folder"])
    make = _side(words["side"])
    clock = clock_of(device)
    torch.zeros(1, device=device)  # a device's own context isn't the model's
    peak, started = Peak(device), clock()
    with torch.inference_mode():
        with Private() as private:
            side = make(case.stage, folder, sizes_of(folder), case.dtype, device)
        loaded, load_peak = clock() - started, peak.read()
        peak.restart()
        side.run(case, STEPS if words["kind"] == "memory" else 1, lambda: None)
    return {
        "peak": peak.read(),
        "load_peak": load_peak,
        "load_private": private.highest,
        "load_seconds": loaded,
        "seconds": clock() - started,
    }


def _side(name: str) -> Any:
    """A side's class, with all that it needs imported."""
    if name == "ours":
        from .ours import Ours

        return Ours
    from .peer import Peer, import_packages

    import_packages()
    return Peer


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
