"""The smallest thing that learns, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.tiny_stages import assert_equal_states, checkpoint, ema_of, read_log, shown
from wuerstchen_core.training.config import LoopConfig
from wuerstchen_core.training.data.dataset import InMemoryDataset
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.stage import Stage

CONFIG = LoopConfig(steps=8, batch=4, lr=0.05, warmup=2, ema=0.8, log_every=3, save_every=4, sheet_every=4)


@dataclass(frozen=True)
class LineParams:
    width: int = 4


class Line(nn.Module):
    """A linear layer behind dropout."""

    def __init__(self, params: LineParams, dropout: float = 0.3):
        super().__init__()
        self.params, self.dropout = params, dropout
        self.layer = nn.Linear(params.width, 1)
        self.register_buffer("seen", torch.zeros(params.width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.mean(0)
        return self.layer(F.dropout(x, self.dropout, self.training))


class LineStage(Stage[Line]):
    """Learns the sum of its inputs. `stop` raises KeyboardInterrupt at a step; `spoil` makes inputs that are none."""

    name, tables = "prior", ()
    dataset = InMemoryDataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))  # which it does not look at

    def __init__(
        self, width: int = 4, stop: int | None = None, spoil: Container[int] = (), dropout: float = 0.3
    ):  # fmt: skip
        torch.manual_seed(1)
        self.net = Line(LineParams(width), dropout)
        self.stop, self.spoil, self.width, self.losses = stop, spoil, width, 0
        self.trained_in_train_mode: list[bool] = []

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        return (rng.normal(self.width),)

    def loss(self, net: Line, *batch: Any) -> Tensor:
        self.losses += 1
        if self.losses == self.stop:
            raise KeyboardInterrupt
        self.trained_in_train_mode.append(net.training)
        x = batch[0] * torch.nan if self.losses in self.spoil else batch[0]
        return F.mse_loss(net(x), x.sum(1, keepdim=True))

    def sample_grid(self, net: Line) -> Image.Image | None:
        assert not net.training and not torch.is_grad_enabled()
        return Image.new("RGB", (4, 4), (1, 2, 3))

    def parts(self, net: Line) -> dict[str, nn.Module]:
        return {"prior": net}


class DeepLine(Line):
    """A line with a block before it, whose matrix Muon can train."""

    def __init__(self, params: LineParams, dropout: float):
        super().__init__(params, dropout)
        self.blocks = nn.ModuleList([nn.Linear(params.width, params.width)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[0](x))


class DeepLineStage(LineStage):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.net = DeepLine(LineParams(), self.net.dropout)

    def parts(self, net: Line) -> dict[str, nn.Module]:
        part = Line(net.params)  # a bundle's prior is one of ours: the block is left out
        part.load_state_dict(net.state_dict(), strict=False)
        return {"prior": part}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_training(folder: Path, whole: Path) -> None:
    assert shown(read_log(folder)) == shown(read_log(whole))
    assert_equal_states(ema_of(folder), ema_of(whole))
    assert_equal_states(checkpoint(folder)["net"], checkpoint(whole)["net"])
    assert (folder / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()
    assert files(folder) == files(whole)
