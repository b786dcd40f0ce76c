"""ControlNets in `generate`: pictures that hint at the shapes and places of things."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checkpoints.build import load_control_net
from ..checkpoints.release import check_control
from ..common.geometry import prior_side
from ..common.numbers import to_float
from ..common.values import to_list
from ..models.control_net import Control, ControlNet, ControlNetParams, crop_hint, repeat_control, sum_controls
from .components import Components, first_weight
from .images import Picture, open_grey, open_picture, to_pixels
from .settings import SamplingSettings
from .sources import AnyPath

logger = logging.getLogger(__name__)

IN_MEMORY = "a ControlNet in memory"  # instead of a file's name
_ROUNDING = 1e-6  # of times


@dataclass(frozen=True)
class Hint:
    """A ControlNet (or its file), the picture that it reads, and how strongly, when and where it acts.

    The picture may also be pixels [B, 3, H, W] in [0, 1], one for each image to generate or one for all. `start` and
    `end` are fractions of Stage C's sampling, from 0 to 1. A `mask`, in grey, multiplies the strength: the
    hint does not act where it is black.
    """

    net: ControlNet | AnyPath
    picture: Picture | Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Picture | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.net, ControlNet | str | PathLike):
            raise ValueError(
                f"{self.net!r:.60} is not a ControlNet: give the file of one, or what load_control_net returns"
            )
        for name in ("strength", "start", "end"):
            object.__setattr__(self, name, to_float(f"a hint's {name}:", getattr(self, name)))
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"a hint cannot act from {self.start:g} to {self.end:g} of the sampling: give a start below its end, "
                "both from 0 to 1"
            )


AnyHint: TypeAlias = Hint | tuple[ControlNet | AnyPath, Picture] | tuple[ControlNet | AnyPath, Picture, float]


def list_hints(control: AnyHint | Sequence[AnyHint] | None) -> list[Hint]:
    """Returns hints of `generate`'s argument: one or several, each a Hint or (net, picture[, strength])."""
    if control is None:
        return []
    if isinstance(control, tuple) and control and isinstance(control[0], ControlNet | str | PathLike):
        control = [control]
    hints = []
    for one in to_list("control", control, Hint):
        if not isinstance(one, Hint) and not (isinstance(one, tuple | list) and len(one) in (2, 3)):
            raise ValueError(f"control {one!r:.60} cannot be used: give (net, picture, strength), or a list of these")
        hints.append(one if isinstance(one, Hint) else Hint(*one))
    return hints


def load_hints(
    model: Components, control: AnyHint | Sequence[AnyHint] | None, sampling: SamplingSettings
) -> list[Hint]:
    """Returns hints with their nets and pictures in memory. Raises ValueError for those that cannot be used.

    The nets are in fp32, since they are called once only. Logs a warning about pictures of another shape than the one
    to generate, which are cropped, and about those that look inverted.
    """
    loaded: dict[Any, ControlNet] = {}
    hints = []
    for hint in list_hints(control):
        net = hint.net
        if not isinstance(net, ControlNet):
            if net not in loaded:
                loaded[net] = load_control_net(net, device=model.device, dtype=torch.float32)
            net = loaded[net]
        name = IN_MEMORY if net is hint.net else str(hint.net)
        check_control(net.params, model.require("prior").params, name)
        picture = hint.picture if isinstance(hint.picture, Tensor) else to_pixels(open_picture(hint.picture))
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(f"a hint's pixels must be [B, 3, H, W], got {list(picture.shape)}: give a picture")
        mask = None if hint.mask is None else open_grey(hint.mask)
        for note in hint_notes(net.params, picture, _latent_size(sampling)):
            if note not in model.reported_hints:
                model.reported_hints.add(note)
                logger.warning(note)
        hints.append(replace(hint, net=net, picture=picture, mask=mask))
    return hints


def control_at(
    model: Components, hints: Sequence[Hint], sampling: SamplingSettings, count: int
) -> Callable[[Tensor], Control] | None:
    """Returns a function that maps times t [B] of a sampling, all equal, to what is added in a batch of B.

    `hints` are those of `load_hints`; None without any. Raises ValueError if one has neither one picture nor `count`.
    """
    size, parts = _latent_size(sampling), []
    for hint in hints:
        assert isinstance(hint.net, ControlNet) and isinstance(hint.picture, Tensor)
        if len(hint.picture) not in (1, count):
            raise ValueError(f"a hint has {len(hint.picture)} pictures for {count} images: give one, or one for each")
        weight = first_weight(hint.net)
        control = hint.net(crop_hint(hint.picture, size).to(weight), size)
        strength: float | Tensor = hint.strength
        if isinstance(hint.mask, Image.Image):
            mask = crop_hint(to_pixels(hint.mask), size)
            strength = hint.strength * F.interpolate(mask, size=size, mode="bilinear", antialias=True)
        parts.append(([x if x is None else x.to(model.device) for x in control], strength))
    sums: dict[tuple[int, ...], Control] = {}

    def at(t: Tensor) -> Control:
        done = 1 - float(t[0])
        active = tuple(i for i, x in enumerate(hints) if x.start - _ROUNDING <= done <= x.end + _ROUNDING)
        if active not in sums:
            sums[active] = sum_controls(parts[i] for i in active)
        return repeat_control(sums[active], len(t))

    return at if hints else None


def hint_notes(params: ControlNetParams, hint: Tensor, size: tuple[int, int]) -> list[str]:
    """Returns sentences about a hint [B, 3, H, W] that the user may not expect, for latents of a size (h, w)."""
    height, width = hint.shape[-2:]
    cropped = crop_hint(hint, size)
    notes = []
    if cropped.shape != hint.shape:
        kept = f"{cropped.shape[-1]}x{cropped.shape[-2]}"
        notes.append(f"the hint of {width}x{height} pixels has another shape than the image, so {kept} of it are used")
    if params.hints == "outline" and float(hint.mean()) > 0.5:
        notes.append("the hint is mostly white, but this ControlNet reads white lines on black: invert it")
    return notes


def _latent_size(sampling: SamplingSettings) -> tuple[int, int]:
    return prior_side(sampling.height), prior_side(sampling.width)
