"""Nodes on the way from one picture or prompt to another."""

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
from .schema import schema

LATENTS, PROMPTS = "Würstchen Latent Interpolate", "Würstchen Conditioning Interpolate"


def stage_of(latent: Mapping[str, Any]) -> str:
    """The stage that a LATENT says it belongs to, or that its channels tell."""
    return latent.get(TAG) or (STAGE_C if latent["samples"].shape[1] == CHANNELS[STAGE_C] else STAGE_B)


def paired(node: str, things: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of one shape; a batch of one goes with every other. Raises ValueError where they do not fit."""
    count = max(len(first), len(second))
    if first.shape[1:] != second.shape[1:] or {len(first), len(second)} - {1, count}:
        given = " and ".join("x".join(map(str, x.shape)) for x in (first, second))
        raise ValueError(f"{node} was given {things} of {given}: give two of one size, and of one batch size or 1")
    first, second = (x.expand(count, *x.shape[1:]).contiguous() for x in (first, second))
    return first, second


def between_features(first: Tensor, second: Tensor, factor: float, version: str) -> Tensor:
    """Stage C latents between two, turned in the units that a release's prior works in; the ends exactly."""
    if factor in (0, 1):
        return second if factor else first
    params = with_units(PriorParams(), version)
    start, end = (latents_from_features(x, params) for x in (first, second))
    return features_from_latents(slerp(start, end, factor), params)


def common_version(node: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """The release that Stage C latents say they are of, if any does; ValueError where they are of two."""
    found = {given[VERSION_KEY] for given in (first, second) if VERSION_KEY in given}
    if len(found) > 1:
        raise ValueError(f"{node} was given Stage C latents of Würstchen v1 and of v2: take both from one release")
    return found.pop() if found else None


def _factor_input() -> io.Float.Input:
    return io.Float.Input(
        "factor",
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How far from the first, at 0, to the second, at 1. At both ends nothing is changed.",
    )


class WuerstchenLatentInterpolate(io.ComfyNode):
    """Between two pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenLatentInterpolate",
            display_name=LATENTS,
            category="Würstchen/latent",
            description="Mixes two latents of one stage and size, turning from one to the other (spherically).",
            search_aliases=["slerp", "blend latents", "mix pictures", "morph"],
            inputs=[
                io.Latent.Input(
                    "first",
                    tooltip="Latents of Stage C, or of Stage B. Stage C's from other nodes than ours do not say whose "
                    "they are: they are taken for v2's.",
                ),
                io.Latent.Input("second", tooltip="Latents of the same stage and size."),
                _factor_input(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="Latents of the same stage and size.")],
        )

    @classmethod
    def execute(cls, first: dict[str, Any], second: dict[str, Any], factor: float) -> io.NodeOutput:
        stage, other = stage_of(first), stage_of(second)
        if stage != other:
            raise ValueError(
                f"{LATENTS} was given {NAMES[stage]} latents and {NAMES[other]} latents: connect two of one stage"
            )
        ends = paired(LATENTS, f"{NAMES[stage]} latents", *(check_latent(x, stage, LATENTS) for x in (first, second)))
        if stage != STAGE_C:
            return io.NodeOutput(tagged(slerp(*ends, factor), stage))
        version = common_version(LATENTS, first, second)
        mixed = between_features(*ends, factor, version or "v2")
        return io.NodeOutput(tagged(mixed, stage, {} if version is None else {VERSION_KEY: version}))


class WuerstchenConditioningInterpolate(io.ComfyNode):
    """Between two prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenConditioningInterpolate",
            display_name=PROMPTS,
            category="Würstchen/conditioning",
            description="Mixes two prompts, turning each token from one to the other (spherically).",
            search_aliases=["slerp", "conditioning average", "mix prompts", "blend prompts", "morph"],
            inputs=[
                io.Conditioning.Input("first", tooltip="A conditioning; its masks, areas and step ranges are kept."),
                io.Conditioning.Input("second", tooltip="A conditioning of the same stage, and as long a text."),
                _factor_input(),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="conditioning", tooltip="Between the two prompts.")
            ],
        )

    @classmethod
    def execute(cls, first: Any, second: Any, factor: float) -> io.NodeOutput:
        if factor in (0, 1):
            return io.NodeOutput(second if factor else first)
        if len(second) != 1:
            raise ValueError(f"{PROMPTS} was given {len(second)} conditionings as the second: interpolate each alone")
        [[states, options]] = second
        return io.NodeOutput([_between(one, own, states, options, factor) for one, own in first])


def _between(
    states: Tensor, options: dict[str, Any], other: Tensor, other_options: dict[str, Any], factor: float
) -> list[Any]:
    """One entry of a conditioning, turned towards another; so are the Stage C latents that both may hold."""
    if states.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{PROMPTS} was given text states {states.shape[-1]} and {other.shape[-1]} wide: connect two of one stage"
        )
    if states.shape[1] != other.shape[1]:
        raise ValueError(
            f"{PROMPTS} was given texts of {states.shape[1]} and {other.shape[1]} tokens, and takes two of one length: "
            "every 75 tokens (about 50 words) make 77, so shorten the longer prompt, or lengthen the other"
        )
    mixed = slerp(*paired(PROMPTS, "texts", states, other), factor, TOKEN)
    priors = [given.get(PRIOR_KEY) for given in (options, other_options)]
    if (priors[0] is None) != (priors[1] is None):
        raise ValueError(
            f"{PROMPTS} was given Stage C latents in one conditioning only: connect Stage C to both, or after"
        )
    if priors[0] is None or priors[1] is None:
        return [mixed, options]
    version = common_version(PROMPTS, options, other_options) or "v2"
    prior = between_features(*paired(PROMPTS, "Stage C latents", priors[0], priors[1]), factor, version)
    return [mixed, {**options, PRIOR_KEY: prior}]
