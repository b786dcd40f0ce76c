"""Training steps of both sides in mixed precision: forward, backward, gradient clipping, optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_core.checkpoints import Part, build_part
from wuerstchen_core.training.optim import build_optimizers

from .cases import Case, network_inputs
from .diffusers_baseline import build_network
from .measure import Callback, Setting, Side, States
from .weights import ModelSizes

DROPOUT = 0.1  # the original's and diffusers'
MAX_GRAD_NORM = 1.0
FIRST_LAYERS = ("projection.weight", "embedding.1.weight")


class WuerstchenTrainStep(Side):
    """A network that learns to predict noise, as in our training loop."""

    optimizer: torch.optim.Optimizer

    def __init__(self, setting: Setting, states: States):
        copies = {part: {key: x.clone() for key, x in state.items()} for part, state in states.items()}
        super().__init__(setting, copies)
        [network] = self.networks.values()
        self.network: nn.Module = network.to(setting.device).train().requires_grad_(True)
        self.optimizer = self.build_optimizer()

    def load(self, part: str, state: dict[str, Tensor]) -> Any:
        return build_part(Part(part, replace(self.setting.sizes.of(part), dropout=DROPOUT), state))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizers(self.network, torch.device(self.setting.device))["adamw"]

    def output(self, case: Case) -> Tensor:
        """Returns the gradient of the first layer, which depends on all others; without dropout."""
        self.network.eval()
        self._backward(case)
        grad = next(p.grad for name, p in self.network.named_parameters() if name in FIRST_LAYERS)
        assert grad is not None
        self.network.train()
        self.optimizer.zero_grad()
        return grad

    def run(self, case: Case, rounds: int, after: Callback) -> None:
        for _ in range(rounds):
            self._backward(case)
            nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            after()

    def _backward(self, case: Case) -> None:
        device, dtype = torch.device(self.setting.device), self.setting.dtype
        x, *cond = network_inputs(case, self.setting.sizes, device, torch.float32)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.mse_loss(self.network(x, *cond).float(), x)
        loss.backward()


class DiffusersTrainStep(WuerstchenTrainStep):
    """The same with diffusers' network, and the optimizer of its training script: AdamW with torch's defaults."""

    def load(self, part: str, state: dict[str, Tensor]) -> Any:
        return build_network(part, self.setting.sizes, state, dropout=DROPOUT)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters())


def shallower(sizes: ModelSizes, depth: int) -> ModelSizes:
    """Returns sizes with `depth` blocks of the prior, and the same fraction of Stage B's blocks."""
    fraction = depth / sizes.prior.depth
    blocks = tuple(max(1, round(count * fraction)) for count in sizes.decoder.blocks)
    return replace(sizes, prior=replace(sizes.prior, depth=depth), decoder=replace(sizes.decoder, blocks=blocks))
