"""The same steps under ComfyUI's samplers, measured by `tools.comfyui.measure_speed` in ComfyUI's own Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import ROOT
from .report import aligned
from .run import BenchConfig, Progress

PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "../python_embeded/python.exe")
STAGES = ("prior", "decoder")
MAX_MESSAGE = 200  # characters


def measure(comfyui: Path, config: BenchConfig, progress: Progress) -> list[dict[str, Any]]:
    """Returns the rows of `measure_speed`. Raises ValueError if `comfyui` is no ComfyUI or measuring fails."""
    if not (comfyui / "comfy").is_dir():
        raise ValueError(f"{comfyui} is not a ComfyUI folder: give the folder that contains its main.py")
    stages = [stage for stage in config.stages if stage in STAGES]
    if not stages:
        raise ValueError(f"ComfyUI samples Stages C and B only: combine --comfyui with --stages {','.join(STAGES)}")
    python = next((path for name in PYTHONS if (path := comfyui / name).exists()), Path(sys.executable))
    progress("ComfyUI's samplers", 0, 1)
    job = {name: getattr(config, name) for name in ("sizes", "batch", "dtypes", "repeat", "device", "threads")}
    job |= {"stages": stages, "networks": asdict(config.networks)}
    command = [str(python.absolute()), "-m", "tools.comfyui.measure_speed", str(comfyui.absolute()), json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{comfyui} could not be measured: {last[-MAX_MESSAGE:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table: the seconds of a step each way, and its time relative to the core's."""
    ways = list(rows[0]["ways"])
    head = ["stage", "pixels", "batch", "dtype", "in ComfyUI", *(f"{way} s" for way in ways)]
    lines = [[*head, *(f"{way}, of the core's time" for way in ways[1:])], ["---"] * (len(head) + len(ways) - 1)]
    for row in rows:
        medians = [row["ways"][way]["median"] for way in ways]
        cells = [row["stage"], f"{row['size']}²", str(row["batch"]), row["dtype"], row["comfyui_dtype"]]
        cells += [f"{median:.3g}" for median in medians]
        lines.append(cells + [f"{median / medians[0]:.0%}" for median in medians[1:]])
    return aligned(lines)
