"""The settings of accelerate and of launchers: processes and precision."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType

from ..common.text import one_line
from .config import LoopConfig
from .stage import Stage

log = logging.getLogger(__name__)

PRECISION, WORLD, RANK = "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK"  # environment variables


def is_main_process() -> bool:
    """True in the first process of a launcher, and without one. For use before there is an Accelerator."""
    return int(os.environ.get(RANK, "0")) == 0


def accelerate_precision() -> str:
    """Returns the mixed precision of `accelerate launch`, or else of the file that `accelerate config` wrote.

    "" if there is neither. The file's setting to use the CPU applies too. ValueError if the file cannot be read.
    """
    if precision := os.environ.get(PRECISION, ""):
        return precision
    if not Path(default_config_file).is_file():
        return ""
    try:
        settings: Any = load_config_from_file(None)
    except Exception as error:
        message = f"{default_config_file} cannot be read: {one_line(error)}; run `accelerate config` again"
        raise ValueError(message) from error
    if settings.use_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    count = getattr(settings, "num_processes", 1)  # settings of SageMaker have none
    if WORLD not in os.environ and count > 1:
        log.info("accelerate is configured for %d processes: start with `accelerate launch` to use them", count)
    return str(settings.mixed_precision or "")


def choose_precision(configured: str) -> str:
    """Returns the precision of `[train]` if it has one, else accelerate's. Logs if it overrides the latter."""
    theirs = accelerate_precision()
    if configured and theirs and configured != theirs:
        log.info("[train] precision %s overrides accelerate's, which is %s", configured, theirs)
    return configured or theirs or "no"


def check_processes(accelerator: Accelerator) -> None:
    """Raises ValueError if a launcher started several processes that accelerate does not join."""
    started = int(os.environ.get(WORLD, "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate finds {accelerator.num_processes} in their group: "
            "without a GPU for each, set the environment variable ACCELERATE_USE_CPU=true, or start one process"
        )


def configure(accelerator: Accelerator, config: LoopConfig, stage: Stage[Any]) -> None:
    """Sets up FSDP. Raises ValueError for settings of accelerate that the loop does not support."""
    if accelerator.scaler is not None and config.muon_lr:
        raise ValueError("[train] muon_lr does not work with fp16, whose gradients are scaled: set precision to bf16")
    if config.frozen != LoopConfig.frozen:
        if not stage.has_large_frozen:
            raise ValueError(
                f"[train] frozen has no effect on {stage.name}, whose frozen networks are small: remove it"
            )
        if config.frozen != "int8" and accelerator.mixed_precision == "no":
            raise ValueError(f'[train] frozen = "{config.frozen}" needs mixed precision: set precision to bf16 or fp16')
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 is not supported: set fsdp_version to 2 in accelerate's configuration")
        if stage.fsdp_conflict:
            raise ValueError(f"{stage.fsdp_conflict} cannot be trained by FSDP, which shards weights: use DDP")
    available = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing := [name for name in config.trackers if name not in available]:
        raise ValueError(f"[train] trackers: {', '.join(missing)} cannot be imported: install or remove it")
    if (batches := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(f"accelerate accumulates {batches} batches: configure 1 there and [train] accumulate instead")
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        # accelerate's default rebuilds a network from its state dict alone, and loses the base weights of a LoRA.
        plugin.cpu_ram_efficient_loading = False
