"""Conditioning of both stages: text states, Stage C latents, and areas of the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.conds
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...wuerstchen_core.checkpoints.components import tower_name
from ...wuerstchen_core.common.geometry import prior_side
from ...wuerstchen_core.common.numbers import check_finite
from ...wuerstchen_core.common.text import listed
from ...wuerstchen_core.models.decoder import DecoderParams, resize_prior_latents
from ...wuerstchen_core.models.token_decoder import TokenDecoderParams
from .control import WuerstchenControl, controls_of
from .latents import STAGE_C, check_shape
from .masks import grid_mask
from .notices import notify

PRIOR_KEY = "stable_cascade_prior"  # Stage C latents in a CONDITIONING; ComfyUI's Stable Cascade nodes use it too
VERSION_KEY = "wuerstchen_version"  # release of the Stage C latents in a LATENT or CONDITIONING

AREA_PIXELS = 8  # ComfyUI's Set Area node stores pixels divided by 8, whatever the model

Area = tuple[int, ...]  # height, width, top, left

_NO_PRIOR = (
    "Stage B got no Stage C latents: connect Würstchen Decoder Conditioning between its text and its positive input"
)
_COMFYUI_KEYS = frozenset(  # of a CONDITIONING, that ComfyUI uses itself or adds for every model
    "area clip_end_percent clip_start_percent control_apply_to_uncond cross_attn default end_percent hooks mask "
    "mask_strength model_conds pooled_output prompt_type set_area_to_bounds start_percent strength timestep_end "
    "timestep_start uuid".split()
)
_NETWORKS = frozenset({"control", "gligen"})  # keys of networks that ComfyUI would run
_SAMPLE_NODES = {"v1": "Würstchen Token Decoder Sample", "v2": "Würstchen Decoder Sample"}


def _check_batch(stage: str, latents: int, count: int, kind: str) -> None:
    """Raises ValueError unless conditioning can be repeated to the batch: ComfyUI would silently drop the rest.

    Training draws its batches from all latents at random, but always takes the first entries of a conditioning.
    """
    if count > 1 and torch.is_grad_enabled():
        raise ValueError(
            f"{stage} got a conditioning of {count} {kind} to train on, which ComfyUI pairs with the wrong latents: "
            "encode each picture by itself, and join the conditionings with Conditioning (Combine)"
        )
    if latents % count:
        raise ValueError(f"{stage} got {latents} empty latents for {count} {kind}: use the same batch size for both")


def check_options(stage: str, conditioning: Iterable[Mapping[str, Any]]) -> None:
    """Checks the options of combined conditionings, set by any node, before a stage is sampled.

    Raises ValueError for networks that the stage cannot use; notifies about what other models read.
    """
    conditioning = list(conditioning)
    keys = set().union(*conditioning)
    ours = {isinstance(control, WuerstchenControl) for control in controls_of(conditioning)}
    networks, advice = ["GLIGEN boxes"] if "gligen" in keys else [], ""
    if False in ours:
        networks.append("another model's ControlNet")
        advice = "load one of Stage C with Würstchen ControlNet Loader, or " if stage == "Stage C" else ""
    elif ours and stage != "Stage C":
        networks.append("a ControlNet of Stage C")
        advice = "connect the conditioning with it to Stage C, or "
    if networks:
        raise ValueError(
            f"{stage} of Würstchen cannot use {' and '.join(networks)} in its conditioning: {advice}"
            "remove the node that adds it"
        )
    if ignored := sorted(keys - _COMFYUI_KEYS - _NETWORKS - {PRIOR_KEY, VERSION_KEY}):
        notify(
            f"{stage} of Würstchen ignores {listed(ignored)} in its conditioning, which other models read: "
            "remove the node that adds it"
        )


def text_cond(stage: str, width: int, cond_kwargs: Mapping[str, Any]) -> comfy.conds.CONDRegular:
    """Returns the text states for ComfyUI to batch, never repeated to a common length, since every token is attended.

    `cond_kwargs` are the keyword arguments of `extra_conds`. Raises ValueError if the text is missing, not finite, of
    another width than the stage needs, or of a batch size that does not fit.
    """
    states = cond_kwargs.get("cross_attn")
    if states is None:
        raise ValueError(f"{stage} got a conditioning without text: connect Würstchen Text Encode")
    if states.shape[-1] != width:
        raise ValueError(
            f"{stage} reads {tower_name(width)}, but this conditioning is {states.shape[-1]} wide: "
            "encode the prompt with Würstchen Text Encode and the CLIP that belongs to this model"
        )
    check_finite(f"the text encoder of {stage}", states)
    _check_batch(stage, len(cond_kwargs["noise"]), len(states), "texts")
    return comfy.conds.CONDRegular(states)


class PriorCond(comfy.conds.CONDRegular):
    """Stage C latents of the whole image, cropped wherever ComfyUI crops Stage B's latents to an area."""

    def __init__(self, cond: Tensor, whole: tuple[int, int]):
        super().__init__(cond)
        self.whole = whole  # height, width of Stage B's latents

    def _copy_with(self, cond: Tensor) -> PriorCond:
        return type(self)(cond, self.whole)

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> PriorCond:
        prior = self.cond if area is None else crop_prior(self.cond, self.whole, area)
        return self._copy_with(comfy.utils.repeat_to_batch_size(prior, batch_size))


def crop_prior(prior: Tensor, whole: tuple[int, int], area: Area) -> Tensor:
    """Crops Stage C latents to an area of Stage B's latents, whose height and width are `whole`.

    If the area's edges are edges of Stage C latents, these are cropped as they are, and the area is sampled like an
    image of its own. Otherwise they are first resized to Stage B's size.
    """
    edges = [
        divmod(edge * cells, size)
        for cells, size, start, length in zip(prior.shape[-2:], whole, area[2:], area[:2], strict=True)
        for edge in (start, start + length)
    ]
    if any(rest for _, rest in edges):
        height, width, top, left = area
        return resize_prior_latents(prior, whole)[..., top : top + height, left : left + width]
    (top, _), (bottom, _), (left, _), (right, _) = edges
    return prior[..., top:bottom, left:right]


def _check_prior(prior: Tensor, batch: int) -> None:
    """Raises ValueError unless Stage C latents are finite, and fit Stage B and its batch size."""
    check_shape(prior.shape, STAGE_C, "Stage B")
    check_finite("Stage C", prior)
    _check_batch("Stage B", batch, len(prior), "Stage C latents")


def prior_cond(params: DecoderParams, cond_kwargs: Mapping[str, Any]) -> PriorCond:
    """Returns a conditioning's Stage C latents; for a negative without them, zeros of the image's size."""
    check_release(cond_kwargs, "v2")
    prior, noise = cond_kwargs.get(PRIOR_KEY), cond_kwargs["noise"]
    height, width = noise.shape[-2:]
    if prior is None:
        if cond_kwargs.get("prompt_type") == "positive":
            raise ValueError(_NO_PRIOR)
        prior = torch.zeros(1, params.effnet_embd, prior_side(height * 4), prior_side(width * 4))
    _check_prior(prior, len(noise))
    return PriorCond(prior.to(noise.device), (height, width))


def check_release(cond_kwargs: Mapping[str, Any], version: str) -> None:
    """Raises ValueError if Stage C latents are known to be of another release than Stage B."""
    found = cond_kwargs.get(VERSION_KEY, version)
    if found != version:
        raise ValueError(
            f"Stage B of Würstchen {version} got Stage C latents of {found}, which have other units: use the prior and "
            f"Stage B of one release ({_SAMPLE_NODES[found]} for {found})"
        )


def token_cond(
    params: TokenDecoderParams, conditioning: Any, noise: Tensor, cond: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns Stage C latents [B, 16, h, w] and text states [B, M, c] of a conditioning for v1's Stage B.

    `noise` [B, 4, H, W] has the batch size. A negative without Stage C latents gets zeros of the size of those in
    `cond`, the positive's result. Raises ValueError for what only ComfyUI's own sampling supports.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the token decoder takes one conditioning, not {len(conditioning)} combined ones: put all words into one "
            "Würstchen Text Encode"
        )
    [[states, options]] = conditioning
    check_options("Stage B", [options])
    unsupported = [key for key in ("area", "mask", "hooks") if options.get(key) is not None]
    if (options.get("start_percent", 0.0), options.get("end_percent", 1.0)) != (0.0, 1.0):
        unsupported.append("step range")
    if unsupported:
        raise ValueError(
            "the token decoder samples the whole image in all steps and ignores "
            f"{', '.join(unsupported)} of a conditioning: remove it"
        )
    check_release(options, "v1")
    text = text_cond("Stage B", params.byt5_embd, {"cross_attn": states, "noise": noise}).cond
    prior = options.get(PRIOR_KEY)
    if prior is None:
        if cond is None:
            raise ValueError(_NO_PRIOR)
        prior = torch.zeros_like(cond[0])
    _check_prior(prior, len(noise))
    prior, text = (comfy.utils.repeat_to_batch_size(x, len(noise)) for x in (prior, text))
    return prior, text


def fit_area(area: Area, sides: tuple[int, int], multiple: int) -> Area:
    """Clips an area to `sides` (height, width) and widens it to multiples of what the network can halve."""
    sizes, starts = [], []
    for side, size, start in zip(sides, area[:2], area[2:], strict=True):
        first = min(start, side - 1) // multiple * multiple
        last = min(-(-max(start + size, first + 1) // multiple) * multiple, side)
        sizes.append(last - first)
        starts.append(first)
    return (*sizes, *starts)


def scale_area(area: Area, ratio: float) -> Area:
    """Converts an area to latents, `ratio` latents per unit, without a gap between neighbouring areas."""
    starts = [math.floor(start * ratio + 0.5) for start in area[2:]]
    ends = [(start + size) * ratio for size, start in zip(area[:2], area[2:], strict=True)]
    # Rounded up, as the sides of Stage C are; but 6.000001 is 6.
    return (*(math.ceil(end - 1e-6) - start for end, start in zip(ends, starts, strict=True)), *starts)


def _mask_bounds(mask: Tensor) -> Area:
    """Returns the area of a mask [B, h, w] that is not 0; the first latent if all of it is."""
    covered = mask.abs().amax(dim=0) > 0
    rows, columns = (covered.any(dim=dim).nonzero().flatten().tolist() or [0] for dim in (1, 0))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1, rows[0], columns[0]


def _fit_areas(conds: list[dict[str, Any]], noise: Tensor, pixels: float, multiple: int) -> list[dict[str, Any]]:
    height, width = sides = noise.shape[-2:]
    conds = [dict(cond) for cond in conds]
    for cond in conds:
        if "mask" in cond:
            cond["mask"] = grid_mask(cond["mask"], sides)[:, 0]
        if "area" not in cond:
            continue
        if cond["area"][0] != "percentage":
            cond["area"] = scale_area(cond["area"], AREA_PIXELS / pixels)
        elif len(cond["area"]) == 7:  # a video's: time, height, width and their starts
            cond["area"] = ("percentage", *cond["area"][2:4], *cond["area"][5:])
    comfy.samplers.resolve_areas_and_cond_masks_multidim(conds, sides, noise.device)  # percentages
    for cond in conds:
        if cond.pop("set_area_to_bounds", False) and "mask" in cond:
            cond["area"] = _mask_bounds(cond["mask"])  # ComfyUI's are at least 8 latents: 341 pixels in Stage C
        if "area" in cond:
            cond["area"] = fit_area(cond["area"], (height, width), multiple)
    return conds


def fit_areas(guider: Any, noise: Tensor) -> None:
    """Converts the areas and masks of a guider's conditionings, set by any node, to the latents of its MODEL."""
    patcher = guider.model_patcher
    pixels, multiple = patcher.get_model_object("latent_format").spacial_downscale_ratio, patcher.model.area_multiple
    for name, conds in guider.conds.items():
        guider.conds[name] = _fit_areas(conds, noise, pixels, multiple)
