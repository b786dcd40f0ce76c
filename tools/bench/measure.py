"""Measurement: the interface of both sides, timing in turns, peak memory, and a description of the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.inference.images import to_pixels

from .cases import PICTURE, Case, inputs, network_inputs
from .weights import ModelSizes, random_state

Clock = Callable[[], float]  # seconds
Callback = Callable[..., Any]  # called after each step
States = Mapping[str, dict[str, Tensor]]  # weights by part
PRODUCTS = re.compile(r"avx2|avx512_(f|bf16|fp16|vnni)$|avx_vnni|amx|sve|bf16|i8mm|dotprod")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
PROCESS, CPU = Path("/proc/self"), Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Setting:
    """The networks of one case and how they compute."""

    case: Case
    sizes: ModelSizes
    device: str
    steps: tuple[int, int]  # of a whole picture: Stage C, Stage B
    compute: torch.dtype | None = None  # default: the dtype of the case

    @property
    def dtype(self) -> torch.dtype:
        return self.compute or DTYPES[self.case.compute]

    def states(self) -> States:
        """Returns the weights of the networks, on their device."""
        dtype = self.compute or self.case.weight_dtype
        return {part: random_state(part, self.sizes, dtype, self.device) for part in self.case.benchmark.parts}


class Side:
    """One implementation, with the networks of a case. Both sides may have the same tensors as weights."""

    def __init__(self, setting: Setting, states: States):
        self.setting = setting
        self.networks: dict[str, Any] = {part: self.load(part, state) for part, state in states.items()}

    def num_bytes(self) -> int:
        """Returns the bytes of the weights."""
        return sum(x.nbytes for network in self.networks.values() for x in network.state_dict().values())

    @abstractmethod
    def load(self, part: str, state: dict[str, Tensor]) -> Any:
        """Returns a network with these weights."""

    @abstractmethod
    def compile(self) -> None: ...

    @abstractmethod
    def vqgan(self, stage: str, data: Tensor) -> Tensor:
        """Encodes or decodes."""

    @abstractmethod
    def sample(self, case: Case, data: dict[str, Tensor], steps: int, callback: Callback) -> Tensor:
        """Samples latents of Stage C if the case is the prior or a whole picture, else of Stage B."""

    @abstractmethod
    def images(self, case: Case, data: dict[str, Tensor], steps: int) -> list[Image.Image]:
        """Samples Stage B and decodes."""

    def output(self, case: Case) -> Tensor:
        """Returns the output of one call of the network; of a picture, its pixels [B, 3, H, W]."""
        if case.benchmark.steps:
            network = self.networks[case.benchmark.parts[0]]
            output: Tensor = network(*network_inputs(case, self.setting.sizes, self.setting.device, self.setting.dtype))
            return output
        data = self._inputs(case)
        if case.stage == PICTURE:
            return torch.cat([to_pixels(image) for image in self._picture(case, data)])
        return self.vqgan(case.stage, *data.values())

    def run(self, case: Case, rounds: int, after: Callback) -> None:
        """Runs the benchmark `rounds` times, and calls `after()` after each."""
        data = self._inputs(case)
        if case.benchmark.steps:
            self.sample(case, data, rounds, after)
            return
        for _ in range(rounds):
            if case.stage == PICTURE:
                self._picture(case, data)
            else:
                self.vqgan(case.stage, *data.values())
            after()

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        return inputs(case, self.setting.sizes, self.setting.device, self.setting.dtype)

    def _picture(self, case: Case, data: dict[str, Tensor]) -> list[Image.Image]:
        prior_steps, decoder_steps = self.setting.steps
        features = self.sample(case, data, prior_steps, lambda *_: None)
        return self.images(case, data | {"features": features}, decoder_steps)


def side_class(side: str, case: Case) -> Callable[[Setting, States], Any]:
    """Imports and returns the class for "ours" or "peer"."""
    if side == "peer":
        from .diffusers_baseline import DiffusersBaseline, import_packages

        import_packages()
    if case.benchmark.trains:
        from .train_step import DiffusersTrainStep, WuerstchenTrainStep

        return WuerstchenTrainStep if side == "ours" else DiffusersTrainStep
    from .wuerstchen import Wuerstchen

    return Wuerstchen if side == "ours" else DiffusersBaseline


def clock_of(device: Any) -> Clock:
    """Returns a clock that first waits for the device to finish its work."""
    kind = torch.device(device).type
    if kind == "cpu":
        return time.perf_counter

    def now() -> float:
        getattr(torch, kind).synchronize()
        return time.perf_counter()

    return now


def alternate(
    runs: Mapping[str, Callable[[Callback], Any]], turns: int, warm_up: int, clock: Clock
) -> dict[str, list[float]]:
    """Returns the seconds of each run's rounds. Runs take turns, so that a busy machine slows all of them alike.

    A run calls its argument after each round. The first `warm_up` rounds of a turn do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            ends = [clock()]
            run(lambda *_, ends=ends: ends.append(clock()))
            seconds[name] += [end - begin for begin, end in pairwise(ends)][warm_up:]
    return seconds


def memory_in_use(device: Any, peak: bool = False) -> int | None:
    """Returns bytes in use, or at their peak since `reset_peak`: allocated (CUDA), resident (Linux), or None."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    path, key = PROCESS / "status", "VmHWM:" if peak else "VmRSS:"
    lines = path.read_text("ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def reset_peak(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")


def capabilities() -> dict[str, Any]:
    """Returns the processor's instruction sets, as torch names them; {} where it does not."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def describe_machine(device: Any, threads: int) -> dict[str, Any]:
    """Returns the device, processor, its instruction sets for products, threads and package versions of a run."""
    kind = torch.device(device).type
    models = re.findall(r"model name\s*: (.+)", CPU.read_text("utf-8", errors="replace") if CPU.exists() else "")
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "processor": (models or [platform.processor()])[0],
        "instructions": [name for name, found in capabilities().items() if found and PRODUCTS.match(name)],
        "threads": threads or torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
    }
