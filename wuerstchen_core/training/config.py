"""Training configurations: a TOML file for each stage."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..common.dataclass_config import Count, CountOrZero, Fraction, NotNegative, OneOf, Positive, Range, option
from ..common.files import read_text_file
from ..common.text import decode_text, nearest, parse_bounded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_SEED = 2**32 - 1  # the loop derives a seed below 2**64 from it for each batch
FROZEN = ("fp32", "bf16", "fp16", "int8")
ADAMW = "torch.optim.AdamW"
FALLS: dict[str, Callable[[float], float]] = {  # the rate's factor, by the remaining fraction of its fall
    "constant": lambda remaining: 1.0,
    "linear": lambda remaining: remaining,
    "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,  # arXiv 1608.03983
}
Beta = Annotated[float, Range(least=0, below=1)]
COMMON = ("run", "inputs", "data", "validation", "cache", "train", "modelspec", "hub")  # keys and tables of every stage
RUN = option(meaning="folder of the model; each stage has a subfolder there")
START = option("", "initial weights, in any format that `inspect` reads; default: train from scratch")
INPUTS = {  # the keys of [inputs]: stages, and the part of a bundle that each trains
    "vqgan": "vqgan",
    "encoder": "image_encoder",
    "text": "prior_text_encoder",
    "decoder": "decoder",
    "token-decoder": "token_decoder",
    "prior": "prior",
}


@dataclass(frozen=True)
class LoopConfig:
    """The `[train]` table."""

    steps: Count = option(meaning="optimizer steps")
    batch: Count = option(meaning="samples in one forward pass of a process")
    lr: Positive = option(meaning="learning rate of the optimizer, the largest of its course")
    accumulate: Count = option(1, "forward passes of a process per step")
    checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    optimizer: str = option(ADAMW, "import path of a torch optimizer, such as bitsandbytes.optim.AdamW8bit")
    optimizer_args: dict[str, Any] | None = option(None, "table of its arguments, such as {d_coef = 2.0}")
    muon_lr: NotNegative = option(
        0.0, "above 0, Muon trains the matrices of the blocks at this rate, and the optimizer the rest"
    )
    warmup: CountOrZero = option(100, "steps of linear warmup")
    lr_schedule: Annotated[str, OneOf(tuple(FALLS))] = option(
        "linear", "fall of the rate to zero at the end: linear, cosine, or constant for none"
    )
    decay: Fraction = option(0.3, "fraction of the steps, at the end, over which the rate falls; 1: all of them")
    lr_cycles: Count = option(1, "number of falls in that time, each from the full rate (arXiv 1608.03983)")
    lr_least: Fraction = option(0.0, "rate at the end of a fall, as a fraction of lr")
    lr_factors: dict[str, NotNegative] | None = option(
        None,
        "factors of the rate of weights with a pattern in their names: {lora_B = 16.0, text_encoder = 0.1}; 0 freezes",
    )
    betas: tuple[Beta, Beta] = option((0.9, 0.999), "decay rates of AdamW's moments; others have optimizer_args")
    weight_decay: NotNegative = option(0.01, "weight decay of the optimizer, if it has one, and of Muon")
    clip: Positive = option(1.0, "largest gradient norm")
    ema: Fraction = option(0.995, "decay of the average of the weights per step; 0: no average, which saves its memory")
    precision: Annotated[str, OneOf(("", "no", "bf16", "fp16"))] = option(
        "", "mixed precision: no, bf16 or fp16; empty: accelerate's setting"
    )
    frozen: Annotated[str, OneOf(FROZEN)] = option(
        "fp32", "stored precision of large frozen networks, to save memory: fp32, bf16, fp16 or int8"
    )
    seed: Annotated[int, Range(least=0, most=LARGEST_SEED)] = option(0, "seed of all random numbers")
    bad_share: Fraction = option(0.05, "fraction of steps that may be skipped because their loss is not finite")
    keep: Count = option(2, "number of checkpoints to keep")
    keep_every: CountOrZero = option(
        0, "steps from one file of weights that is kept, such as lora-000500.safetensors, to the next; 0: none"
    )
    trackers: tuple[str, ...] = option((), "accelerate's names of them, such as tensorboard and wandb")
    log_every: Count = option(20, "steps from one row of the log to the next")
    save_every: Count = option(250, "steps from one checkpoint to the next")
    sheet_every: Count = option(500, "steps from one sample grid to the next")

    def __post_init__(self) -> None:
        if (self.lr_schedule == "constant" or not self.decay) and (self.lr_cycles > 1 or self.lr_least):
            raise ValueError(
                "[train] lr_cycles and lr_least have no effect on a constant rate: remove them, or set decay and "
                "another lr_schedule"
            )


def check_tables(config: Mapping[str, Any], of_stage: Collection[str]) -> None:
    """Raises ValueError for unknown and mistyped tables, a missing run folder and a missing network.

    `of_stage` are the stage's own keys and tables; if "model" is one of them, `[model]` or `start` is required.
    """
    known = (*COMMON, *of_stage)
    if unknown := sorted(set(config) - set(known)):
        names = ", ".join(f"{name}{nearest(name, known)}" for name in unknown)
        raise ValueError(f"unknown keys or tables {names}: this stage takes {', '.join(known)}")
    for name, value in config.items():
        kind, expected = (str, "a string") if name in ("run", "start") else (Mapping, "a table of keys")
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    for name, source in config.get("inputs", {}).items():
        if name not in INPUTS or not isinstance(source, str):
            raise ValueError(f"[inputs] takes a file or folder for {', '.join(INPUTS)}; got {name} = {source!r}")
    if "run" not in config:
        raise ValueError('the run folder is missing: add run = "runs/mine" at the top of the configuration')
    if "model" in of_stage and "model" not in config and "start" not in config:
        raise ValueError(
            "the network is missing: add a [model] table with its sizes, or, at the top of the configuration, the "
            'weights to start from, such as start = "demo"'
        )


def read_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Reads a TOML file and applies overrides `table.key=value`, where a value that is not TOML is a string."""
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path} is not a file: give the TOML file of a configuration")
    data = read_text_file(path)
    try:
        config = parse_bounded(tomllib.loads, decode_text(data, "it"))
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override!r} must have the form table.key=value")
        try:
            value = parse_bounded(tomllib.loads, f"value = {text}")["value"]
        except ValueError:
            value = text
        *tables, name = key.split(".")
        table = config
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set {override!r} is not possible: {part} is not a table")
        table[name] = value
    return config
