"""All stages in a tiny size: two things at 64 pixels, a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.training.checkpoint import checkpoints

STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # of v2, each after those whose networks it uses
ALL = (*STAGES, "token-decoder")
DIFFUSERS = ("vqgan", "decoder", "prior")  # stages whose networks diffusers has

COMMON = """
run = {run}

[data]
canvas = 64
things = 2

[train]
steps = 4
batch = 4
lr = 1e-3
muon_lr = 1e-3
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 4
"""
TABLES = {
    "vqgan": """
[model]
bottleneck_blocks = 1
c_hidden = 16
codebook_size = 16
[vqgan]
crop = 32
margin = 8
quantize_from = 2
""",
    "encoder": """
[model]
stages = [
    ["fused", 1, 3, 2, 8, 8, 1], ["fused", 1, 3, 2, 8, 8, 1],
    ["fused", 1, 3, 2, 8, 16, 1], ["fused", 1, 3, 2, 16, 16, 1],
]
last_channel = 16
[encoder]
widths = [16, 8, 8]
""",
    "text": """
[model]
width = 64
heads = 1
layers = 1
[text]
joint = 16
""",
    "decoder": """
[model]
c_hidden = [8, 64]
nhead = [-1, 1]
blocks = [1, 1]
level_config = ["CT", "CTA"]
inject_effnet = [false, true]
c_cond = 16
clip_embd = 64
[noise]
weight = "v"
""",
    "token-decoder": """
[model]
c_in = 8
c_out = 8
num_labels = 16
c_hidden = [8, 64]
nhead = [-1, 1]
blocks = [1, 1]
level_config = ["CT", "CTA"]
c_cond = 16
byt5_embd = 64
[codes]
width = 0.2
[noise]
places = 200
""",
    "prior": """
[model]
c = 64
c_cond = 64
depth = 1
nhead = 1
dropout = 0.1
[noise]
stratified = true
""",
}


def write_configs(folder: Path, run: Path) -> None:
    """Writes a TOML file for each stage of the demo's recipe, for second trainings, and for v1's prior."""
    prior_v1 = TABLES["prior"].replace("[noise]", "feature_scale = 1.0\nfeature_shift = 0.0\n[noise]")
    again = {
        f"{stage}_again": re.sub(r"\[model\]\n([^[].*\n)*", "", TABLES[stage]) for stage in STAGES if stage != "encoder"
    }
    for name, tables in {**TABLES, **again, "prior_v1": prior_v1}.items():
        text = COMMON.format(run=json.dumps(str(run))) + tables
        config_path(folder, name).write_text(text, encoding="utf-8")


def config_path(folder: Path, stage: str) -> Path:
    """Returns the path of a stage's TOML file."""
    return folder / f"{stage.replace('-', '_')}.toml"


# Two processes on one machine. `accelerate launch` starts several processes for GPUs only, so --multi_gpu is set, and
# ACCELERATE_USE_CPU in the processes.
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no",
}


def launch(*command: str, by: str = "torchrun", variables: Mapping[str, str] | None = None) -> None:
    """Runs a script, or a module after "-m", in two processes on the CPU by `torchrun` or `accelerate launch`.

    `variables` are added to their environment.
    """
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-m", *LAUNCHERS[by].split()]
    environment = {**os.environ, **environment, **(variables or {})}
    done = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def input_overrides(run: Path, but: str = "") -> list[str]:
    """Returns overrides that name the networks of a run under `[inputs]`, except that of stage `but`."""
    files = {stage: run / stage / f"{stage}.safetensors" for stage in ALL if stage != but}
    return [f"inputs.{stage}='{file}'" for stage, file in files.items() if file.exists()]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def log_rows(folder: Path) -> list[tuple[Any, ...]]:
    """Returns step, loss and rate of each row of the log, which are equal in equal trainings."""
    return [(row["step"], row["loss"], row["lr"]) for row in read_log(folder)]


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(checkpoints(folder)[0], weights_only=True)


def ema_of(folder: Path) -> dict[str, Tensor]:
    return checkpoint(folder)["average"]


def assert_near_states(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Asserts that two state dicts are equal up to a largest absolute difference."""
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(other[name], x, rtol=0, atol=tolerance, msg=name)


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Asserts that two state dicts are equal bit for bit."""
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different
