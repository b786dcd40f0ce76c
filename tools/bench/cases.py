"""The benchmarks, their cases (sizes, batches and dtypes), and their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.common.devices import DTYPES, NETWORK_DTYPES, companion_dtype, has_int8, native_bf16
from wuerstchen_core.common.geometry import check_size, decoder_side, prior_side

from .weights import ModelSizes

TOKENS = 77
PRIOR_GUIDANCE = 4.0
STEPS = 30, 12  # of a whole picture: Stage C, Stage B
SEED = 7


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: the networks it loads (it measures the first) and how it is timed."""

    parts: tuple[str, ...]
    steps: bool = False  # timed per step of a sampler or of training, else per call
    trains: bool = False


PICTURE = "text-to-picture"  # all three stages, from given text states
BENCHMARKS = {
    "prior": Benchmark(("prior",), steps=True),
    "decoder": Benchmark(("decoder", "vqgan"), steps=True),
    **dict.fromkeys(("vqgan-decode", "vqgan-encode"), Benchmark(("vqgan",))),
    PICTURE: Benchmark(("prior", "decoder", "vqgan")),
    "train-prior": Benchmark(("prior",), steps=True, trains=True),
    "train-decoder": Benchmark(("decoder",), steps=True, trains=True),
}
GROUPS = {
    "vqgan": ("vqgan-decode", "vqgan-encode"),
    "train": tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.trains),
    "all": ("prior", "decoder", "vqgan-decode", "vqgan-encode"),
}


@dataclass(frozen=True)
class Case:
    """One row of the table: a benchmark at one picture size, batch size and dtype."""

    stage: str
    size: int  # pixels per side
    batch: int
    dtype: str
    compute: str  # dtype of all but int8 layers, and of the peer: that of `dtype` unless it is int8
    compiled: bool = False

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.stage]

    @property
    def label(self) -> str:
        return f"{self.stage} {self.size}² x{self.batch} {self.dtype}{' compiled' if self.compiled else ''}"

    @property
    def rows(self) -> int:
        """Batch size of the network: guidance computes each picture twice."""
        return 2 * self.batch if self.stage == "prior" else self.batch

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the random weights: mixed-precision training keeps them in fp32, int8 quantises them."""
        return torch.float32 if self.benchmark.trains else DTYPES[self.compute]


def stage_names(names: Sequence[str]) -> list[str]:
    """Returns the benchmarks that `names` select, groups expanded. Raises ValueError for an unknown name."""
    if unknown := [name for name in names if name not in BENCHMARKS and name not in GROUPS]:
        raise ValueError(f"unknown stage {unknown[0]!r}: choose from {', '.join((*BENCHMARKS, *GROUPS))}")
    return list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))


def fast_dtypes(device: torch.device) -> list[str]:
    """Returns the dtypes in which a device is fast: bf16 if it is native, else fp32 (fp16 on GPUs), and int8."""
    wide = "bf16" if native_bf16(device) else "fp32" if device.type == "cpu" else "fp16"
    return [wide, *(["int8"] if device.type == "cuda" or (device.type == "cpu" and has_int8()) else [])]


def all_cases(
    stages: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    device: torch.device,
    compiled: Sequence[bool] = (False,),
) -> list[Case]:
    """Returns every combination, ordered so that each network is made once. Raises ValueError for an invalid one."""
    for size in sizes:
        check_size(size, size)
    if min(batches) < 1:
        raise ValueError(f"--batch {min(batches)} is too small: use at least 1")
    if unknown := [dtype for dtype in dtypes if dtype not in NETWORK_DTYPES]:
        raise ValueError(f"unknown dtype {unknown[0]!r}: choose from {', '.join(NETWORK_DTYPES)}")
    if {"fp16", "int8"} & set(dtypes) and any(BENCHMARKS[stage].trains for stage in stages):
        raise ValueError("training runs in bf16 (mixed precision) or fp32: remove fp16 and int8 from --dtypes")
    companion = next(name for name, dtype in DTYPES.items() if dtype == companion_dtype(device))
    computes = {dtype: companion if dtype == "int8" else dtype for dtype in dtypes}
    return [
        Case(stage, size, batch, dtype, compute, is_compiled)
        for is_compiled, compute, stage, batch, size, dtype in product(
            compiled, dict.fromkeys(computes.values()), stages, sorted(batches), sorted(sizes), dtypes
        )
        if computes[dtype] == compute
    ]


def inputs(case: Case, sizes: ModelSizes, device: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns the seeded inputs of a case by name, rounded to the case's dtype and cast to `dtype` (default: that)."""
    randn = _randn(case, device, dtype)
    prior, latent = prior_side(case.size), decoder_side(case.size)
    if case.stage == "vqgan-encode":
        return {"images": randn(case.batch, 3, case.size, case.size).sigmoid()}
    if case.stage == "vqgan-decode":
        return {"latents": randn(case.batch, sizes.vqgan.c_latent, latent, latent) * sizes.vqgan.scale_factor}
    return {
        "prior_text": randn(case.batch, TOKENS, sizes.prior.c_cond),
        "prior_negative": randn(1, TOKENS, sizes.prior.c_cond),
        "text": randn(case.batch, TOKENS, sizes.decoder.clip_embd),
        "features": randn(case.batch, sizes.decoder.effnet_embd, prior, prior),
    }


def network_inputs(case: Case, sizes: ModelSizes, device: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Returns (x, t, ...) for one call of Prior or Decoder; both sides take this order. dtype: see `inputs`."""
    randn = _randn(case, device, dtype)
    rows, prior, latent = case.rows, prior_side(case.size), decoder_side(case.size)
    t = torch.full((rows,), 0.5, device=device, dtype=dtype or DTYPES[case.compute])
    if case.benchmark.parts[0] == "prior":
        return randn(rows, sizes.prior.c_in, prior, prior), t, randn(rows, TOKENS, sizes.prior.c_cond)
    features = randn(rows, sizes.decoder.effnet_embd, prior, prior)
    return randn(rows, sizes.decoder.c_in, latent, latent), t, features, randn(rows, TOKENS, sizes.decoder.clip_embd)


def _randn(case: Case, device: Any, dtype: torch.dtype | None) -> Any:
    generator = torch.Generator().manual_seed(SEED)
    return lambda *shape: torch.randn(shape, generator=generator).to(DTYPES[case.compute]).to(device, dtype)
