"""Training steps of both sides, in mixed precision: forward, backward, clipping and optimiser."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.training.optim import build_optimizers
from wuerstchen_core.training.stages.networks import load_or_create

from .cases import STAGES, Case, stored
from .diffusers_baseline import network_class
from .inputs import one_call
from .setting import Setting
from .weights import Sizes, bytes_of, weight_file

DROPOUT = 0.1  # the original's and diffusers', in training
CLIP = 1.0  # the largest norm of the gradients, of both
STATES = 4  # numbers in fp32 of each weight: itself, its gradient and two moments
KINDS: dict[str, tuple[type[nn.Module], type]] = {"prior": (Prior, PriorParams), "decoder": (Decoder, DecoderParams)}
FIRST = ("projection.weight", "embedding.1.weight")  # of the layers
MEMINFO = Path("/proc/meminfo")


class Learning:
    """A network that learns to give the noise that it was given."""

    left_out = 0.0

    def __init__(self, setting: Setting):
        self.setting = setting
        self.part = STAGES[setting.stage].parts[0]
        self.network = self.load(weight_file(setting.folder, self.part, stored(setting.stage, setting.dtype)))
        self.network.to(setting.device).train().requires_grad_(True)
        self.optimizer = self.optimizer_of(self.network)
        self.optimizer_seconds: list[float] = []

    @abstractmethod
    def load(self, path: Path) -> nn.Module:
        """The network in fp32, in memory of its own."""

    @abstractmethod
    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        """What changes its weights."""

    def output(self, case: Case) -> Tensor:
        """The gradient of the first layer, which all others have a part in; without dropout."""
        self.network.eval()
        self._backward(case)
        grad = next(p.grad for name, p in self.network.named_parameters() if name in FIRST and p.grad is not None)
        self.network.train()
        self.optimizer.zero_grad()
        return grad

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        """Do so many steps; `after` is called behind each."""
        for _ in self.rounds(case, rounds):
            after()

    def rounds(self, case: Case, rounds: int) -> Iterator[None]:
        """Do a step between two of what it yields."""
        clock = self.setting.clock
        self.optimizer_seconds.clear()
        for _ in range(rounds):
            self._backward(case)
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
            begun = clock()
            self.optimizer.step()
            self.optimizer_seconds.append(clock() - begun)
            self.optimizer.zero_grad()
            yield

    def _backward(self, case: Case) -> None:
        device = torch.device(self.setting.device)
        x, *given = one_call(case, self.setting.sizes, device, torch.float32)
        precision = self.setting.compute or DTYPES[case.dtype]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = F.mse_loss(self.network(x, *given).float(), x)
        loss.backward()


class OurLearning(Learning):
    """As our loop trains."""

    def load(self, path: Path) -> nn.Module:
        return load_or_create({"start": str(path), "model": {"dropout": DROPOUT}}, self.part, *KINDS[self.part])

    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        return build_optimizers(network, torch.device(self.setting.device))["adamw"]


class PeerLearning(Learning):
    """As diffusers' script trains, which leaves the optimiser as torch has it."""

    def load(self, path: Path) -> nn.Module:
        network: nn.Module = network_class(self.part).from_pretrained(path.parent, dropout=DROPOUT)
        for p in network.parameters():
            p.data = p.data.clone()
        return network

    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters())


def shallower(sizes: Sizes, depth: int) -> Sizes:
    """Networks of `depth` of the prior's blocks, and of as large a share of Stage B's."""
    share = depth / sizes.prior.depth
    blocks = tuple(max(1, round(count * share)) for count in sizes.decoder.blocks)
    return replace(sizes, prior=replace(sizes.prior, depth=depth), decoder=replace(sizes.decoder, blocks=blocks))


def check_room(stages: Any, sizes: Sizes, sides: int, device: str) -> None:
    """Raise ValueError if the states of a training have no room in memory: those of both sides, which take turns."""
    room = _room(torch.device(device))
    parts = {STAGES[name].parts[0] for name in stages if STAGES[name].learns}
    needed = max((sides * STATES * bytes_of(part, sizes, "fp32") for part in parts), default=0)
    if room is not None and needed > room:
        raise ValueError(
            f"weights, gradients and moments take {needed / 1e9:.1f} GB and {room / 1e9:.1f} GB of memory are free: "
            "train fewer blocks, such as --depth 4"
        )


def _room(device: torch.device) -> int | None:
    """Free bytes, where they are known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text("ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
