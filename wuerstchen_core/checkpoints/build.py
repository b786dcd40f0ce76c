"""Builds networks from parts: on the meta device, filled strictly, ready for inference."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn

from ..common.devices import companion_dtype, pick_dtype
from ..common.versions import check_versions
from ..models.control_net import ControlNet
from ..models.decoder import Decoder
from ..models.image_encoder import ImageEncoder
from ..models.int8 import int8_layers, use_int8
from ..models.prior import Prior
from ..models.text_encoder import TextEncoder
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from .components import TEXT_ENCODER, Part, component, kind_of
from .damage import names_source
from .key_maps import split_attention
from .lazy import LazyTensor
from .open import open_part
from .quant import layer_state
from .release import release_of_model
from .verify import check_weights

Path: TypeAlias = str | os.PathLike[str]
Dtype: TypeAlias = torch.dtype | str | None


def build_part(part: Part, *, device: Any = "cpu", dtype: Dtype = None) -> nn.Module:
    """Builds a part's network in evaluation mode without gradients.

    `dtype` is a dtype or a name such as "int8" or "auto" (`pick_dtype`); None keeps the file's. In int8, linear layers
    are quantised and the rest has the dtype of `companion_dtype`.
    Raises ValueError for an unknown dtype, or that names the tensors that do not fit (`check_weights`).
    """
    torch.empty(0, device=device)  # a missing device is no damage of the file
    return _build_part(part, device, dtype)


@names_source
def _build_part(part: Part, device: Any, dtype: Dtype) -> nn.Module:
    if isinstance(dtype, str):
        allow_int8 = release_of_model([part.params]) != "v1"
        dtype = pick_dtype(dtype, torch.device(device), part.parameters, allow_int8=allow_int8)
    network, weights = build_outline(part, dtype), part.state_dict
    if dtype == torch.int8:
        weights = weights if kind_of(part.name) == TEXT_ENCODER else split_attention(weights)
        dtype = companion_dtype(torch.device(device))
    quantised = {f"{name}.weight": layer for name, layer in int8_layers(network)}
    state = {}
    for key, lazy in weights.items():
        lazy = LazyTensor.of(lazy)
        if key in quantised:  # from its own dtype, while it is the only one in memory
            tensors = {name: x.to(device) for name, x in layer_state(lazy).items()}
            quantised[key].load_state_dict(tensors, strict=False, assign=True)
        else:
            x = lazy.load()
            state[key] = x.to(device, dtype if x.is_floating_point() else None)
    network.load_state_dict(state, strict=not quantised, assign=True)
    return network.eval()


def build_outline(part: Part, dtype: torch.dtype | None = None) -> nn.Module:
    """Builds a part's network as `build_part`, but without weights: its tensors are on the meta device."""
    check_versions()
    check_weights(part)
    with torch.device("meta"):
        network = component(part.name).network(part.params).requires_grad_(False)  # before inference tensors join it
    if dtype == torch.int8:
        use_int8(network)
    return network.eval()


def load_prior(source: Path, *, device: Any = "cpu", dtype: Dtype = None, version: str = "auto") -> Prior:
    """Loads Stage C from a source (see `read_part`); `version` is its release if nothing else shows it."""
    return cast(Prior, build_part(open_part(source, "prior", version), device=device, dtype=dtype))


def load_decoder(source: Path, *, device: Any = "cpu", dtype: Dtype = None) -> Decoder:
    """Loads v2's Stage B from a source (see `read_part`)."""
    return cast(Decoder, build_part(open_part(source, "decoder"), device=device, dtype=dtype))


def load_token_decoder(source: Path, *, device: Any = "cpu", dtype: Dtype = None) -> TokenDecoder:
    """Loads v1's Stage B from a source (see `read_part`)."""
    return cast(TokenDecoder, build_part(open_part(source, "token_decoder"), device=device, dtype=dtype))


def load_vqgan(source: Path, *, device: Any = "cpu", dtype: Dtype = None) -> VQGAN:
    """Loads Stage A from a source (see `read_part`)."""
    return cast(VQGAN, build_part(open_part(source, "vqgan"), device=device, dtype=dtype))


def load_image_encoder(source: Path, *, device: Any = "cpu", dtype: Dtype = None) -> ImageEncoder:
    """Loads the semantic compressor from a source (see `read_part`)."""
    return cast(ImageEncoder, build_part(open_part(source, "image_encoder"), device=device, dtype=dtype))


def load_text_encoder(
    source: Path, *, which: Literal["prior", "decoder"] = "prior", device: Any = "cpu", dtype: Dtype = None
) -> TextEncoder:
    """Loads a stage's text tower from a source (see `read_part`); a lone tower serves as either."""
    part = open_part(source, f"{which}_{TEXT_ENCODER}")
    return cast(TextEncoder, build_part(part, device=device, dtype=dtype))


def load_control_net(source: Path, *, device: Any = "cpu", dtype: Dtype = None) -> ControlNet:
    """Loads a ControlNet for Stage C from a source (see `read_part`)."""
    return cast(ControlNet, build_part(open_part(source, "control_net"), device=device, dtype=dtype))
