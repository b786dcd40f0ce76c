"""Measures the memory of one call of each network at its released size, and compares it with ComfyUI's estimate.

`python -m tools.comfyui.measure_memory COMFYUI`, with ComfyUI's own Python, prints the table of docs/memory.md: the
bytes of all tensors that are alive at once, counted on the "meta" device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import markdown_table
from .in_host import enter, load_pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ((512, 1), (512, 2), (1024, 1))  # pixels per side, batch
NETWORKS = ("prior", "decoder", "token decoder", "Stage A decode", "Stage A encode", "image encoder")
TOKEN_MODE = "multinomial"
Key = tuple[str, str, int, int]  # network, dtype, pixels per side, batch
Prepared = tuple[nn.Module, Callable[[], Any], float]  # the network, its call, the estimate in bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that are created in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.weights = {x.untyped_storage()._cdata for x in network.state_dict().values()}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.weights:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _diffusion(key: Key) -> Prepared:
    """Prepares Stage C or v2's Stage B."""
    from pack.wuerstchen_core.common.geometry import decoder_side
    from pack.wuerstchen_core.models.decoder import DecoderParams
    from pack.wuerstchen_core.models.prior import PriorParams

    name, dtype, size, batch = key
    model = _model(name, PriorParams() if name == "prior" else DecoderParams(), dtype)
    factory = {"device": "meta", "dtype": DTYPES[dtype]}
    x, extra = _features(key, factory), {}
    if name == "decoder":
        x, extra = torch.ones(batch, 4, *[decoder_side(size)] * 2, **factory), {"stable_cascade_prior": x}
    t, text = (
        torch.full((batch,), 0.5, device="meta"),
        torch.ones(batch, 77, 1280 if name == "prior" else 1024, **factory),
    )
    network = model.diffusion_model

    def step() -> None:
        with network.caching_keys_values() if name == "prior" else nullcontext():  # as in a sampler's run
            network(x, t, text, **extra)

    return network, step, model.memory_required(x.shape)


def _token_decoder(key: Key) -> Prepared:
    """Prepares a guided step of v1's Stage B, in which each picture is in the batch twice."""
    from pack.wuerstchen_core.common.geometry import decoder_side
    from pack.wuerstchen_core.diffusion.samplers import guided
    from pack.wuerstchen_core.diffusion.token_sampler import SeededTokenNoise, choose
    from pack.wuerstchen_core.models.token_decoder import TokenDecoderParams

    _, dtype, size, batch = key
    model = _model("token_decoder", TokenDecoderParams(), dtype)
    network, factory = model.diffusion_model, {"device": "meta", "dtype": DTYPES[dtype]}
    cond = _features(key, factory), torch.ones(batch, 77, 1024, **factory)
    tokens = torch.zeros(batch, *[decoder_side(size)] * 2, dtype=torch.long, device="meta")
    t, codebook = torch.full((batch,), 0.5, device="meta"), torch.ones(8192, 4, device="meta")
    predict = guided(lambda x, t, prior, text: network(x, t, text, stable_cascade_prior=prior).float(), cond, cond)

    def step() -> None:
        choose(predict(tokens, t, 2.0), TOKEN_MODE, 1.0, codebook, SeededTokenNoise(0, batch))

    return network, step, model.memory_required((2 * batch, 4, *tokens.shape[1:]))


def _model(name: str, params: Any, dtype: str) -> Any:
    """Returns ComfyUI's model of a stage, without weights."""
    from pack.nodes.host import models

    config = models.StageConfig(name, params)
    config.set_inference_dtype(DTYPES[dtype], None)
    return config.get_model({}, device=torch.device("meta"))


def _features(key: Key, factory: dict[str, Any]) -> torch.Tensor:
    from pack.wuerstchen_core.common.geometry import prior_side

    _, _, size, batch = key
    return torch.ones(batch, 16, *[prior_side(size)] * 2, **factory)


def _vae(key: Key) -> Prepared:
    """Prepares a VAE; ComfyUI uses the estimate per picture of a batch."""
    from pack.nodes.host.vae import load_image_encoder, load_stage_a
    from pack.wuerstchen_core.checkpoints import Part
    from pack.wuerstchen_core.checkpoints.components import COMPONENTS

    name, dtype, size, batch = key
    part, load = ("image_encoder", load_image_encoder) if name == "image encoder" else ("vqgan", load_stage_a)
    params = COMPONENTS[part].params()
    vae = load(Part(part, params, COMPONENTS[part].network(params).state_dict()))
    network, decodes = vae.first_stage_model.to(device="meta", dtype=DTYPES[dtype]), name == "Stage A decode"
    shape = (batch, 4, size // 4, size // 4) if decodes else (batch, 3, size, size)
    x = torch.ones(shape, device="meta", dtype=DTYPES[dtype])
    call = network.decode if decodes else network.encode
    estimate = vae.memory_used_decode if decodes else vae.memory_used_encode
    return network, lambda: call(x), batch * estimate(shape, DTYPES[dtype])


def prepare(key: Key) -> Prepared:
    return {"prior": _diffusion, "decoder": _diffusion, "token decoder": _token_decoder}.get(key[0], _vae)(key)


def count_live_bytes(key: Key) -> tuple[float, float]:
    """Returns the peak of live bytes in one call, without weights and inputs, and the estimate."""
    network, call, estimate = prepare(key)
    # torch's fused attention allocates only its result; on "meta" there is only the plain one.
    fused = patch("torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with fused, LiveBytes(network) as live:
        call()
    return float(live.peak), float(estimate)


def table() -> str:
    """Returns the table of all networks."""
    rows = []
    for name, dtype, (size, batch) in product(NETWORKS, DTYPES, SIZES):
        measured, estimate = count_live_bytes((name, dtype, size, batch))
        numbers = f"{measured / 1e6:.0f} MB", f"{estimate / 1e6:.0f} MB", f"{estimate / measured:.2f}"
        rows.append((name, dtype, f"{size}²", batch, *numbers))
    return markdown_table(("network", "dtype", "pixels", "batch", "measured", "estimate", "ratio"), rows, 5)


if __name__ == "__main__":
    enter()
    load_pack()
    with torch.inference_mode():
        sys.stdout.write(f"{table()}\n")
