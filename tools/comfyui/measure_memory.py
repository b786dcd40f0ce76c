"""What memory one call of each network takes in its released size, beside what ComfyUI is told.

`python -m tools.comfyui.measure_memory COMFYUI`, with ComfyUI's own Python, writes a table of docs/memory.md: bytes
of the tensors that live at once, counted without computing them. With `resident NETWORK DTYPE SIDE BATCH` behind it,
it computes one row and says (on Linux) by how much the process grew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .in_host import enter, load_pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ((512, 1), (512, 2), (1024, 1))  # side of the picture in pixels, batch
NETWORKS = ("prior", "decoder", "token decoder", "Stage A decode", "Stage A encode", "image encoder")
TOWERS = ("CLIP-bigG", "CLIP-H")
MODE = "multinomial"  # of the token decoder's choice
Case = tuple[str, str, int, int]  # network, dtype, side, batch
Prepared = tuple[nn.Module, Callable[[], Any], float]  # the network, its call and its estimate in bytes


def cases() -> list[Case]:
    sized = [(name, dtype, *size) for name, dtype, size in product(NETWORKS, DTYPES, SIZES)]
    return sized + [(name, dtype, 0, batch) for name, dtype, batch in product(TOWERS, DTYPES, (1, 2))]


class Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and alive."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known = {x.untyped_storage()._cdata for x in network.state_dict().values()}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def stage(case: Case, device: str) -> Prepared:
    """A diffusion network."""
    from pack.nodes.host import models
    from pack.wuerstchen_core.common.geometry import decoder_side, prior_side
    from pack.wuerstchen_core.models.decoder import DecoderParams
    from pack.wuerstchen_core.models.prior import PriorParams

    name, kind, side, batch = case
    config = models.StageConfig(name, PriorParams() if name == "prior" else DecoderParams())
    config.set_inference_dtype(DTYPES[kind], None)
    model = config.get_model({}, device=torch.device("meta"))
    factory = {"device": device, "dtype": DTYPES[kind]}
    features = torch.ones(batch, 16, prior_side(side), prior_side(side), **factory)
    if name == "prior":
        x, width, extra = features, 1280, {}
    else:
        x = torch.ones(batch, 4, decoder_side(side), decoder_side(side), **factory)
        width, extra = 1024, {"stable_cascade_prior": features}
    t, text = torch.full((batch,), 0.5, device=device), torch.ones(batch, 77, width, **factory)
    network = model.diffusion_model

    def step() -> None:
        with network.caching_keys_values() if name == "prior" else nullcontext():  # as in a sampler's run
            network(x, t, text, **extra)

    return network, step, model.memory_required(x.shape)


def tokens(case: Case, device: str) -> Prepared:
    """One guided step of v1's Stage B, for pictures of which each is in the batch twice."""
    from pack.nodes.host import models
    from pack.wuerstchen_core.common.geometry import decoder_side, prior_side
    from pack.wuerstchen_core.diffusion.samplers import guidance
    from pack.wuerstchen_core.diffusion.token_sampler import SeededTokenNoise, choose
    from pack.wuerstchen_core.models.token_decoder import TokenDecoderParams

    _, kind, side, batch = case
    config = models.StageConfig("token_decoder", TokenDecoderParams())
    config.set_inference_dtype(DTYPES[kind], None)
    model = config.get_model({}, device=torch.device("meta"))
    network, factory = model.diffusion_model, {"device": device, "dtype": DTYPES[kind]}
    cond = torch.ones(batch, 16, prior_side(side), prior_side(side), **factory), torch.ones(batch, 77, 1024, **factory)
    chosen = torch.zeros(batch, decoder_side(side), decoder_side(side), dtype=torch.long, device=device)
    t, codebook = torch.full((batch,), 0.5, device=device), torch.ones(8192, 4, device=device)
    predict = guidance(lambda x, t, prior, text: network(x, t, text, prior).float(), cond, cond)

    def step() -> None:
        choose(predict(chosen, t, 2.0), MODE, 1.0, codebook, SeededTokenNoise(0, batch))

    return network, step, model.memory_required((2 * batch, 4, *chosen.shape[1:]))


def vae(case: Case, device: str) -> Prepared:
    """A VAE's network; ComfyUI takes the estimate for one picture of a batch."""
    from pack.nodes.host.vae import load_image_encoder, load_stage_a
    from pack.wuerstchen_core.checkpoints import Part
    from pack.wuerstchen_core.models.image_encoder import ImageEncoder, ImageEncoderParams
    from pack.wuerstchen_core.models.vqgan import VQGAN, VQGANParams

    name, kind, side, batch = case
    if name == "image encoder":
        encoder = ImageEncoderParams()
        built = load_image_encoder(Part("image_encoder", encoder, ImageEncoder(encoder).state_dict()))
    else:
        params = VQGANParams()
        built = load_stage_a(Part("vqgan", params, VQGAN(params).state_dict()))
    network = built.first_stage_model.to(device="meta", dtype=DTYPES[kind])
    shape = (batch, 4, side // 4, side // 4) if name == "Stage A decode" else (batch, 3, side, side)
    x = torch.ones(shape, device=device, dtype=DTYPES[kind])
    call = network.decode if name == "Stage A decode" else network.encode
    estimate = built.memory_used_decode if name == "Stage A decode" else built.memory_used_encode
    return network, lambda: call(x), batch * estimate(shape, DTYPES[kind])


def tower(case: Case, device: str) -> Prepared:
    """A text tower; ComfyUI keeps for it what it always keeps free."""
    import comfy.model_management
    from pack.nodes.host.clip import _tower
    from pack.wuerstchen_core.models.text_encoder import CLIP_BIGG, CLIP_H

    name, kind, _, batch = case
    network = _tower({"CLIP-bigG": CLIP_BIGG, "CLIP-H": CLIP_H}[name], device="meta", dtype=DTYPES[kind])
    states = torch.ones(
        batch, 77, network.transformer.text_model.embeddings.token_embedding.embedding_dim, device=device
    )
    call = network.transformer.text_model.encoder
    states = states.to(DTYPES[kind])
    return network, lambda: call(states, mask=None), comfy.model_management.minimum_inference_memory()


def prepare(case: Case, device: str) -> Prepared:
    kinds = {"prior": stage, "decoder": stage, "token decoder": tokens, **dict.fromkeys(TOWERS, tower)}
    return kinds.get(case[0], vae)(case, device)


def counted(case: Case) -> tuple[float, float]:
    """Bytes alive at once in one call, weights and inputs left out, and the estimate."""
    network, call, estimate = prepare(case, "meta")
    # The fused attention of torch holds nothing but its result; on "meta" there is only the plain one.
    fused = patch("torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with fused, Counter(network) as counter:
        call()
    return float(counter.peak), float(estimate)


def status(key: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def resident(case: Case) -> tuple[float, float]:
    """By how many bytes the process grew in one call, and the estimate. Weights are made up."""
    network, call, estimate = prepare(case, "cpu")
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before = status("VmRSS")
    call()
    return float(status("VmHWM") - before), float(estimate)


def table(rows: list[tuple[Case, tuple[float, float]]]) -> str:
    lines = ["| network | dtype | pixels | batch | measured | estimate | ratio |", "|---|---|---:|---:|---:|---:|---:|"]
    for (name, dtype, side, batch), (measured, estimate) in rows:
        size = f"{side}²" if side else "any"
        numbers = f"{measured / 1e6:.0f} MB | {estimate / 1e6:.0f} MB | {estimate / measured:.2f}"
        lines.append(f"| {name} | {dtype} | {size} | {batch} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    words = enter()
    load_pack()
    with torch.inference_mode():
        if words[:1] == ["resident"]:
            chosen: Case = (words[1], words[2], int(words[3]), int(words[4]))
            sys.stdout.write(table([(chosen, resident(chosen))]))
        else:
            sys.stdout.write(table([(case, counted(case)) for case in cases()]))
