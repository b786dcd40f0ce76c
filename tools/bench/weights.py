"""Full-size networks with seeded random weights, written as files in diffusers' layout, which both sides load."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core.checkpoints.components import COMPONENTS, Params
from wuerstchen_core.checkpoints.diffusers_layout import FILE, config_text
from wuerstchen_core.checkpoints.key_maps import vqgan_key_to_diffusers
from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGANParams


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the networks; the defaults are those of the released v2."""

    prior: PriorParams = field(default_factory=PriorParams)
    decoder: DecoderParams = field(default_factory=DecoderParams)
    vqgan: VQGANParams = field(default_factory=VQGANParams)

    def of(self, part: str) -> Params:
        params: Params = getattr(self, part)
        return params


@contextmanager
def random_weights(
    files: Iterable[tuple[str, str]], sizes: ModelSizes, progress: Callable[[str, int, int], None]
) -> Iterator[Path]:
    """Writes the weights of each (part, dtype) to a temporary folder. Raises ValueError if the disk is too small."""
    files = list(dict.fromkeys(files))
    needed, temporary = sum(num_bytes(part, sizes, dtype) for part, dtype in files), tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise ValueError(
            f"{temporary} has {free / 1e9:.1f} GB free and the random weights take {needed / 1e9:.1f} GB: "
            "set TMPDIR to a larger disk, or measure fewer stages or dtypes at a time"
        )
    with tempfile.TemporaryDirectory(prefix="wuerstchen-bench-") as name:
        folder = Path(name)
        # Every tensor is a slice of one pool: drawing a billion numbers would take longer than measuring.
        largest = max(x.numel() for part, _ in files for x in _shapes(part, sizes).values())
        pool = torch.randn(2 * largest + 1, generator=torch.Generator().manual_seed(0))
        for i, (part, dtype) in enumerate(files):
            progress(f"weights of the {part} in {dtype}", i, len(files))
            _write(weight_file(folder, part, dtype), part, sizes, pool.to(DTYPES[dtype]))
        del pool
        yield folder


def weight_file(folder: Path, part: str, dtype: str) -> Path:
    return folder / dtype / part / FILE


def num_bytes(part: str, sizes: ModelSizes, dtype: str) -> int:
    return sum(x.numel() for x in _shapes(part, sizes).values()) * DTYPES[dtype].itemsize


@lru_cache
def _shapes(part: str, sizes: ModelSizes) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(COMPONENTS[part].network(sizes.of(part)).state_dict())


def _write(path: Path, part: str, sizes: ModelSizes, pool: Tensor) -> None:
    """Writes the weights of one network in the pool's dtype, with the config.json that diffusers reads."""
    path.parent.mkdir(parents=True)
    tensors, offset = {}, 0
    for key, x in _shapes(part, sizes).items():
        tensors[vqgan_key_to_diffusers(key)] = _random_tensor(key, x, pool, offset)
        offset += x.numel()
    save_file(tensors, path, metadata={"format": "pt"})
    (path.parent / "config.json").write_text(config_text(part, sizes.of(part)), encoding="utf-8")


def _random_tensor(key: str, like: Tensor, pool: Tensor, offset: int) -> Tensor:
    """Returns a weight scaled so that every layer changes the output and activations stay near 1."""
    if not like.is_floating_point():  # BatchNorm's counter
        return torch.zeros(like.shape, dtype=like.dtype)
    start = offset % (len(pool) - like.numel())
    values = pool[start : start + like.numel()].view(like.shape)
    if key.endswith("running_var") or (like.dim() == 1 and key.endswith(".weight")):  # scale of a norm
        return 1 + 0.1 * values.tanh()
    if key.endswith((".gamma", ".gammas")):
        return 0.3 * values
    if like.dim() == 1 or key.endswith(".beta"):
        return 0.1 * values
    gain = 0.5 if key.endswith(("channelwise.4.weight", "to_out.0.weight")) else 1.0
    if key.startswith(("out.", "clf.")):  # the noise is divided by their outputs
        gain = 0.1
    return values * (gain / math.sqrt(like[0].numel()))
