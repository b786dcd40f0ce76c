"""From parts to networks: built without memory, filled strictly, ready for inference."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder
from ..models.image_encoder import ImageEncoder
from ..models.prior import Prior
from ..models.text_encoder import TextEncoder
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from .components import NETWORKS, TEXT_ENCODER, Part, kind_of, listed
from .open import read_part

Path: TypeAlias = str | os.PathLike[str]


def build_part(part: Part, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The part as a network in evaluation mode without gradients; `dtype` None keeps the file's.

    ValueError names the missing, the unexpected and the mis-shaped keys.
    """
    with torch.device("meta"):
        network = NETWORKS[kind_of(part.name)](part.params)
    _compare(part.name, network.state_dict(), part.state_dict)
    state = {key: x.to(device, dtype if x.is_floating_point() else None) for key, x in part.state_dict.items()}
    network.load_state_dict(state, assign=True)
    left = [key for key, x in (*network.named_parameters(), *network.named_buffers()) if x.is_meta]
    if left:
        raise ValueError(f"the {part.name} cannot be built from its file: it has no values for {_list(left)}")
    return network.eval().requires_grad_(False)


def _list(keys: list[str]) -> str:
    return f"{len(keys)} ({listed(keys)})"


def _compare(name: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    wrong = [
        f"{key} is {list(given[key].shape)} and should be {list(x.shape)}"
        for key, x in expected.items()
        if key in given and given[key].shape != x.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    problems = ", ".join(f"{what}: {_list(keys)}" for what, keys in found.items() if keys)
    if problems:
        raise ValueError(f"the weights of the {name} are not those of a {name} of its sizes; keys {problems}")


def load_prior(source: Path, *, device: Any = "cpu", dtype: torch.dtype | None = None, version: str = "auto") -> Prior:
    """Stage C of a source (see `read_part`); `version` says whose it is where nothing else does."""
    return cast(Prior, build_part(read_part(source, "prior", version), device=device, dtype=dtype))


def load_decoder(source: Path, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """v2's Stage B of a source (see `read_part`)."""
    return cast(Decoder, build_part(read_part(source, "decoder"), device=device, dtype=dtype))


def load_token_decoder(source: Path, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> TokenDecoder:
    """v1's Stage B of a source (see `read_part`)."""
    return cast(TokenDecoder, build_part(read_part(source, "token_decoder"), device=device, dtype=dtype))


def load_vqgan(source: Path, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> VQGAN:
    """Stage A of a source (see `read_part`)."""
    return cast(VQGAN, build_part(read_part(source, "vqgan"), device=device, dtype=dtype))


def load_image_encoder(source: Path, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> ImageEncoder:
    """The semantic compressor of a source (see `read_part`)."""
    return cast(ImageEncoder, build_part(read_part(source, "image_encoder"), device=device, dtype=dtype))


def load_text_encoder(
    source: Path,
    *,
    which: Literal["prior", "decoder"] = "prior",
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """The text tower of a stage (see `read_part`); a source of one tower that names no stage gives it for either."""
    part = read_part(source, f"{which}_{TEXT_ENCODER}")
    return cast(TextEncoder, build_part(part, device=device, dtype=dtype))
