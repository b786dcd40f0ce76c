"""Networks that are read when they are used and released afterwards: `WuerstchenPipeline.load(low_memory=True)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoints import Part, build_part
from ..checkpoints.build import build_outline
from ..checkpoints.lora_merge import LoraStack


@dataclass
class StoredNetworks:
    """The parts of a model in their files, and the device and dtype of the networks that are built from them."""

    parts: dict[str, Part]
    device: torch.device
    dtype: torch.dtype
    in_use: dict[str, Any] = field(default_factory=dict, init=False)

    def build(self, name: str) -> Any:
        """Returns a network with its weights."""
        return build_part(self.parts[name], device=self.device, dtype=self._dtype(name))

    def outline(self, name: str) -> Any:
        """Returns a network without weights."""
        return build_outline(self.parts[name], self._dtype(name))

    def _dtype(self, name: str) -> torch.dtype:
        # The image encoder runs once, for all steps; bf16 costs Stage A only half a level of 255.
        return torch.float32 if name == "image_encoder" else self.dtype

    @contextmanager
    def using(self, name: str, loras: LoraStack) -> Iterator[Any]:
        """Yields a network with its weights and LoRAs, which is released at the end of the outermost block.

        Raises ValueError if its file has changed since it was opened.
        """
        if name in self.in_use:
            yield self.in_use[name]
            return
        network = self.in_use[name] = self.build(name)
        try:
            loras.apply(network, name)
            del network
            yield self.in_use[name]
        finally:
            del self.in_use[name]
