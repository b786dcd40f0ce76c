"""ControlNets in `generate` and in edits: pictures that hint at the shapes and positions of things."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.build import load_control_net
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.release import check_control, prior_note
from ..common.geometry import prior_side
from ..common.numbers import check_finite, to_float
from ..common.values import to_list
from ..diffusion.schedule import strength_times
from ..models.control_net import (
    Control,
    ControlNet,
    ControlNetParams,
    crop_hint,
    repeat_control,
    scale_hint,
    sum_controls,
)
from ..models.prior import Prior
from .components import Components, first_weight
from .images import Picture, open_grey, open_picture, to_pixels
from .settings import SamplingSettings
from .sources import AnyPath

logger = logging.getLogger(__name__)

IN_MEMORY = "a ControlNet in memory"  # instead of a file's name
_ROUNDING = 1e-6  # of times and pixels


@dataclass(frozen=True, eq=False)  # tensors and arrays do not compare as a whole
class Hint:
    """A ControlNet (or its file), the picture that it reads, and how strongly, when and where it acts.

    The picture may also be pixels [B, 3, H, W] in [0, 1], one for each image to generate or one for all. `start` and
    `end` are 1 - t at the times t of Stage C's steps, as ComfyUI's start and end percent: fractions of the steps with
    the schedule linear, while fast takes two of its six steps up to 0.5. A `mask`, in grey, multiplies the strength:
    the hint does not act where it is black. Files are read once, when they are first used.
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

    @property
    def name(self) -> str:
        """The ControlNet's name in messages."""
        return IN_MEMORY if isinstance(self.net, ControlNet) else str(self.net)

    @cached_property
    def weights(self) -> str | None:
        """The fingerprint of the ControlNet's file; None without a file."""
        return None if isinstance(self.net, ControlNet) else fingerprint(self.net)

    @cached_property
    def network(self) -> ControlNet:
        """The ControlNet. That of a file is in fp32, since a call is needed only once for all steps."""
        return self.net if isinstance(self.net, ControlNet) else load_control_net(self.net, dtype=torch.float32)

    @cached_property
    def pixels(self) -> Tensor:
        """The picture as floats [B, 3, H, W] in [0, 1]. Raises ValueError for pixels that are not."""
        if not isinstance(self.picture, Tensor):
            return to_pixels(open_picture(self.picture))
        pixels, found = self.picture, f"{list(self.picture.shape)} of {str(self.picture.dtype).removeprefix('torch.')}"
        fits = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.numel() > 0 and pixels.is_floating_point()
        if fits:
            low, high = map(float, pixels.aminmax())
            fits, found = -_ROUNDING <= low and high <= 1 + _ROUNDING, f"{found} from {low:g} to {high:g}"
        if not fits:
            raise ValueError(f"a hint's pixels must be floats [B, 3, H, W] from 0 to 1, got {found}: give a picture")
        return pixels

    @cached_property
    def mask_pixels(self) -> Tensor | None:
        """The mask as [1, 1, H, W] in [0, 1]; None without one."""
        return None if self.mask is None else to_pixels(open_grey(self.mask))

    def read(self) -> Hint:
        """Reads the files now, and returns the hint."""
        _ = self.network, self.pixels, self.mask_pixels
        return self


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
    model: Components,
    control: AnyHint | Sequence[AnyHint] | LoadedHints | None,
    sampling: SamplingSettings,
    count: int,
    *,
    strength: float = 1.0,
    area: tuple[int, int] | None = None,
) -> LoadedHints:
    """Returns the hints for `count` images. Raises ValueError for those that cannot be used.

    `strength` is that of image to image; `area` is the part (height, width) of the image that the hints show, from its
    top left corner, by default all of it. Logs a warning about pictures and masks of another shape than the area, which
    are cropped, about those that look inverted, and about hints that act at none of the steps.
    """
    if isinstance(control, LoadedHints):
        return control
    hints = LoadedHints(model, [hint.read() for hint in list_hints(control)], sampling, area)
    times = strength_times(sampling.prior_times(), strength)
    if hints and strength == 0:
        raise ValueError("strength 0 keeps the picture, so a hint cannot act: remove control, or raise the strength")
    for hint in hints:
        params, found = hint.network.params, len(hint.pixels)
        check_control(params, model.require("prior").params, hint.name)
        if found not in (1, count):
            images = "1 image" if count == 1 else f"{count} images"
            raise ValueError(f"a hint has {found} pictures for {images}: give one, or one for each image")
        notes = hint_notes(params, hint.pixels, hints.shape)
        if hint.mask_pixels is not None:
            notes += _shape_notes("mask of a hint", hint.mask_pixels, hints.shape)
        if not any(_acts(hint, float(t)) for t in times[:-1]):
            notes.append(
                f"the hint for {hint.name} acts from {hint.start:g} to {hint.end:g}, in which no step of this schedule "
                "and strength is: it has no effect"
            )
        _warn(model, notes)
    return hints


class LoadedHints:
    """The hints for the images of a call, and what their ControlNets add to Stage C, which is computed once."""

    def __init__(
        self,
        model: Components,
        hints: Sequence[Hint],
        sampling: SamplingSettings,
        area: tuple[int, int] | None = None,
    ):
        self._model, self._hints = model, hints
        self._sums: dict[tuple[int, ...], Control] = {}  # by the numbers of the hints that act
        self._canvas = sampling.height, sampling.width
        self._size = prior_side(sampling.height), prior_side(sampling.width)  # of the latents
        self._area = None if area == self._canvas else area

    def __iter__(self) -> Iterator[Hint]:
        return iter(self._hints)

    def __len__(self) -> int:
        return len(self._hints)

    @property
    def shape(self) -> tuple[int, int]:
        """The height and width, in any unit, of the part of the image that hints show."""
        return self._area or self._size

    def of_images(self, first: int, count: int) -> LoadedHints:
        """Returns those for `count` of the images, from number `first` on."""
        found = copy(self)
        found._sums, found._parts = (
            {},
            [
                ([x if x is None or len(x) == 1 else x[first : first + count] for x in control], strength)
                for control, strength in self._parts
            ],
        )
        return found

    @cached_property
    def _parts(self) -> list[tuple[Control, float | Tensor]]:
        """What each ControlNet adds for all images, and its strength: a number, or a mask [1, 1, h, w]."""
        parts: list[tuple[Control, float | Tensor]] = []
        for hint in self:
            network = hint.network if isinstance(hint.net, ControlNet) else hint.network.to(self._model.device)
            view = scale_hint(self._placed(hint.pixels), self._size)
            control = network(view.to(first_weight(network)), self._size)
            control = [None if x is None else check_finite(hint.name, x).to(self._model.device) for x in control]
            strength: float | Tensor = hint.strength
            if hint.mask_pixels is not None:
                mask = self._placed(hint.mask_pixels)
                strength = hint.strength * F.interpolate(mask, self._size, mode="bilinear", antialias=True)
            parts.append((control, strength))
        return parts

    def _placed(self, pixels: Tensor) -> Tensor:
        """Returns pixels [B, c, H, W] that show the area, in the shape of the latents: black outside of the area."""
        if self._area is None:
            return crop_hint(pixels, self._size)
        (height, width), canvas = self._area, self._canvas
        pixels = F.interpolate(crop_hint(pixels, self._area).float(), self._area, mode="bilinear", antialias=True)
        return F.pad(pixels, (0, canvas[1] - width, 0, canvas[0] - height))

    def check_prior(self, prior: Prior) -> None:
        """Logs a warning about each ControlNet that was trained on another prior."""
        for hint in self:
            if note := prior_note(hint.network.params, prior, hint.name):
                _warn(self._model, [note])

    def __call__(self, t: Tensor) -> Control:
        """Returns what is added in a batch at times t [B] of the sampling, all equal."""
        active = tuple(i for i, hint in enumerate(self) if _acts(hint, float(t[0])))
        if active not in self._sums:
            self._sums[active] = sum_controls(self._parts[i] for i in active)
        return repeat_control(self._sums[active], len(t))


def _acts(hint: Hint, t: float) -> bool:
    """True if a hint acts at a time."""
    return hint.start - _ROUNDING <= 1 - t <= hint.end + _ROUNDING


def _warn(model: Components, notes: Sequence[str]) -> None:
    """Logs warnings, each only the first time."""
    for note in notes:
        if note not in model.reported_hints:
            model.reported_hints.add(note)
            logger.warning(note)


def hint_notes(params: ControlNetParams, hint: Tensor, shape: tuple[int, int]) -> list[str]:
    """Returns sentences about a hint [B, 3, H, W] that the user may not expect, for an image of a shape (h, w)."""
    notes = _shape_notes("hint", hint, shape)
    if params.hints == "outline" and float(hint.mean()) > 0.5:
        notes.append("the hint is mostly white, but this ControlNet reads white lines on black: invert it")
    return notes


def _shape_notes(name: str, pixels: Tensor, shape: tuple[int, int]) -> list[str]:
    """Returns a sentence about pixels [B, c, H, W] that are cropped for an image of a shape (h, w), if they are."""
    if (cropped := crop_hint(pixels, shape)).shape == pixels.shape:
        return []
    found, kept = (f"{x.shape[-1]}x{x.shape[-2]}" for x in (pixels, cropped))
    return [f"the {name} of {found} pixels has another shape than the image, so {kept} of it are used"]
