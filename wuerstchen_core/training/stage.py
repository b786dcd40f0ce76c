"""What the loop needs to know of what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image
from torch import Tensor, nn

from ..checkpoints import save_bundle
from ..checkpoints.diffusers_layout import is_in_diffusers, save_component
from .data.dataset import ImageDataset
from .rng import StepRandom

N = TypeVar("N", bound=nn.Module)


class Stage(ABC, Generic[N]):
    """One of a model's networks, and how it learns."""

    name: str
    tables: tuple[str, ...]  # top-level configuration keys that only some stages read
    net: N  # everything that learns
    frozen: tuple[nn.Module, ...] = ()  # networks that it asks, but that don't learn
    dataset: ImageDataset  # what it learns from
    told: Mapping[str, Any] = {}  # what the weights' metadata say of where they began
    idle_weights = False  # whether there are steps in which some weights get no gradient
    undivided = ""  # what of its configuration asks for whole weights, which FSDP divides

    @abstractmethod
    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        """The samples of a step that `chance` draws for; all chance comes from it, so that a resumed run, and one of
        more processes, sees what it would have seen."""

    @abstractmethod
    def loss(self, net: N, *batch: Any) -> Tensor:
        """The loss of a batch (scalar), the mean of its samples'; `net` is `self.net`, perhaps wrapped."""

    @abstractmethod
    def sample_grid(self, net: N) -> Image.Image | None:
        """A picture of what `net` (the EMA) can do by now; None if it can't be shown yet."""

    @abstractmethod
    def parts(self, net: N) -> dict[str, nn.Module]:
        """The parts of a bundle that `net` (the EMA) holds."""

    def bases(self, config: Mapping[str, Any]) -> list[str | Path]:
        """The sources of the weights that it started from, whose licences go with what it trains."""
        return [config["start"]] if "start" in config else []

    def save(self, path: Path, net: N, metadata: Mapping[str, Any]) -> None:
        """Write `net` (the EMA) as what the training is for."""
        save_bundle(path, self.parts(net), metadata)

    def finish(self, folder: Path, net: N) -> None:
        """Write `net` (the EMA) after the last step in diffusers' layout too, if diffusers has such a network."""
        for name, part in self.parts(net).items():
            if is_in_diffusers(name, part):
                save_component(folder / "diffusers" / name, name, part, self.told)
