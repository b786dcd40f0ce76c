"""What tests of the bench share: networks so small that measuring them takes no time."""

from __future__ import annotations

from wuerstchen_core.bench.weights import Sizes
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
