"""What `precision` measures: the networks of the golden data, of the shipped models and of the released sizes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wuerstchen_core.checkpoints import Part, read_part
from wuerstchen_core.checkpoints.components import COMPONENTS
from wuerstchen_core.checkpoints.source import to_ours
from wuerstchen_core.checkpoints.weight_files import read_weight_file
from wuerstchen_core.demo.artwork import draw_all
from wuerstchen_core.demo.vocabulary import caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import (
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    ImageEncoder,
    ImageEncoderParams,
    semantic_view,
)
from wuerstchen_core.models.prior import Prior, PriorParams, latents_from_features
from wuerstchen_core.models.text_encoder import tokenize
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams

from .evaluate import held_out_scenes

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """A network and what it is called with, in fp32."""

    name: str
    part: Part
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor] = lambda network, *inputs: network(*inputs)  # noqa: E731
    kept: tuple[int, ...] = ()  # the inputs that stay in fp32


def golden_cases() -> Iterator[Case]:
    """The small networks of the golden data, whose weights are random and each of weight."""
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
        given = tuple(tensors[f"in/{key}"] for key in inputs)
        call = _decode if name == "vqgan" else Case.call
        yield Case(name, Part(name, params, state), given, call, kept=(1, 2) if "decoder" in name else (1,))


def golden_image_encoders() -> Iterator[Case]:
    """v2's image encoder and v1's, which are of the released size, with the golden data's weights."""
    images = _golden("effnet_procedural")["in/x"]
    for name, stages in (("image_encoder", EFFICIENTNET_V2_S), ("image_encoder, v1", EFFICIENTNET_V2_L)):
        sizes = ImageEncoderParams(stages)
        with torch.device("meta"):
            shapes = ImageEncoder(sizes).state_dict()
        state = {key: hashed_weight(key, tuple(x.shape)) for key, x in shapes.items()}
        yield Case(name, Part("image_encoder", sizes, state), (images,))


def _golden(file: str) -> dict[str, Tensor]:
    return read_weight_file(GOLDEN / f"{file}.safetensors").states[""]


def hashed(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that depend on the key and the position alone (the golden data's recipe)."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(key.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return torch.from_numpy((x / 2**31 - 1).astype(np.float32)).view(shape)


def hashed_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The golden image encoder's weight of that key in our names, which are the original's."""
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


def _read(network: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return network(ids, mask)


@torch.inference_mode()
def shipped_cases(model: str) -> Iterator[Case]:
    """The networks of "demo", or those that only "demo-v1" has, on held-out pictures and captions, half noised."""
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
    yield Case("prior", read_part(model, "prior"), (latents, time, text), kept=(1,))
    if pipe.token_decoder is not None:
        tokens = pipe.vqgan.quantize(codes).indices
        other = torch.randint(pipe.vqgan.params.codebook_size, tokens.shape, generator=draw)
        tokens = torch.where(torch.rand(tokens.shape, generator=draw) < 0.5, tokens, other)
        yield Case("token_decoder", read_part(model, "token_decoder"), (tokens, time, features, text), kept=(1, 2))
        return
    inputs = (noised(codes / pipe.vqgan.params.scale_factor), time, features, text)
    yield Case("decoder", read_part(model, "decoder"), inputs, kept=(1, 2))
    yield Case("vqgan", read_part(model, "vqgan"), (codes,), _decode)
    yield Case("image_encoder", read_part(model, "image_encoder"), (semantic_view(images),))
    tower = replace(read_part(model, "prior_text_encoder"), name="text_encoder")
    yield Case("text_encoder", tower, tokenize(captions), _read, kept=(0, 1))


def released_size(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network as large as the released one, its weights drawn as the original draws them, and inputs for 128x128.

    What starts from zero is drawn at 0.02 and the GRNs' gains are 1, so that every layer counts.
    """
    torch.manual_seed(0)
    network: Any = {
        "prior": lambda: Prior(PriorParams()),
        "decoder": lambda: Decoder(DecoderParams()),
        "token_decoder": lambda: TokenDecoder(TokenDecoderParams()),
    }[kind]()
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
