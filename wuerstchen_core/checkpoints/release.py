"""Determines the release (v1 or v2) of a model's parts.

A prior that reads CLIP-H (width 1024) is v1's or that of v2's first upload (June 2023, replaced in August). Both have
the same keys and shapes, but v1 works on the image features themselves and v2 on (features + 1) / 42.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.control_net import ControlNetParams
from ..models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoderParams
from ..models.prior import V1, PriorParams
from .components import Params, Part, component_of, tower_name, tower_widths

logger = logging.getLogger(__name__)

VERSIONS = ("auto", "v1", "v2")

# Published CLIP-H priors: range of file sizes in bytes, first digits of the sha256, release.
PUBLISHED = (
    ((3_965_000_000, 3_975_000_000), "41adcb61", "v1"),  # model_stage_c.pt
    ((3_965_000_000, 3_975_000_000), "fde4bce5", "v1"),  # model_stage_c_ema.pt
    ((3_973_166_283, 3_973_166_283), "775151ac", "v2"),  # model_v2_stage_c.pt of 22 June 2023
)


PRIOR_VALUES = 32  # of a prior's weights, in the header of a ControlNet
SAME_PRIOR = 0.05

# The least and the largest side of the square images that the published priors were trained on, in pixels.
TRAINED_SIDES = {"v1": (512, 512), "v2": (1024, 1536)}


def trained_sides(params: PriorParams, metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the least and the largest side of square images that a prior was trained on; None if unknown.

    A model's metadata has its default size, and the demo's also its larger ones. Priors of the published size are taken
    to be fine-tuned from those.
    """
    sides: list[float] = []
    if (params.c, params.depth) == (PriorParams.c, PriorParams.depth):
        sides += TRAINED_SIDES[release_of_model([params])]
    sampling = metadata.get("sampling", {})
    if {"width", "height"} <= sampling.keys():
        sides.append(math.sqrt(sampling["width"] * sampling["height"]))
    sides += metadata.get("vocabulary", {}).get("larger", ())
    return (min(sides), max(sides)) if sides else None


def release_of(params: Params) -> str | None:
    """Returns the release of a part by its params, a prior's by its units; None if both releases have such a part."""
    if isinstance(params, PriorParams):
        return "v1" if params.feature_scale == V1["feature_scale"] else "v2"
    if isinstance(params, ControlNetParams):
        return params.prior_release
    if isinstance(params, ImageEncoderParams):
        return {EFFICIENTNET_V2_S: "v2", EFFICIENTNET_V2_L: "v1"}.get(params.stages)
    entry = component_of(params)
    return only_release(entry.releases) if entry else None


def release_of_model(params: Iterable[Params]) -> str:
    """Returns the release of a model by the params of its parts; v2 if they leave it open."""
    return "v1" if "v1" in map(release_of, params) else "v2"


def check_parts(parts: Mapping[str, Part]) -> None:
    """Raises ValueError unless parts are from one release, and each text tower has the width that its stage reads."""
    v1, v2 = ([name for name, x in parts.items() if release_of(x.params) == release] for release in ("v1", "v2"))
    if v1 and v2:
        raise ValueError(f"{', '.join(v1)} is from v1 and {', '.join(v2)} from v2: use parts of one release")
    for name, width in tower_widths(parts).items():
        if name in parts and (found := parts[name].params.width) != width:
            title = name.replace("_", " ")
            raise ValueError(f"the {title} must be {tower_name(width)}, not {tower_name(found)}: use the right one")


def check_control(control: ControlNetParams, prior: PriorParams, name: str) -> None:
    """Raises ValueError if a ControlNet called `name` is for a prior of another release, width or depth."""
    expected, found = (
        f"{release} prior of width {width} and depth {depth}"
        for release, width, depth in (
            (control.prior_release, control.prior_width, control.prior_depth),
            (release_of(prior), prior.c, prior.depth),
        )
    )
    if expected != found:
        raise ValueError(f"{name} is for a {expected}, but this is a {found}: use a ControlNet trained on this one")


def prior_values(prior: nn.Module) -> tuple[float, ...]:
    """Returns some values of a prior's first layer, which `prior_note` compares in any dtype."""
    weight = prior.get_parameter("projection.weight").flatten()
    chosen = weight[torch.linspace(0, len(weight) - 1, PRIOR_VALUES).long()]
    return tuple(float(f"{x:.4g}") for x in chosen.tolist())


def prior_note(control: ControlNetParams, prior: nn.Module, name: str) -> str:
    """Returns a sentence if a ControlNet called `name` was trained on a prior of other weights; "" if it was not.

    Values that differ by more than SAME_PRIOR are another prior's: rounding to fp8 makes 0.015, training the demo's
    prior once more 0.13, and two trainings from random weights 1.3.
    """
    expected, found = torch.tensor(control.prior_values), torch.tensor(prior_values(prior))
    if expected.shape != found.shape or (found - expected).norm() <= SAME_PRIOR * expected.norm():
        return ""
    return f"{name} was trained on a prior with other weights, so it may steer this one badly: train it on this one"


def only_release(releases: Iterable[str | None]) -> str | None:
    """Returns the one release among `releases`; None if there is none, or both."""
    found = {release for release in releases if release is not None}
    return found.pop() if len(found) == 1 else None


def with_units(params: PriorParams, release: str) -> PriorParams:
    """Returns a prior's params with the units of a release, which no tensor shows."""
    if release == "v2":
        return replace(params, feature_scale=PriorParams.feature_scale, feature_shift=PriorParams.feature_shift)
    return replace(params, feature_scale=V1["feature_scale"], feature_shift=V1["feature_shift"])


def guess_release(path: Path, params: PriorParams, version: str, headers_only: bool = False) -> str:
    """Returns the release of a prior by its file's checksum, else `version`, else the most likely one.

    With `headers_only` the file is not read for its checksum.
    """
    likely = "v1" if params.c_cond == V1["c_cond"] else "v2"
    chosen = likely if version == "auto" else version
    known = None if headers_only else _published_as(path, chosen)
    if not known and not headers_only and version == "auto" and likely == "v1":
        _warn_guessed(path)
    return known or chosen


def _published_as(path: Path, expected: str) -> str | None:
    """Returns the release that published exactly this file; None if it is unknown.

    Reads the whole file only if its size is that of a release other than `expected`.
    """
    size = path.stat().st_size if path.is_file() else 0
    candidates = [(start, release) for (low, high), start, release in PUBLISHED if low <= size <= high]
    if all(release == expected for _, release in candidates):
        return None
    checksum = _sha256(path, size, path.stat().st_mtime_ns)
    return next((release for start, release in candidates if checksum.startswith(start)), None)


@lru_cache(maxsize=16)  # a file that was replaced has another size or time of change
def _sha256(path: Path, size: int, changed: int) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


@lru_cache
def _warn_guessed(path: Path) -> None:
    """Warns once per file that v1 was assumed."""
    logger.warning(
        f"{path} is the prior of v1 or of v2's first upload (June 2023), which look alike: v1 is assumed. "
        'If the images are noise, set version to "v2"'
    )
