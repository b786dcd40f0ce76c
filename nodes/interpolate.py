"""Nodes that interpolate between two images or two prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..wuerstchen_core.checkpoints.release import with_units
from ..wuerstchen_core.diffusion.interpolate import TOKEN, slerp
from ..wuerstchen_core.models.prior import PriorParams, features_from_latents, latents_from_features
from .host.conditioning import PRIOR_KEY, VERSION_KEY
from .latents import CHANNELS, NAMES, STAGE_B, STAGE_C, TAG, check_latent, tagged
from .schema import Node, schema, title

LATENTS, PROMPTS = title("WuerstchenLatentInterpolate"), title("WuerstchenConditioningInterpolate")


def stage_of(latent: Mapping[str, Any]) -> str:
    """Returns the stage of a LATENT: its tag, else by its channels."""
    return latent.get(TAG) or (STAGE_C if latent["samples"].shape[1] == CHANNELS[STAGE_C] else STAGE_B)


def match_batches(node: str, kind: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Expands a batch of one to the other's batch size; ValueError if sizes or batch sizes differ otherwise."""
    count = max(len(first), len(second))
    if first.shape[1:] != second.shape[1:] or {len(first), len(second)} - {1, count}:
        shapes = " and ".join("x".join(map(str, x.shape)) for x in (first, second))
        raise ValueError(f"{node} got {kind} of {shapes}: connect two of one size, with equal batch sizes or 1")
    first, second = (x.expand(count, *x.shape[1:]).contiguous() for x in (first, second))
    return first, second


def interpolate_features(first: Tensor, second: Tensor, factor: float, version: str) -> Tensor:
    """Interpolates Stage C latents spherically, in the units of a release's prior; exact at 0 and 1."""
    if factor in (0, 1):
        return second if factor else first
    params = with_units(PriorParams(), version)
    start, end = (latents_from_features(x, params) for x in (first, second))
    return features_from_latents(slerp(start, end, factor), params)


def common_version(node: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Returns the release that Stage C latents name, or None; ValueError if they name two."""
    found = {options[VERSION_KEY] for options in (first, second) if VERSION_KEY in options}
    if len(found) > 1:
        raise ValueError(f"{node} got Stage C latents of Würstchen v1 and of v2: use two of one release")
    return found.pop() if found else None


def _factor_input() -> io.Float.Input:
    return io.Float.Input("factor", default=0.5, min=0.0, max=1.0, step=0.01)


class WuerstchenLatentInterpolate(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenLatentInterpolate",
            category="latent",
            search_aliases=["slerp", "blend latents", "mix pictures", "morph"],
            inputs=[io.Latent.Input("first"), io.Latent.Input("second"), _factor_input()],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, first: dict[str, Any], second: dict[str, Any], factor: float) -> io.NodeOutput:
        stage, other = stage_of(first), stage_of(second)
        if stage != other:
            raise ValueError(f"{LATENTS} got {NAMES[stage]} and {NAMES[other]} latents: connect two of one stage")
        samples = (check_latent(latent, stage, LATENTS) for latent in (first, second))
        ends = match_batches(LATENTS, f"{NAMES[stage]} latents", *samples)
        if stage != STAGE_C:
            return io.NodeOutput(tagged(slerp(*ends, factor), stage))
        version = common_version(LATENTS, first, second)
        mixed = interpolate_features(*ends, factor, version or "v2")
        return io.NodeOutput(tagged(mixed, stage, {} if version is None else {VERSION_KEY: version}))


class WuerstchenConditioningInterpolate(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenConditioningInterpolate",
            category="conditioning",
            search_aliases=["slerp", "conditioning average", "mix prompts", "blend prompts", "morph"],
            inputs=[io.Conditioning.Input("first"), io.Conditioning.Input("second"), _factor_input()],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, first: Any, second: Any, factor: float) -> io.NodeOutput:
        if factor in (0, 1):
            return io.NodeOutput(second if factor else first)
        if len(second) != 1:
            raise ValueError(f"{PROMPTS} got {len(second)} combined conditionings as second: connect a single one")
        return io.NodeOutput([_interpolate_entry(entry, second[0], factor) for entry in first])


def _interpolate_entry(first: Any, second: Any, factor: float) -> list[Any]:
    """Interpolates the text states of two conditioning entries, and their Stage C latents if both have some."""
    (states, options), (other, other_options) = first, second
    if states.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{PROMPTS} got text states {states.shape[-1]} and {other.shape[-1]} wide: connect two of one stage"
        )
    if states.shape[1] != other.shape[1]:
        raise ValueError(
            f"{PROMPTS} got prompts of {states.shape[1]} and {other.shape[1]} tokens, but needs equal lengths: each "
            "chunk of 75 tokens (about 50 words) counts 77, so shorten the longer prompt"
        )
    mixed = slerp(*match_batches(PROMPTS, "prompts", states, other), factor, TOKEN)
    priors = [x[PRIOR_KEY] for x in (options, other_options) if x.get(PRIOR_KEY) is not None]
    if not priors:
        return [mixed, options]
    if len(priors) == 1:
        raise ValueError(
            f"{PROMPTS} got Stage C latents in only one conditioning: connect Stage C to both, or after it"
        )
    version = common_version(PROMPTS, options, other_options) or "v2"
    prior = interpolate_features(*match_batches(PROMPTS, "Stage C latents", *priors), factor, version)
    return [mixed, {**options, PRIOR_KEY: prior}]
