"""What tests of the bench share: networks so small that measuring them takes no time."""

from __future__ import annotations

from typing import Any

from tools.bench.cases import Case
from tools.bench.weights import Sizes
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGANParams

TINY = Sizes(
    prior=PriorParams(c=64, depth=2, nhead=1),  # 1280 wide text is what tells v2
    decoder=DecoderParams(c_cond=64, c_hidden=(64,) * 4, nhead=(-1, 1, 1, 1), blocks=(1,) * 4, clip_embd=64),
    vqgan=VQGANParams(bottleneck_blocks=1, c_hidden=16, codebook_size=16),
)


def silent(words: str, done: int, total: int) -> None:
    """No progress is shown."""


def made_up(side: str, case: Case, rounds: int, told: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own says: made up."""
    megabytes = {"ours": 30, "peer": 60}[side] * 10**6
    times = {"import_seconds": 1.0, "load_seconds": 2.0, "first_seconds": 3.0 if side == "ours" else 6.0}
    return {"peak": megabytes, "load_peak": megabytes, "load_private": 10**6, **times}
