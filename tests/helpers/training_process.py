"""Two trainings in several processes: `torchrun training_process.py FOLDER` writes FOLDER/replicated and
FOLDER/sharded."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.recording_trainer import CONFIG, DeepLineStage
from wuerstchen_core.training.loop import train

PROCESS_CONFIG = replace(CONFIG, steps=20, muon_lr=0.02, save_every=10)


def replicated(folder: Path) -> None:
    """Trains with half of each batch in each of two processes, wrapped by accelerate."""
    train(DeepLineStage(dropout=0.0), replace(PROCESS_CONFIG, batch=2), folder)


def sharded(folder: Path) -> None:
    """Trains with sharded weights, too; stops in the middle and resumes."""

    def prepare(self: Accelerator, net: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[object, ...]:
        whole = dict(net.named_parameters())
        names = {id(p): name for name, p in whole.items()}
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        parts = dict(net.named_parameters())
        assert all(isinstance(p, DTensor) for p in parts.values())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parts[names[id(p)]] for p in group["params"]]
        return net, *(self.prepare_optimizer(optimizer) for optimizer in optimizers)

    Accelerator.prepare = prepare  # type: ignore[method-assign]
    config = replace(PROCESS_CONFIG, batch=2, muon_lr=0.0)
    try:
        train(DeepLineStage(dropout=0.0, stop=15), config, folder)
    except KeyboardInterrupt:
        train(DeepLineStage(dropout=0.0), config, folder)


if __name__ == "__main__":
    replicated(Path(sys.argv[1], "replicated"))
    sharded(Path(sys.argv[1], "sharded"))
    dist.destroy_process_group()
    os._exit(0)  # torch's threads sometimes abort a process at a normal exit
