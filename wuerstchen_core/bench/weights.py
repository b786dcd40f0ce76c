"""Full-size networks with seeded random weights, as files in diffusers' layout, which both sides read."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.parts import NETWORKS, Params, params_from_json, params_to_json
from ..devices import DTYPES
from ..models.decoder import DecoderParams
from ..models.image_encoder import ImageEncoderParams
from ..models.prior import PriorParams
from ..models.vqgan import VQGANParams
from .cases import STAGES

SIZES_FILE = "sizes.json"
PARTS = ("prior", "decoder", "vqgan", "image_encoder")
FILE = "diffusion_pytorch_model.safetensors"
CLASSES = {"prior": "WuerstchenPrior", "decoder": "WuerstchenDiffNeXt", "vqgan": "PaellaVQModel"}


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
    parts = dict.fromkeys(part for name in stages for part in (*STAGES[name].parts, *STAGES[name].beside))
    wanted = [(part, dtype) for dtype in dtypes for part in parts]
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
        pool = pool_for(parts, sizes)
        for i, (part, dtype) in enumerate(wanted):
            tell(f"weights of the {part} in {dtype}", i, len(wanted))
            write(folder, part, sizes, dtype, pool)
        del pool
        yield folder


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
    state, offset = {}, 0
    for key, like in shapes(part, sizes).items():
        state[key.replace("vquantizer.codebook.", "vquantizer.embedding.")] = _fill(key, like, pool, offset, dtype)
        offset += like.numel()
    save_file(state, path)
    if part in CLASSES:
        text = json.dumps({"_class_name": CLASSES[part], **config(part, sizes)})
        (path.parent / "config.json").write_text(text, encoding="utf-8")


def _fill(key: str, like: Tensor, pool: Tensor, offset: int, dtype: str) -> Tensor:
    """A tensor of a network in which every layer counts and whose activations stay about 1."""
    if not like.is_floating_point():  # how many batches a BatchNorm has seen
        return torch.zeros(like.shape, dtype=like.dtype)
    start = offset % (len(pool) - like.numel())
    x = pool[start : start + like.numel()].view(like.shape)
    if key.endswith("running_var") or (like.dim() == 1 and key.endswith(".weight")):  # a norm's scale
        x = 1 + 0.1 * x.tanh()
    elif key.endswith((".gamma", ".gammas")):
        x = 0.3 * x
    elif like.dim() == 1 or key.endswith(".beta"):
        x = 0.1 * x
    else:
        x = x * (_gain(key) / math.sqrt(like[0].numel()))
    return x.to(DTYPES[dtype])


def _gain(key: str) -> float:
    if key.startswith(("out.", "clf.")):  # the noise is divided by what comes of these
        return 0.1
    return 0.5 if key.endswith(("channelwise.4.weight", "to_out.0.weight", "mapper.weight")) else 1.0


def config(part: str, sizes: Sizes) -> dict[str, Any]:
    """A network's sizes under diffusers' names."""
    values = asdict(sizes.of(part))
    if part == "vqgan":
        names = {"c_hidden": "embed_dim", "c_latent": "latent_channels", "codebook_size": "num_vq_embeddings"}
        return {names.get(key, key): value for key, value in values.items()}
    unknown = ("feature_scale", "feature_shift", "self_attn")
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items() if key not in unknown}
