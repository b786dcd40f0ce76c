"""Settings of one run, checked before any computation, and the callback that reports progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..common.geometry import check_size
from ..common.numbers import plain, to_float, to_int
from ..common.text import check_choice
from ..diffusion.samplers import LARGEST_SEED, SAMPLERS, Progress, Seed, plain_seed
from ..diffusion.schedule import SCHEDULES, Schedule, decoder_times, linear_times, named_times
from ..diffusion.token_sampler import MODES

TOKEN_SETTINGS = ("temperature", "token_mode")  # of v1's Stage B only
# (stage, done, steps, denoised): the stage ("text", "prior", "decoder" or "picture"), the number of its steps that are
# done, the number that it has, and the denoised features or latents (None outside sampling). May raise to stop the run.
Callback = Callable[[str, int, int, Tensor | None], None]


class SamplingOptions(TypedDict, total=False):
    """Changes of SamplingSettings as keyword arguments. Absent or None: the model's default."""

    schedule: str | None
    sampler: str | None
    prior_steps: int | None
    prior_guidance: float | None
    decoder_steps: int | None
    decoder_guidance: float | None
    decoder_guidance_end: float | None
    decoder_reuse: int | None
    temperature: tuple[float, float] | None
    token_mode: str | None


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of one run. The defaults are those published for v2. Raises ValueError for values out of range."""

    width: int = 1024  # pixels
    height: int = 1024
    schedule: str = "original"  # the times of Stage C: a key of SCHEDULES
    prior_steps: int = 30  # of Stage C
    prior_guidance: float = 4.0  # guidance scale of Stage C; 1 or less: no guidance
    decoder_steps: int = 12  # of Stage B
    decoder_guidance: float = 1.0  # guidance scale of Stage B, at the first step
    decoder_guidance_end: float | None = None  # at the last step, reached linearly; None: as at the first
    tokens: bool = False  # True if Stage B samples tokens (v1); the next two settings apply only then
    temperature: tuple[float, float] = (1.0, 0.6)  # at the first and the last step; below 1 prefers likely tokens
    token_mode: str = "multinomial"  # how tokens are chosen: one of MODES
    sampler: str = Schedule.sampler  # of Stage C: a key of SAMPLERS
    decoder_reuse: int = 1  # one in so many steps of Stage B is full; the others reuse its deep levels. 1: all are full

    def __post_init__(self) -> None:
        for name in ("width", "height", "prior_steps", "decoder_steps", "decoder_reuse"):
            object.__setattr__(self, name, to_int(name, getattr(self, name)))
        for name in ("prior_guidance", "decoder_guidance", "decoder_guidance_end"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, to_float(name, getattr(self, name)))
        check_size(self.width, self.height)
        steps = len(self.prior_times()) - 1
        if steps != self.prior_steps:
            raise ValueError(
                f"the {self.schedule} schedule has {steps} steps, not {self.prior_steps}: "
                "remove prior_steps, or choose the linear schedule"
            )
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("token mode", self.token_mode, MODES)
        self.decoder_times()
        if self.decoder_reuse < 1:
            raise ValueError(f"decoder_reuse {self.decoder_reuse} cannot be used: give 2 or more, or 1 for no reuse")
        temperature = plain(self.temperature)
        pair = isinstance(temperature, tuple | list) and len(temperature) == 2
        if not pair or min(values := tuple(to_float("temperature", value) for value in temperature)) <= 0:
            raise ValueError(
                f"temperature {temperature} cannot be used: give two numbers above 0, for the first and last step"
            )
        object.__setattr__(self, "temperature", values)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], version: str = "v2") -> SamplingSettings:
        """Returns a model's defaults: those in its metadata, completed by those published for its version.

        Raises ValueError if the metadata has a value that cannot be used.
        """
        stored, defaults = metadata.get("sampling", {}), V1 if version == "v1" else cls()
        names = [field.name for field in fields(cls) if field.name in stored and field.name not in defaults._unused()]
        try:
            return defaults.updated(**{x: tuple(stored[x]) if x == "temperature" else stored[x] for x in names})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the model's metadata has unusable sampling defaults, {stored}: {error}") from error

    def updated(self, **changes: Any) -> SamplingSettings:
        """Returns a copy with the changes that are not None.

        `prior_steps` without `schedule` selects the linear schedule, unless the present one takes any number of steps.
        `schedule` without `prior_steps` selects the schedule's own number of steps. Another schedule than before also
        selects its own sampler and, for v2 and except with turbo, its decoder_steps, unless the changes contain them.
        Raises ValueError for values out of range.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        unused = [name for name in TOKEN_SETTINGS if name in changes]
        if unused and not self.tokens:
            raise ValueError(f"only v1 models have {' and '.join(unused)}: remove this, or load a v1 model")
        if "prior_steps" in changes:
            changes.setdefault("schedule", "linear" if SCHEDULES[self.schedule].steps else self.schedule)
        elif "schedule" in changes:
            changes["prior_steps"] = len(named_times(changes["schedule"], self.prior_steps)) - 1
        name = changes.get("schedule", self.schedule)
        if name != self.schedule and name in SCHEDULES:
            old, new = SCHEDULES[self.schedule], SCHEDULES[name]
            changes.setdefault("sampler", new.sampler)
            if new.decoder_steps != old.decoder_steps and not self.tokens and not new.distilled:
                changes.setdefault("decoder_steps", new.decoder_steps or SamplingSettings.decoder_steps)
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings by name that are not None and apply to this version."""
        return {name: x for name, x in asdict(self).items() if x is not None and name not in self._unused()}

    def _unused(self) -> tuple[str, ...]:
        """Returns the settings that metadata leave out; reuse is off unless a call asks for it, whatever the model."""
        without = ("tokens",) if self.decoder_reuse > 1 else ("tokens", "decoder_reuse")
        return without if self.tokens else (*without, *TOKEN_SETTINGS)

    def prior_times(self) -> Tensor:
        """Returns the times of Stage C, [prior_steps + 1]."""
        return named_times(self.schedule, self.prior_steps)

    def decoder_times(self) -> Tensor:
        """Returns the times of Stage B, [decoder_steps + 1]."""
        return (linear_times if self.tokens else decoder_times)(self.decoder_steps)

    def decoder_scales(self) -> list[float]:
        """Returns the guidance of each step of Stage B."""
        end = self.decoder_guidance if self.decoder_guidance_end is None else self.decoder_guidance_end
        return [max(scale, 1.0) for scale in torch.linspace(self.decoder_guidance, end, self.decoder_steps).tolist()]

    @property
    def guided(self) -> bool:
        """True if a stage has guidance, which reads the negative prompt."""
        return max(self.prior_guidance, *self.decoder_scales()) > 1

    def temperatures(self) -> list[float]:
        """Returns the temperature of each step of v1's Stage B."""
        return torch.linspace(*self.temperature, self.decoder_steps).tolist()


# The defaults published for v1, in its notebook.
V1 = SamplingSettings(512, 512, "linear", 60, 6.0, 8, 2.0, tokens=True)


def check_count(count: int, seed: Seed) -> tuple[int, Seed]:
    """Returns both as plain numbers. Raises ValueError unless count is 1 or more and each picture gets a valid seed."""
    count, seed = to_int("count", count), plain_seed(seed)
    if count < 1:
        raise ValueError(f"{count} pictures cannot be generated: give at least one prompt, and a count of 1 or more")
    if isinstance(seed, Sequence) and len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} pictures: give one seed, or one for each picture")
    seeds, largest = (seed, LARGEST_SEED - 1) if isinstance(seed, Sequence) else ([seed], LARGEST_SEED - count)
    for number in seeds:
        if not 0 <= number <= largest:
            raise ValueError(f"seed {number} cannot be used: choose a number from 0 to {largest}")
    return count, seed


def notify(callback: Callback | None, stage: str) -> None:
    """Reports that a stage is done, as one step."""
    if callback is not None:
        callback(stage, 1, 1, None)


def sampler_progress(callback: Callback | None, stage: str, public: Callable[[Tensor], Tensor]) -> Progress | None:
    """Returns a callback for a sampler: it reports the steps of `stage`, with `public` applied to the denoised x."""
    if callback is None:
        return None

    def progress(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        callback(stage, step + 1, steps, public(denoised))

    return progress
