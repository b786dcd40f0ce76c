"""Full-size networks with seeded random weights, as files in diffusers' layout, which both sides read."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.checkpoints.components import NETWORKS, params_from_json, params_to_json
from wuerstchen_core.checkpoints.diffusers_layout import CLASSES, FILE, Params, component_key, config_text
from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.image_encoder import ImageEncoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGANParams

from .cases import STAGES, stored

SIZES_FILE = "sizes.json"
PARTS = ("prior", "decoder", "vqgan", "image_encoder")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}  # in such a file


@dataclass(frozen=True)
class Sizes:
    """How large the networks are; the defaults are those of the released v2."""

    prior: PriorParams = field(default_factory=PriorParams)
    decoder: DecoderParams = field(default_factory=DecoderParams)
    vqgan: VQGANParams = field(default_factory=VQGANParams)
    image_encoder: ImageEncoderParams = field(default_factory=ImageEncoderParams)

    def of(self, part: str) -> Params:
        params: Params = getattr(self, part)
        return params


def write_sizes(folder: Path, sizes: Sizes) -> None:
    """Say in a file how large the networks are, for the processes that measure them."""
    text = json.dumps({part: params_to_json(sizes.of(part)) for part in PARTS})
    (folder / SIZES_FILE).write_text(text, encoding="utf-8")


def sizes_of(folder: Path) -> Sizes:
    """What `write_sizes` wrote."""
    told = json.loads((folder / SIZES_FILE).read_text("utf-8"))
    return Sizes(**{part: params_from_json(part, values) for part, values in told.items()})  # type: ignore[arg-type]


@contextmanager
def weights_of(
    stages: Sequence[str], dtypes: Sequence[str], sizes: Sizes, tell: Callable[[str, int, int], None]
) -> Iterator[Path]:
    """A folder with the weights of every network that stages need. ValueError if the disk has no room for them."""
    wanted = list(
        dict.fromkeys(
            (part, stored(name, dtype))
            for dtype in dtypes
            for name in stages
            for part in (*STAGES[name].parts, *STAGES[name].beside)
        )
    )
    needed = sum(bytes_of(part, sizes, dtype) for part, dtype in wanted)
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{place} has {free / 1e9:.1f} GB free and the random weights take {needed / 1e9:.1f} GB: "
            "set TMPDIR to a folder with room, or measure fewer stages or dtypes at a time"
        )
    with tempfile.TemporaryDirectory(prefix="wuerstchen-bench-") as name:
        folder = Path(name)
        write_sizes(folder, sizes)
        pool = pool_for({part for part, _ in wanted}, sizes)
        for i, (part, dtype) in enumerate(wanted):
            tell(f"weights of the {part} in {dtype}", i, len(wanted))
            write(folder, part, sizes, dtype, pool.to(DTYPES[dtype]))
        del pool
        yield folder


@lru_cache
def shapes(part: str, sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a network, without memory."""
    with torch.device("meta"):
        return dict(NETWORKS[part](sizes.of(part)).state_dict())


def weight_file(folder: Path, part: str, dtype: str) -> Path:
    return folder / dtype / part / FILE


def bytes_of(part: str, sizes: Sizes, dtype: str) -> int:
    return sum(x.numel() for x in shapes(part, sizes).values()) * DTYPES[dtype].itemsize


def pool_for(parts: Iterable[str], sizes: Sizes) -> Tensor:
    """Random numbers that every tensor is a piece of: drawing a billion would take longer than measuring."""
    largest = max(x.numel() for part in parts for x in shapes(part, sizes).values())
    return torch.randn(2 * largest + 1, generator=torch.Generator().manual_seed(0))


def write(folder: Path, part: str, sizes: Sizes, dtype: str, pool: Tensor) -> None:
    """A network's weights as a file, beside what diffusers wants to know of its sizes."""
    path = weight_file(folder, part, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    offset = 0
    for key, x in _new_file(path, shapes(part, sizes), DTYPES[dtype]).items():
        _fill(key, x, pool, offset)
        offset += x.numel()
    if part in CLASSES:
        (path.parent / "config.json").write_text(config_text(part, sizes.of(part)), encoding="utf-8")


def _new_file(path: Path, like: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A safetensors file under diffusers' keys, and its tensors as they lie in it: filling them writes the file.

    Each weight is written once this way, where the library copies it three times.
    """
    tensors = {key: x.to(dtype if x.is_floating_point() else x.dtype) for key, x in like.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for key, x in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        places[key] = end
        end += x.numel() * x.dtype.itemsize
        header[component_key(key)] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [places[key], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, start + end)  # a file that torch has to make longer begins with a zero byte
    data = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)[start:]
    return {
        key: data[places[key] : places[key] + x.numel() * x.dtype.itemsize].view(x.dtype).view(x.shape)
        for key, x in tensors.items()
    }


def _fill(key: str, x: Tensor, pool: Tensor, offset: int) -> None:
    """Fill a tensor of a network in which every layer counts and whose activations stay about 1."""
    if not x.is_floating_point():  # how many batches a BatchNorm has seen
        x.zero_()
        return
    start = offset % (len(pool) - x.numel())
    numbers = pool[start : start + x.numel()].view(x.shape)
    if key.endswith("running_var") or (x.dim() == 1 and key.endswith(".weight")):  # a norm's scale
        x.copy_(1 + 0.1 * numbers.tanh())
    elif key.endswith((".gamma", ".gammas")):
        x.copy_(0.3 * numbers)
    elif x.dim() == 1 or key.endswith(".beta"):
        x.copy_(0.1 * numbers)
    else:
        torch.mul(numbers, _gain(key) / math.sqrt(x[0].numel()), out=x)


def _gain(key: str) -> float:
    if key.startswith(("out.", "clf.")):  # the noise is divided by what comes of these
        return 0.1
    return 0.5 if key.endswith(("channelwise.4.weight", "to_out.0.weight", "mapper.weight")) else 1.0
