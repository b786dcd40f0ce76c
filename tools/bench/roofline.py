"""What the machine could do at best, and how much work a case is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen_core.checkpoints.components import NETWORKS
from wuerstchen_core.checkpoints.diffusers_layout import component_config
from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.kernels.linear import linear

from .cases import PICTURE, STAGES, Case
from .inputs import inputs, one_call
from .setting import Clock
from .weights import Sizes

TRIES, LONGEST = 8, 4.0  # of the product; seconds that they may take


def gemm_peak(dtype: str, device: Any, clock: Clock, side: int | None = None) -> float:
    """FLOP/s of a large square product: the best of several, by torch's plain product and by the networks' own."""
    side = side or (4096 if torch.device(device).type == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    best, begun = float("inf"), clock()
    for i in range(TRIES):
        started = clock()
        linear(a, b, None) if i % 2 else torch.mm(a, b)
        now = clock()
        best = min(best, now - started)
        if now - begun > LONGEST and i:
            break
    return 2 * side**3 / best


def flops(case: Case, sizes: Sizes, peer: bool, steps: tuple[int, int]) -> int:
    """Floating-point operations of a case's products and convolutions, counted without computing them.

    Counted of the peer's network where there is one, so that both sides are held to the same work; `steps` are those
    of a whole picture.
    """
    if case.stage == PICTURE:
        counts = {"prior": steps[0], "decoder": steps[1], "vqgan-decode": 1}
        return sum(count * flops(replace(case, stage=name), sizes, peer, steps) for name, count in counts.items())
    part, meta = STAGES[case.stage].parts[0], torch.device("meta")
    with meta:
        network: Any = _peers(part, sizes) if peer else NETWORKS[part](sizes.of(part))
    network.eval()
    learns = STAGES[case.stage].learns
    with torch.inference_mode(not learns), FlopCounterMode(display=False) as counter:
        if learns:
            network(*one_call(case, sizes, meta, torch.float32)).sum().backward()
        elif STAGES[case.stage].steps:
            network(*one_call(case, sizes, meta, torch.float32))
        else:
            given = inputs(case, sizes, meta, torch.float32)
            if case.stage == "vqgan-decode":
                network.decode(given["latents"])
            elif case.stage == "vqgan-encode":
                network.encode(given["images"])
            else:
                _encode(network, given["images"])
    return counter.get_total_flops()


def _encode(network: Any, images: torch.Tensor) -> None:
    from wuerstchen_core.models.image_encoder import semantic_view

    network.mapper(network.backbone(semantic_view(images)))


def _peers(part: str, sizes: Sizes) -> Any:
    from .diffusers_baseline import image_encoder, network_class

    network: nn.Module = (
        image_encoder(sizes.image_encoder)
        if part == "image_encoder"
        else network_class(part)(**component_config(part, sizes.of(part)))
    )
    return network
