"""The interface between the training loop and the network that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..checkpoints import save_bundle
from .data.dataset import ImageDataset, InMemoryDataset
from .rng import StepRandom

N = TypeVar("N", bound=nn.Module)


class Stage(ABC, Generic[N]):
    """A network, the batches that it is trained on, and its loss."""

    name: str  # of the command, the run's subfolder and the file of weights
    part: str  # of a bundle: `net`, or its submodule of this name if the rest is thrown away after training
    tables: tuple[str, ...]  # keys and tables of the configuration, besides those of all stages
    net: N
    dataset: ImageDataset
    frozen: Sequence[nn.Module] = ()  # networks that `batch` calls
    bases: Sequence[str | Path] = ()  # sources of the weights that training starts from; their licences are passed on
    unused_weights = False  # True if some steps give some weights no gradient
    fsdp_conflict = ""  # what needs whole weights, and so rules out FSDP

    @abstractmethod
    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        """Returns the samples of `rng`, which must be the only source of randomness: then runs resume exactly."""

    @abstractmethod
    def loss(self, net: N, *batch: Any) -> Tensor:
        """Returns the mean loss of a batch (scalar). `net` is `self.net`, perhaps wrapped by accelerate."""

    @abstractmethod
    def samples(self, net: N, validation: InMemoryDataset) -> list[Tensor] | None:
        """Returns images and what `net` (the EMA) makes of them, each [B, 3, H, W] in [0, 1]; None if it cannot yet."""

    def save(self, path: Path, net: N, metadata: Mapping[str, Any]) -> None:
        """Writes the weights of `net` (the EMA)."""
        save_bundle(path, {self.part: getattr(net, self.part, net)}, metadata)
