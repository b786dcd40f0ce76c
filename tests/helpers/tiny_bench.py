"""Tiny networks for tests of the benchmark, and a stand-in for its subprocesses."""

from __future__ import annotations

from tools.bench.measure import Setting
from tools.bench.weights import ModelSizes
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGANParams

TINY = ModelSizes(
    prior=PriorParams(c=64, depth=2, nhead=1),  # 1280 wide text identifies v2
    decoder=DecoderParams(c_cond=64, c_hidden=(64,) * 4, nhead=(-1, 1, 1, 1), blocks=(1,) * 4, clip_embd=64),
    vqgan=VQGANParams(bottleneck_blocks=1, c_hidden=16, codebook_size=16),
)


def no_progress(text: str, done: int, total: int) -> None:
    """Shows nothing."""


def fixed_memory(side: str, setting: Setting, threads: int) -> int:
    """Returns fixed bytes."""
    return {"ours": 30_000_000, "peer": 60_000_000}[side]
