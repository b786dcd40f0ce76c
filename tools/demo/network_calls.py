"""The network calls that `precision` measures: golden data, shipped models, released sizes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from wuerstchen_core.checkpoints import Part, read_part
from wuerstchen_core.checkpoints.components import COMPONENTS
from wuerstchen_core.checkpoints.source import to_ours
from wuerstchen_core.demo.artwork import draw_all
from wuerstchen_core.demo.vocabulary import caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import (
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    ImageEncoder,
    ImageEncoderParams,
    semantic_view,
)
from wuerstchen_core.models.prior import latents_from_features
from wuerstchen_core.models.text_encoder import tokenize

from ..golden_files import golden_file
from .evaluate import held_out_scenes


@dataclass(frozen=True)
class NetworkCall:
    """A network and its inputs in fp32."""

    name: str
    part: Part
    inputs: tuple[Tensor, ...]
    forward: Callable[..., Tensor] = lambda network, *inputs: network(*inputs)  # noqa: E731
    fp32_inputs: tuple[int, ...] = ()  # indices of the inputs that are never cast


def golden_calls() -> Iterator[NetworkCall]:
    """Yields the small networks of the golden data; in these random weights every layer affects the output."""
    names = {
        "prior": ("prior_small", ("x_24", "r_24", "c_24")),
        "decoder": ("diffnext_small", ("x", "r_tmix", "effnet", "clip")),
        "token_decoder": ("paella_small", ("x", "r_tmix", "effnet", "byt5")),
        "vqgan": ("vqmodel_small", ("z",)),
    }
    heads: dict[str, Any] = {"prior": 4, "decoder": (-1, 4, 6), "token_decoder": (-1, 4, 6)}
    for name, (file, inputs) in names.items():
        tensors = _golden(file)
        _, state = to_ours(
            {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}
        )
        params = COMPONENTS[name].infer_params(state, **({"nhead": heads[name]} if name in heads else {}))
        values = tuple(tensors[f"in/{key}"] for key in inputs)
        forward = _decode if name == "vqgan" else NetworkCall.forward
        fp32_inputs = (1, 2) if "decoder" in name else (1,)
        yield NetworkCall(name, Part(name, params, state), values, forward, fp32_inputs)


def golden_image_encoders() -> Iterator[NetworkCall]:
    """Yields v2's and v1's image encoders at the released sizes with the golden data's weights."""
    images = _golden("effnet_procedural")["in/x"]
    for name, stages in (("image_encoder", EFFICIENTNET_V2_S), ("image_encoder, v1", EFFICIENTNET_V2_L)):
        sizes = ImageEncoderParams(stages)
        with torch.device("meta"):
            shapes = ImageEncoder(sizes).state_dict()
        state = {key: hashed_weight(key, tuple(x.shape)) for key, x in shapes.items()}
        yield NetworkCall(name, Part("image_encoder", sizes, state), (images,))


def _golden(file: str) -> dict[str, Tensor]:
    return safetensors.torch.load(golden_file(file))


def hashed(key: str, shape: tuple[int, ...]) -> Tensor:
    """Returns numbers in [-1, 1) that depend only on the key and the index, as in the golden data."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(key.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return torch.from_numpy((x / 2**31 - 1).astype(np.float32)).view(shape)


def hashed_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Returns the golden image encoder's weight for a key of our state dict."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    u = hashed(key, shape)
    if key.endswith("running_mean"):
        return 0.2 * u
    if key.endswith("running_var"):
        return 1 + 0.5 * u
    if len(shape) == 1:
        return 0.1 * u if key.endswith("bias") else 1 + 0.2 * u
    return u * (3 / np.prod(shape[1:])) ** 0.5


def _decode(network: Any, latents: Tensor) -> Tensor:
    return network.decode(latents)


@torch.inference_mode()
def shipped_calls(model: str) -> Iterator[NetworkCall]:
    """Yields the networks of "demo", or those that only "demo-v1" has, with noised held-out images and captions."""
    pipe = WuerstchenPipeline.load(model, device="cpu", dtype="fp32")
    assert pipe.image_encoder is not None and pipe.vqgan is not None and pipe.prior is not None
    scenes = held_out_scenes(pipe.metadata)
    scenes = scenes[:: len(scenes) // 14]
    images = torch.from_numpy(draw_all(scenes)).permute(0, 3, 1, 2).float() / 255
    captions = [caption(scene) for scene in scenes]
    text, _ = pipe.encode_text(captions)
    features = pipe.image_encoder(semantic_view(images))
    codes = pipe.vqgan.encode(images)
    draw = torch.Generator().manual_seed(0)
    time = torch.full((len(scenes),), 0.5)

    def noised(x: Tensor) -> Tensor:
        return (x + torch.randn(x.shape, generator=draw)) * 0.5**0.5

    latents = noised(latents_from_features(features, pipe.prior.params))
    yield NetworkCall("prior", read_part(model, "prior"), (latents, time, text), fp32_inputs=(1,))
    if pipe.token_decoder is not None:
        tokens = pipe.vqgan.quantize(codes).indices
        other = torch.randint(pipe.vqgan.params.codebook_size, tokens.shape, generator=draw)
        tokens = torch.where(torch.rand(tokens.shape, generator=draw) < 0.5, tokens, other)
        yield NetworkCall(
            "token_decoder", read_part(model, "token_decoder"), (tokens, time, features, text), fp32_inputs=(1, 2)
        )
        return
    inputs = (noised(codes / pipe.vqgan.params.scale_factor), time, features, text)
    yield NetworkCall("decoder", read_part(model, "decoder"), inputs, fp32_inputs=(1, 2))
    yield NetworkCall("vqgan", read_part(model, "vqgan"), (codes,), _decode)
    yield NetworkCall("image_encoder", read_part(model, "image_encoder"), (semantic_view(images),))
    tower = replace(read_part(model, "prior_text_encoder"), name="text_encoder")
    yield NetworkCall("text_encoder", tower, tokenize(captions))


def released_size(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a network of the released size, initialised as in the original code, and inputs for 128x128 pixels.

    Weights that start at zero are drawn with a deviation of 0.02 and GRN gains are 1, so that every layer matters.
    """
    torch.manual_seed(0)
    component = COMPONENTS[kind]
    network: Any = component.network(component.params())
    network.init_weights()
    with torch.no_grad():
        for name, x in network.named_parameters():
            if name.endswith("gamma"):
                x.fill_(1.0)
            elif not x.any():
                x.normal_(std=0.02)
    features, time = 3 * torch.randn(1, 16, 3, 3), torch.tensor([0.5])
    inputs = {
        "prior": (torch.randn(1, 16, 3, 3), time, torch.randn(1, 77, 1280)),
        "decoder": (torch.randn(1, 4, 32, 32), time, features, torch.randn(1, 77, 1024)),
        "token_decoder": (torch.randint(8192, (1, 32, 32)), time, features, torch.randn(1, 77, 1024)),
    }[kind]
    return network.eval().requires_grad_(False), inputs
