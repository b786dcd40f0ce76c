"""Which release a prior belongs to, where its tensors leave it open.

A prior that reads text states 1024 wide is v1's, or that of v2's first upload of June 2023 (replaced in August): alike
in every key and shape, but v1's works on the features as they are, and v2's on (features + 1) / 42.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..models.decoder import DecoderParams
from ..models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoderParams
from ..models.prior import V1, PriorParams
from ..models.token_decoder import TokenDecoderParams
from .components import Params, release

logger = logging.getLogger(__name__)

VERSIONS = ("auto", "v1", "v2")

# Published files that are open: the bytes (from, to) that they may have, how their sha256 begins, and whose they are.
PUBLISHED = (
    ((3_965_000_000, 3_975_000_000), "41adcb61", "v1"),  # model_stage_c.pt
    ((3_965_000_000, 3_975_000_000), "fde4bce5", "v1"),  # model_stage_c_ema.pt
    ((3_973_166_283, 3_973_166_283), "775151ac", "v2"),  # model_v2_stage_c.pt of 22 June 2023
)


def check_version(version: str) -> None:
    """Raise ValueError unless it is a version that can be asked for."""
    if version not in VERSIONS:
        raise ValueError(f"version {version!r} is unknown: choose {', '.join(VERSIONS)}")


def version_of(params: Params) -> str | None:
    """The release that the sizes of a part other than a prior tell; None for what both share."""
    if isinstance(params, DecoderParams):
        return "v2"
    if isinstance(params, TokenDecoderParams):
        return "v1"
    if isinstance(params, ImageEncoderParams):
        return {EFFICIENTNET_V2_S: "v2", EFFICIENTNET_V2_L: "v1"}.get(params.stages)
    return None


def told_by(params: Params) -> str | None:
    """The release that the sizes of any part tell, a prior's by its units; None for what both share."""
    if isinstance(params, PriorParams):
        return release([params])
    return version_of(params)


def check_release(sizes: Mapping[str, Params]) -> None:
    """Raise ValueError where parts of v1 and of v2 meet."""
    of = {told: [name for name, params in sizes.items() if told_by(params) == told] for told in ("v1", "v2")}
    if of["v1"] and of["v2"]:
        raise ValueError(f"{', '.join(of['v1'])} is of v1 and {', '.join(of['v2'])} of v2: give those of one release")


def of_others(versions: Iterable[str | None]) -> str | None:
    """The release that the parts beside a prior name; None if none does, or if they differ."""
    found = {version for version in versions if version is not None}
    return found.pop() if len(found) == 1 else None


def sure_version(params: PriorParams) -> str | None:
    """The release of a prior whose sizes were read off its tensors; None if they leave it open."""
    return "v2" if params.c_cond == PriorParams.c_cond else None


def assumed_version(path: Path, params: PriorParams, wanted: str, by_headers: bool = False) -> str:
    """The release of a prior that nothing beside it tells: that of a known file, the `wanted` one, else the likely.

    `by_headers`: the file is not read for it.
    """
    likely = "v1" if params.c_cond == V1["c_cond"] else "v2"
    release = likely if wanted == "auto" else wanted
    if by_headers:
        return release
    known = published_as(path, release)
    if known is None and wanted == "auto" and likely == "v1":
        _note_assumed(path)
    return known or release


def with_units(params: PriorParams, version: str) -> PriorParams:
    """The sizes of a prior with a release's units, which are in no tensor."""
    if version == "v2":
        return replace(params, feature_scale=PriorParams.feature_scale, feature_shift=PriorParams.feature_shift)
    return replace(params, feature_scale=V1["feature_scale"], feature_shift=V1["feature_shift"])


def published_as(path: Path, expected: str) -> str | None:
    """The release that published exactly this file; None if it is unknown, or by its size cannot be but `expected`'s.

    Reads the whole file if by its size it may be another release's.
    """
    if not path.is_file():
        return None
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    fitting = [(start, version) for (low, high), start, version in PUBLISHED if low <= size <= high]
    if not {version for _, version in fitting} - {expected}:
        return None
    found = _sha256(path, size, changed)
    return next((version for start, version in fitting if found.startswith(start)), None)


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, changed: int) -> str:
    """The checksum of a file, computed once as long as it does not change."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


@lru_cache
def _note_assumed(path: Path) -> None:
    """Say once of a file that v1 was assumed."""
    logger.warning(
        f"{path} may be the prior of v1 or of v2's first upload (June 2023), and nothing in it says which: v1 is "
        'assumed; if its pictures are noise, give version "v2"'
    )
