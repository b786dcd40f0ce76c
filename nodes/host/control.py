"""ControlNets for Stage C as ComfyUI's CONTROL_NET, which its Apply ControlNet nodes put into a conditioning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.release import check_control, prior_note
from ...wuerstchen_core.common.numbers import check_finite
from ...wuerstchen_core.inference.control import hint_notes
from ...wuerstchen_core.models.control_net import (
    STEM,
    STRIDE,
    Control,
    ControlNet,
    fit_hint,
    repeat_control,
    sum_controls,
)
from .diffusion_models import CONTROL, HostPrior, castable
from .notices import notify

ROUNDING = 1e-4  # of sigmas
WITHIN_LEVEL = 12  # most values alive at once in the finest block, per channel and position


class HostControlNet(ControlNet):
    """The network from ComfyUI's layers."""

    def __init__(self, params: Any, *, device: Any = None, dtype: Any = None):
        super().__init__(params, operations=castable(comfy.ops.manual_cast), device=device, dtype=dtype)


class WuerstchenControl(comfy.controlnet.ControlBase):
    """A ControlNet with the hint, strength and times that an Apply ControlNet node sets.

    What it adds depends on the hint alone, so it is computed once per sampling and size of latents, in fp32.
    """

    def __init__(self, patcher: Any, name: str):
        super().__init__()
        self.patcher, self.name = patcher, name
        self.latents = torch.Size((0, 0, 0, 0))  # to sample
        self.controls: dict[tuple[int, int], Control] = {}  # of the sampling, by the size of the latents

    def copy(self) -> WuerstchenControl:
        copied = WuerstchenControl(self.patcher, self.name)
        self.copy_to(copied)
        return copied

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> WuerstchenControl:
        """Returns a copy whose network is for another device."""
        copied = self.copy()
        network, offload_device = copy.deepcopy(self.patcher.model), comfy.model_management.unet_offload_device()
        patcher_class = comfy.model_patcher.ModelPatcher
        copied.patcher = patcher_class(network, load_device=load_device, offload_device=offload_device)
        if autoregister:
            self.multigpu_clones[load_device] = copied
        return copied

    def set_extra_arg(self, argument: str, value: Any = None) -> None:
        """Notifies that it has no effect: other ControlNets read several kinds of hints, of which it chooses one."""
        notify(f"{self.name} reads hints of one kind ({self.patcher.model.params.hints}): {argument} has no effect")

    def get_models(self) -> list[Any]:
        return [*super().get_models(), self.patcher]

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Returns the bytes of computing what this and the previous ControlNets add, and of keeping it."""
        params, hint, latents = self.patcher.model.params, self.cond_hint_original, self.latents
        cells = 0 if hint is None else min(len(hint), latents[0]) * latents[-2] * latents[-1]
        finest = WITHIN_LEVEL * params.widths[0] * (STRIDE / STEM) ** 2
        kept = len(params.prior_blocks) * params.prior_width
        return super().inference_memory_requirements(dtype) + 4 * cells * (finest + kept)

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Prepares for a sampling. Raises ValueError if the ControlNet does not fit the model."""
        network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)  # some nodes compile it whole
        if not isinstance(network, HostPrior):
            raise ValueError(
                f"{self.name} steers Würstchen's prior (Stage C), but it is in the conditioning of "
                f"{type(model).__name__}: connect the prior of a Würstchen loader, or another ControlNet"
            )
        check_control(self.patcher.model.params, network.params, self.name)
        if note := prior_note(self.patcher.model.params, network, self.name):
            notify(note)
        self.controls = {}  # of a sampling that was cancelled
        super().pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        super().cleanup()
        self.controls = {}

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: Any
    ) -> dict[str, Control] | None:
        """Returns what is added inside the prior for latents [B, 16, h, w], which hold `batched_number` conditionings.

        It includes what the previous ControlNets add; None outside their times.
        """
        previous = self.previous_controlnet
        before = previous and previous.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.timestep_range is not None:
            start, end = self.timestep_range
            if not end * (1 - ROUNDING) <= t[0] <= start * (1 + ROUNDING):
                return before
        control = self.control(x_noisy, batched_number)
        parts: list[tuple[Control, float]] = [(before[CONTROL], 1.0)] if before else []
        return {CONTROL: sum_controls([*parts, (control, self.strength)])}

    def control(self, x: Tensor, batched_number: int) -> Control:
        """Returns what the network makes of the hints, for a batch like x; hints are repeated as ComfyUI does."""
        size, count = (x.shape[-2], x.shape[-1]), len(x) // batched_number
        if size not in self.controls:
            hint = self.cond_hint_original
            if len(hint) == 0 or hint.shape[1] not in (1, 3, 4):
                raise ValueError(
                    f"{self.name} needs a hint of at least one picture with 1, 3 or 4 channels, got {len(hint)} with "
                    f"{hint.shape[1]}: connect an IMAGE to Apply ControlNet"
                )
            hint = hint[:count, :3].expand(-1, 3, -1, -1)  # without alpha
            for note in hint_notes(self.patcher.model.params, hint, size):
                notify(f"{self.name}: {note}")
            added = self.patcher.model(fit_hint(hint, size).to(x.device), size)
            numbers = torch.arange(count) % len(hint)
            self.controls[size] = [
                y if y is None else check_finite(self.name, y)[numbers if len(hint) > 1 else slice(None)] for y in added
            ]
        return repeat_control(self.controls[size], len(x))


def controls_of(conditioning: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yields the ControlNets of conditionings, of any model, each with those that it is chained to."""
    for cond in conditioning:
        control = cond.get("control")
        while control is not None:
            yield control
            control = control.previous_controlnet


def prepare_controls(
    conditioning: Iterable[Mapping[str, Any]], sampling: Any, sigmas: Tensor, shape: torch.Size
) -> Iterator[str]:
    """Prepares our ControlNets for latents of a shape, and yields notices about those that act at none of the sigmas.

    `sampling` is the model's `model_sampling`.
    """
    for control in controls_of(conditioning):
        control.latents = shape
        start, end = control.timestep_percent_range
        highest, lowest = (sampling.percent_to_sigma(percent) for percent in (start, end))
        if not any(lowest * (1 - ROUNDING) <= sigma <= highest * (1 + ROUNDING) for sigma in sigmas[:-1].tolist()):
            yield f"{control.name} acts from {start:g} to {end:g}, in which no step is: it has no effect"


def load_control(part: Part, name: str) -> WuerstchenControl:
    """Returns a ControlNet as a CONTROL_NET, which is called `name` in messages."""
    management = comfy.model_management
    management.throw_exception_if_processing_interrupted()
    state = build_part(part).state_dict()
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    network = HostControlNet(part.params, device=offload_device, dtype=comfy.utils.weight_dtype(state))
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)
    # Too small to be loaded on demand, as newer ComfyUI versions load others.
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=load_device, offload_device=offload_device)
    return WuerstchenControl(patcher, name)
