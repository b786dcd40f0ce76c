"""The same steps under ComfyUI's sampling: measured by a script that a ComfyUI's own Python runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import aligned
from .run import Plan, Tell
from .weights import weights_of

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "tools.comfyui.measure_speed"  # run by ComfyUI's own Python
INTERPRETERS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "../python_embeded/python.exe")
STAGES = ("prior", "decoder")
LAST_WORDS = 200  # characters


def measure(comfyui: Path, plan: Plan, tell: Tell) -> list[dict[str, Any]]:
    """Rows as the script gives them. ValueError if there is no ComfyUI, or no script, or it fails."""
    if not (comfyui / "comfy").is_dir():
        raise ValueError(f"{comfyui} holds no ComfyUI: give the folder that its main.py is in")
    stages = [stage for stage in plan.stages if stage in STAGES]
    if not stages:
        raise ValueError(f"ComfyUI samples Stage C and Stage B: give --comfyui with --stages {','.join(STAGES)}")
    python = next((path for name in INTERPRETERS if (path := comfyui / name).exists()), Path(sys.executable))
    with weights_of(stages, plan.dtypes, plan.networks, tell) as folder:
        tell("ComfyUI's sampling", 0, 1)
        told = {name: getattr(plan, name) for name in ("sizes", "batches", "dtypes", "repeat", "device", "threads")}
        words = json.dumps({**told, "stages": stages, "folder": str(folder)})
        command = [str(python), "-m", SCRIPT, str(comfyui.absolute()), words]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"ComfyUI's sampling could not be measured: {last[-LAST_WORDS:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown: the seconds of a step each way, and its time or its FLOP/s beside the core's."""
    ways = list(rows[0]["ways"])
    head = ["stage", "pixels", "batch", "dtype", "in ComfyUI", *(f"{way} s" for way in ways)]
    head += [f"{way}, of the core's time" for way in ways[1:-1]] + [f"{ways[-1]}, of the core's FLOP/s"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        medians = [row["ways"][way]["median"] for way in ways]
        cells = [row["stage"], f"{row['side']}²", str(row["batch"]), row["dtype"], row["host_dtype"].split(".")[-1]]
        cells += [f"{median:.3g}" for median in medians]
        cells += [f"{median / medians[0]:.0%}" for median in medians[1:-1]]
        speeds = row["flops"]["ours"] / medians[0], row["flops"][ways[-1]] / medians[-1]
        lines.append([*cells, f"{speeds[1] / speeds[0]:.0%}"])
    return aligned(lines)
