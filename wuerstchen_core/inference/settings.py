"""What a run of the pipeline is told: size, steps and guidance, checked before any work, and who watches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common.geometry import check_size
from ..diffusion.samplers import Progress, Seed, check_sampler
from ..diffusion.schedule import SCHEDULES, Schedule, linear_times, named_times
from ..diffusion.token_sampler import MODES

LARGEST_SEED = 2**63 - 1  # of a torch generator, on every system
TOKENS = ("temperature", "token_mode")  # what only a Stage B that paints tokens can be told


class Callback(Protocol):
    """Called with the stage ("text", "prior", "decoder" or "picture"), how many of its steps are done and what the
    picture's latents look like so far, in their public units (None outside sampling). May raise to stop."""

    def __call__(self, stage: str, done: int, steps: int, denoised: Tensor | None) -> None: ...


@dataclass(frozen=True)
class SamplingSettings:
    """One run's numbers; the defaults are those published for v2. Raises ValueError where one cannot be used."""

    width: int = 1024  # pixels
    height: int = 1024
    schedule: str = "original"  # of Stage C, a key of SCHEDULES
    prior_steps: int = 30
    prior_guidance: float = 4.0  # 1 and less: none
    decoder_steps: int = 12
    decoder_guidance: float = 1.0
    decoder_guidance_end: float | None = None  # reached in equal steps from `decoder_guidance`; None: the same
    tokens: bool = False  # whether Stage B paints them, as v1's does: else the rest is of no use
    temperature: tuple[float, float] = (1.0, 0.6)  # at the first step and the last; below 1, likelier tokens
    token_mode: str = "multinomial"  # how a token is chosen: multinomial, argmax or quantised
    sampler: str = Schedule.sampler  # of Stage C, a key of SAMPLERS

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        steps = len(self.prior_times()) - 1
        if steps != self.prior_steps:
            raise ValueError(
                f"the {self.schedule} schedule has {steps} steps, not {self.prior_steps}: "
                "leave the prior's steps out, or choose the linear schedule"
            )
        check_sampler(self.sampler)
        self.decoder_times()
        for scale in (self.prior_guidance, *self.decoder_scales()):
            if not math.isfinite(scale):
                raise ValueError(
                    f"a guidance of {scale} cannot be used: choose a number, such as {SamplingSettings.prior_guidance}"
                )
        if self.token_mode not in MODES:
            raise ValueError(f"the token mode {self.token_mode!r} is unknown: choose one of {', '.join(MODES)}")
        if (
            not isinstance(self.temperature, tuple)
            or len(self.temperature) != 2
            or not all(0 < value < math.inf for value in self.temperature)
        ):
            raise ValueError(
                f"temperatures of {self.temperature} cannot be used: "
                "give two numbers above 0, for the first step and the last"
            )

    @classmethod
    def of(cls, metadata: Mapping[str, Any], version: str = "v2") -> SamplingSettings:
        """The defaults of the model whose metadata this is, on top of its version's."""
        given, own = metadata.get("sampling", {}), V1 if version == "v1" else cls()
        known = {name: value for name, value in own.numbers().items() if name in given}
        try:
            known = {name: _like(value, given[name]) for name, value in known.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"the model's metadata holds unusable sampling defaults ({given}): {error}") from error
        return own.changed(**known)

    def changed(self, **given: Any) -> SamplingSettings:
        """These numbers with `given` in their place; None means unchanged.

        A number of prior steps alone asks for the linear schedule, a schedule alone for its own number of steps, and
        for its sampler; with the fast one the steps of Stage B change, too.
        """
        asked = {name: value for name, value in given.items() if value is not None}
        if idle := [name.replace("_", " ") for name in TOKENS if name in asked and not self.tokens]:
            raise ValueError(
                f"this model's Stage B paints no tokens, for which the {' and the '.join(idle)} would be: "
                "leave that out, or choose a model of v1"
            )
        if "prior_steps" in asked:
            asked.setdefault("schedule", "linear")
        elif "schedule" in asked:
            asked["prior_steps"] = len(named_times(asked["schedule"], self.prior_steps)) - 1
        if "schedule" in asked and asked["schedule"] != self.schedule:
            old, new = SCHEDULES[self.schedule], SCHEDULES[asked["schedule"]]
            asked.setdefault("sampler", new.sampler)
            if new.decoder_steps != old.decoder_steps and not self.tokens:
                asked.setdefault("decoder_steps", new.decoder_steps or SamplingSettings.decoder_steps)
        return replace(self, **asked)

    def numbers(self) -> dict[str, Any]:
        """Those that count in this kind of model, by name."""
        idle = ("tokens",) if self.tokens else ("tokens", *TOKENS)
        return {name: value for name, value in asdict(self).items() if name not in idle}

    def prior_times(self) -> Tensor:
        """Times of Stage C, [prior_steps + 1]."""
        return named_times(self.schedule, self.prior_steps)

    def decoder_times(self) -> Tensor:
        """Times of Stage B, [decoder_steps + 1]."""
        return linear_times(self.decoder_steps)

    def decoder_scales(self) -> list[float]:
        """Guidance of each step of Stage B."""
        end = self.decoder_guidance if self.decoder_guidance_end is None else self.decoder_guidance_end
        return [max(scale, 1.0) for scale in torch.linspace(self.decoder_guidance, end, self.decoder_steps).tolist()]

    def temperatures(self) -> list[float]:
        """Temperature of each step of v1's Stage B."""
        return torch.linspace(*self.temperature, self.decoder_steps).tolist()


# v1's published defaults: those of the notebook.
V1 = SamplingSettings(512, 512, "linear", 60, 6.0, 8, 2.0, tokens=True)


def _like(default: Any, value: Any) -> Any:
    """A value out of JSON in the type of its default."""
    if isinstance(default, tuple):
        return tuple(float(part) for part in value)
    if default is None:
        return None if value is None else float(value)
    return type(default)(value)


def check_count(count: int, seed: Seed) -> None:
    """Raise ValueError unless there is something to paint, and a seed for each picture."""
    if count < 1:
        raise ValueError(f"{count} pictures were asked for: give at least one prompt, and a count of at least 1")
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds were given for {count} pictures: give one number, or one for each")
        for one in seed:
            check_count(1, one)
    elif not 0 <= seed <= LARGEST_SEED - count:
        raise ValueError(f"seed {seed} cannot be used: choose a number from 0 to {LARGEST_SEED - count}")


def sampler_progress(callback: Callback | None, stage: str, public: Callable[[Tensor], Tensor]) -> Progress | None:
    """A sampler's callback that passes on the stage and the denoised latents in their public units."""
    if callback is None:
        return None

    def progress(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        callback(stage, step + 1, steps, public(denoised))

    return progress


def ignore(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
    """What is called when nobody watches."""
