"""The smallest network that can be trained, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.tiny_stages import assert_equal_states, checkpoint, ema_of, log_rows
from wuerstchen_core.training.config import LoopConfig
from wuerstchen_core.training.data.dataset import IndexedDataset, InMemoryDataset
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
    """Learns the sum of its inputs. Batch `stop` raises KeyboardInterrupt; batches `nan_at` are NaN."""

    name = part = "prior"
    tables = ()
    dataset = InMemoryDataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))  # for sample grids alone

    def __init__(
        self, width: int = 4, stop: int | None = None, nan_at: Container[int] = (), dropout: float = 0.3
    ):  # fmt: skip
        torch.manual_seed(1)
        self.net = Line(LineParams(width), dropout)
        self.stop, self.nan_at, self.width, self.losses = stop, nan_at, width, 0
        self.train_modes: list[bool] = []

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        return (rng.normal(self.width),)

    def loss(self, net: Line, *batch: Any) -> Tensor:
        self.losses += 1
        if self.losses == self.stop:
            raise KeyboardInterrupt
        self.train_modes.append(net.training)
        x = batch[0] * torch.nan if self.losses in self.nan_at else batch[0]
        return F.mse_loss(net(x), x.sum(1, keepdim=True))

    def samples(self, net: Line, validation: IndexedDataset) -> list[Tensor] | None:
        assert not net.training and not torch.is_grad_enabled()
        return [torch.tensor([1, 2, 3])[None, :, None, None].expand(1, 3, 4, 4) / 255]


class DeepLine(Line):
    """A line behind a block, whose matrix Muon can train."""

    def __init__(self, params: LineParams, dropout: float):
        super().__init__(params, dropout)
        self.blocks = nn.ModuleList([nn.Linear(params.width, params.width)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[0](x))


class DeepLineStage(LineStage):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.net = DeepLine(LineParams(), self.net.dropout)


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_training(folder: Path, whole: Path) -> None:
    assert log_rows(folder) == log_rows(whole)
    assert_equal_states(ema_of(folder), ema_of(whole))
    assert_equal_states(checkpoint(folder)["net"], checkpoint(whole)["net"])
    assert (folder / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()
    assert file_names(folder) == file_names(whole)
