"""What a CONDITIONING means to the two stages: text states, Stage C's latents, and areas of the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import comfy.conds
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...wuerstchen_core.common.geometry import prior_side
from ...wuerstchen_core.models.decoder import DecoderParams, resize_prior_latents
from ...wuerstchen_core.models.token_decoder import TokenDecoderParams
from .diffusion_models import HostPrior
from .latents import STAGE_C, check_shape

PRIOR_KEY = "stable_cascade_prior"  # Stage C latents in a CONDITIONING; the host's Cascade nodes use it too
VERSION_KEY = "wuerstchen_version"  # the release whose prior painted the Stage C latents of a LATENT or a CONDITIONING

CLIP_NAMES = {1024: "CLIP-H", 1280: "CLIP-bigG"}

AREA_PIXELS = 8  # the host's Set Area node counts pixels by so many, whatever the model


def _check_batch(stage: str, count: int, given: int, things: str) -> None:
    """The host repeats a, b as a, b, a, b; it would also cut off what is too much, without a word."""
    if count % given:
        raise ValueError(
            f"{stage} was given {count} empty latents for {given} {things}: use the same batch size for both"
        )


def text_cond(stage: str, width: int, given: Mapping[str, Any]) -> comfy.conds.CONDRegular:
    """Text states as the host batches them: never repeated to a common length, since every token is attended."""
    states = given.get("cross_attn")
    if states is None:
        raise ValueError(f"{stage} was given a conditioning without text: connect Würstchen Text Encode")
    if states.shape[-1] != width:
        clip = CLIP_NAMES.get(width, "its own text tower")
        raise ValueError(
            f"{stage} reads text states {width} wide ({clip}), but this conditioning is {states.shape[-1]} wide: "
            "encode the prompt with Würstchen Text Encode and the CLIP that belongs to this model"
        )
    _check_batch(stage, len(given["noise"]), len(states), "texts")
    return comfy.conds.CONDRegular(states)


def check_no_prior(given: Mapping[str, Any]) -> None:
    """Raise ValueError where Stage C was given what is for Stage B."""
    if given.get(PRIOR_KEY) is not None:
        raise ValueError(
            "Stage C was given the conditioning of a decoder: connect the prior output of Würstchen Text Encode"
        )


_NO_PRIOR = (
    "Stage B has no Stage C latents to paint: connect Würstchen Decoder Conditioning between its text and its positive "
    "input"
)


class PriorCond(comfy.conds.CONDRegular):
    """Stage C latents of the whole picture: where the host crops Stage B's latents to an area, so it does these."""

    def __init__(self, cond: Tensor, whole: tuple[int, int]):
        super().__init__(cond)
        self.whole = whole  # h, w

    def _copy_with(self, cond: Tensor) -> PriorCond:
        return type(self)(cond, self.whole)

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> PriorCond:
        prior = self.cond if area is None else cut_prior(self.cond, self.whole, area)
        return self._copy_with(comfy.utils.repeat_to_batch_size(prior, batch_size))


def cut_prior(prior: Tensor, whole: tuple[int, int], area: tuple[int, int, int, int]) -> Tensor:
    """The part of Stage C latents that belongs to an area (h, w, top, left) of `whole` (h, w) latents of Stage B.

    Where the area's edges are edges of Stage C latents these are cut out as they are, and the area is painted as the
    same picture alone would be; else they are resized to Stage B's first.
    """
    starts = list(area[2:])
    ends = [start + size for start, size in zip(starts, area[:2], strict=True)]
    scales = list(zip(prior.shape[-2:], whole, strict=True))
    first, last = (
        [divmod(edge * cells, size) for edge, (cells, size) in zip(edges, scales, strict=True)]
        for edges in (starts, ends)
    )
    if any(rest for _, rest in (*first, *last)):
        prior = resize_prior_latents(prior, whole)
    else:
        starts, ends = ([cell for cell, _ in edges] for edges in (first, last))
    rows, columns = (slice(*edges) for edges in zip(starts, ends, strict=True))
    return prior[..., rows, columns]


def prior_cond(params: DecoderParams, given: Mapping[str, Any]) -> PriorCond:
    """Stage C latents of a conditioning; where a negative has none, zeros of the size that the picture's have."""
    check_release(given, "v2")
    prior, noise = given.get(PRIOR_KEY), given["noise"]
    height, width = noise.shape[-2:]
    if prior is None:
        if given.get("prompt_type") == "positive":
            raise ValueError(_NO_PRIOR)
        prior = torch.zeros(1, params.effnet_embd, prior_side(height * 4), prior_side(width * 4))
    _check_batch("Stage B", len(noise), len(prior), "pictures of Stage C")
    return PriorCond(prior.to(noise.device), (height, width))


def check_release(given: Mapping[str, Any], version: str) -> None:
    """Raise ValueError where Stage C latents are known to be of another release than the Stage B that is to paint."""
    painted = given.get(VERSION_KEY, version)
    if painted != version:
        raise ValueError(
            f"Stage B of Würstchen {version} was given Stage C latents of {painted}, which mean something else: take "
            f"the prior and Stage B of one release ({_OF_RELEASE[painted]} for {painted})"
        )


_OF_RELEASE = {"v1": "Würstchen Token Decoder Sample", "v2": "Würstchen Decoder Sample"}
# What the host can do with a conditioning in its own sampling only; start and end of a range are unset or trivial.
_PARTIAL = {"area": "an area", "mask": "a mask", "control": "a ControlNet", "hooks": "hooks"}
_WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


def token_cond(
    params: TokenDecoderParams, conditioning: Any, noise: Tensor, beside: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Stage C latents [B, 16, h, w] and text states [B, M, c] for v1's Stage B, of a conditioning for latents `noise`.

    Where a negative has no Stage C latents it gets zeros, in the size of those `beside` it.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the token decoder paints one conditioning, and was given {len(conditioning)} combined ones: "
            "put all the words into one Würstchen Text Encode"
        )
    [[states, options]] = conditioning
    partial = [name for key, name in _PARTIAL.items() if options.get(key) is not None]
    partial += ["a range of steps" for key, value in _WHOLE.items() if options.get(key, value) != value]
    if partial:
        raise ValueError(
            f"the token decoder paints the whole picture in all steps, and was given a conditioning with {partial[0]}: "
            "take that away"
        )
    check_release(options, "v1")
    text = text_cond("Stage B", params.byt5_embd, {"cross_attn": states, "noise": noise}).cond
    prior = options.get(PRIOR_KEY)
    if prior is None and beside is None:
        raise ValueError(_NO_PRIOR)
    prior = torch.zeros_like(beside[0]) if prior is None and beside is not None else prior
    check_shape(prior.shape, STAGE_C, "Stage B")
    _check_batch("Stage B", len(noise), len(prior), "pictures of Stage C")
    prior, text = (comfy.utils.repeat_to_batch_size(x, len(noise)) for x in (prior, text))
    return prior, text


def fit_area(area: tuple[int, ...], sides: tuple[int, int], multiple: int) -> tuple[int, ...]:
    """An area (height, width, top, left) inside `sides`, widened to whole multiples where the network needs them."""
    sizes, starts = [], []
    for side, size, start in zip(sides, area[:2], area[2:], strict=True):
        first = min(start, side - 1) // multiple * multiple
        last = min(-(-max(start + size, first + 1) // multiple) * multiple, side)
        sizes.append(last - first)
        starts.append(first)
    return (*sizes, *starts)


def _in_latents(area: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """An area (height, width, top, left) in units of `ratio` latents, in latents: no gap is left between neighbours."""
    starts = [math.floor(start * ratio + 0.5) for start in area[2:]]
    ends = [(start + size) * ratio for size, start in zip(area[:2], area[2:], strict=True)]
    # Rounded up, as the sides of Stage C are; but 6.000001 is 6.
    return (*(math.ceil(end - 1e-6) - start for end, start in zip(ends, starts, strict=True)), *starts)


def _bounds(mask: Tensor) -> tuple[int, ...]:
    """The area that holds all of a mask [B, h, w] that is not 0; the first latent where there is nothing."""
    held = mask.abs().amax(dim=0) > 0
    rows, columns = (held.any(dim=dim).nonzero().flatten().tolist() or [0] for dim in (1, 0))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1, rows[0], columns[0]


def _fit_areas(conds: list[dict[str, Any]], noise: Tensor, pixels: float, multiple: int) -> list[dict[str, Any]]:
    """Conditionings whose areas, of whatever node, are in latents of this stage."""
    height, width = sides = noise.shape[-2:]
    conds = [dict(cond) for cond in conds]
    for cond in conds:
        if "area" in cond and cond["area"][0] != "percentage":
            cond["area"] = _in_latents(cond["area"], AREA_PIXELS / pixels)
    comfy.samplers.resolve_areas_and_cond_masks_multidim(conds, sides, noise.device)  # percentages, sizes of masks
    for cond in conds:
        if cond.pop("set_area_to_bounds", False) and "mask" in cond:
            cond["area"] = _bounds(cond["mask"])  # the host's own are 8 latents at least: 341 pixels in Stage C
        if "area" in cond:
            cond["area"] = fit_area(cond["area"], (height, width), multiple)
    return conds


def prepare_runs_of(patcher: Any) -> None:
    """Have a MODEL of ours read areas in its own latents, and a prior each text once.

    The host takes 8 pixels for a latent where it is told pixels, and cuts out areas that Stage B cannot halve.
    """
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "wuerstchen", _outer_sample)


def _outer_sample(sample: Callable[..., Tensor], noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    guider: Any = sample.class_obj  # type: ignore[attr-defined]
    patcher = guider.model_patcher
    pixels, multiple = patcher.get_model_object("latent_format").spacial_downscale_ratio, patcher.model.area_multiple
    for name, conds in guider.conds.items():
        guider.conds[name] = _fit_areas(conds, noise, pixels, multiple)
    network = patcher.model.diffusion_model
    hooked = any("hooks" in cond for conds in guider.conds.values() for cond in conds)  # they patch it between steps
    with network.caching_keys_values() if isinstance(network, HostPrior) and not hooked else nullcontext():
        return sample(noise, *args, **kwargs)
