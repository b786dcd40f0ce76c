"""A text encoder as part of the network that is trained: its states are computed in every step, with gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.operations import Operations
from ...models.text_encoder import SelfAttention, TextEncoder
from ..data.caption_tokens import pad_states
from ..rng import StepRandom
from ..stage import N
from .diffusion import TEXT_ENCODER, DiffusionStage


class SeparateAttention(SelfAttention):
    """`SelfAttention` with one linear layer per projection, as in transformers, for adapters to wrap.

    peft can adapt the packed projections, but at each step it adds the adapters to the frozen weights and subtracts
    them again, and the rounding errors accumulate in the weights.
    """

    def __init__(self, packed: SelfAttention):
        width = packed.in_proj_bias.shape[0] // 3
        super().__init__(width, packed.heads, device="meta")
        self.q_proj, self.k_proj, self.v_proj = (Operations.Linear(width, width, device="meta") for _ in range(3))
        self.out_proj = packed.out_proj
        thirds = zip(packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
        for layer, (weight, bias) in zip((self.q_proj, self.k_proj, self.v_proj), thirds, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        del self.in_proj_weight, self.in_proj_bias

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def attach_text_encoder(net: nn.Module, text_encoder: TextEncoder) -> None:
    """Makes a text encoder a submodule of a network, which then also accepts tokens [2, B, n, 77] (ids, mask) as text.

    `net` is a prior or a Stage B.
    """
    for block in list[Any](text_encoder.transformer.resblocks):
        block.attn = SeparateAttention(block.attn)
    position = list(inspect.signature(net.forward).parameters).index("text")

    def encode_tokens(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        text = inputs[position]
        if isinstance(text, Tensor) and not text.is_floating_point():
            states = net.get_submodule(TEXT_ENCODER)(*text.flatten(1, 2))
            text = states.unflatten(0, text.shape[1:3]).flatten(1, 2)
        return *inputs[:position], text, *inputs[position + 1 :]

    net.add_module(TEXT_ENCODER, text_encoder)
    net.register_forward_pre_hook(encode_tokens)


def train_only(net: nn.Module) -> None:
    """Reduces a network's state dict to the parameters that require gradients now."""
    trained = {name for name, p in net.named_parameters() if p.requires_grad}

    def drop_frozen(net: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.removeprefix(prefix) not in trained]:
            del state[key]

    def expect_trained(net: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in trained]

    net.register_state_dict_post_hook(drop_frozen)
    net.register_load_state_dict_post_hook(expect_trained)


class TextTowerStage(DiffusionStage[N]):
    """A stage whose network may have the text encoder as a submodule, which gets tokens instead of states then."""

    def text_inputs(self) -> Callable[[Any, StepRandom, float], tuple[Tensor, Tensor | None]]:
        if not hasattr(self.net, TEXT_ENCODER):
            return super().text_inputs()

        def tokens(picked: Any, rng: StepRandom, drop: float) -> tuple[Tensor, Tensor | None]:
            """Returns tokens [2, B, n, 77], and the mask [B, 77 n] of their states."""
            rows = [torch.stack(x, dim=1) for x in self.dataset.tokenizer(self.dataset.captions(picked, rng, drop))]
            padded, mask = pad_states(rows)  # [B, n, 2, 77], [B, n]
            length = padded.shape[-1]
            return padded.permute(2, 0, 1, 3), None if mask is None else mask.repeat_interleave(length, dim=1)

        return tokens
