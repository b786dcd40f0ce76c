"""The smallest optimizer that averages its weights as schedule-free ones do (arXiv 2405.15682)."""

from __future__ import annotations

from typing import Any

import torch

BETA = 0.75


class Averaging(torch.optim.Optimizer):
    """Gradient descent of z. The weights are (1 - BETA) z + BETA x in training; `eval` makes them x, the mean of z."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "count": 0, "training": False})

    @torch.no_grad()
    def eval(self) -> None:
        self._move(1 - 1 / BETA, training=False)

    @torch.no_grad()
    def train(self) -> None:
        self._move(1 - BETA, training=True)

    def _move(self, weight: float, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if p in self.state:
                        p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["training"]
            group["count"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / BETA)
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(x.lerp_(z, 1 / group["count"]).lerp_(z, 1 - BETA))
