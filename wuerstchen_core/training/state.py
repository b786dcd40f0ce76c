"""What training changes: the weights, their average and the optimizers, as accelerate wraps and shards them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .config import LoopConfig
from .ema import EMA, CurrentWeights, averages, meta_copy
from .optim import build_optimizers, group_settings, recompute_blocks, set_group
from .rates import FACTOR, set_factors
from .sharding import gather, load_optimizer, shard_like


class TrainState:
    """The network that is trained, its average, the optimizers and fp16's scaler.

    `net` is wrapped for training, `unwrapped` has its weights.
    """

    def __init__(self, net: nn.Module, config: LoopConfig, accelerator: Accelerator):
        self._accelerator, self._averaged_net = accelerator, meta_copy(net)
        factors = set_factors(net, config.lr_factors or {})
        if config.checkpointing:
            recompute_blocks(net)
        optimizers = build_optimizers(
            net, accelerator.device, config.muon_lr, config.optimizer, config.optimizer_args, factors
        )
        self.net, *prepared = accelerator.prepare(net, *optimizers.values())
        self.optimizers = dict(zip(optimizers, prepared, strict=True))
        self._settings = {name: group_settings(config, name) for name in optimizers}
        self.unwrapped = accelerator.unwrap_model(self.net, keep_torch_compile=False)
        self.ema = _average(self.unwrapped, config, optimizers.values())

    @property
    def rate(self) -> float:
        """The learning rate of the first optimizer."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def set_rates(self, fraction: float) -> None:
        """Gives the optimizers their settings, with this fraction of their learning rates."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                set_group(group, self._settings[name], fraction * self._settings[name]["lr"] * group.get(FACTOR, 1.0))

    def file_sizes(self) -> tuple[int, int]:
        """Returns the bytes of a checkpoint, at least, and those of the weights alone."""
        weights = _bytes(self.unwrapped.state_dict().values())
        moments = 0
        for name, optimizer in self.optimizers.items():
            count = 1 if name == "muon" else 2 if isinstance(optimizer.optimizer, torch.optim.AdamW) else 0
            moments += count * sum(_bytes(group["params"]) for group in optimizer.param_groups)
        return weights * (1 + isinstance(self.ema, EMA)) + moments, weights

    def averaged(self) -> tuple[dict[str, Tensor], nn.Module]:
        """Returns the averaged weights and, in the main process, the network with them. All processes call this."""
        values = gather(self.ema.values, self._accelerator.is_main_process)
        if self._accelerator.is_main_process:
            self._averaged_net.load_state_dict(values, assign=True)
            self._averaged_net.to(self._accelerator.device)
        return values, self._averaged_net

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the average for a checkpoint, in the main process. All processes call this."""
        main, scaler = self._accelerator.is_main_process, self._accelerator.scaler
        return {
            "net": gather(self.unwrapped.state_dict(), main),
            "optimizers": gather({name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}, main),
            **({"scaler": scaler.state_dict()} if scaler else {}),
        }

    def load_state_dict(self, contents: Mapping[str, Any]) -> None:
        """Loads the values of `state_dict`, and the average under "average". Raises as torch if they do not fit."""
        own = self.unwrapped.state_dict()
        self.unwrapped.load_state_dict({key: shard_like(x, own[key]) for key, x in contents["net"].items()})
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, contents["optimizers"][name])
        self.ema.load(contents["average"])
        if self._accelerator.scaler is not None and "scaler" in contents:
            self._accelerator.scaler.load_state_dict(contents["scaler"])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _average(net: nn.Module, config: LoopConfig, optimizers: Iterable[torch.optim.Optimizer]) -> EMA | CurrentWeights:
    """Returns the average of the weights that a configuration asks for. ValueError if there would be two."""
    if not config.ema:
        return CurrentWeights(net, optimizers)
    if any(averages(type(optimizer)) for optimizer in optimizers):
        raise ValueError(f"[train] optimizer {config.optimizer} averages the weights itself: set ema to 0")
    return EMA(net, config.ema)
