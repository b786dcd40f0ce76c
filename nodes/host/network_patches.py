"""Patches that other nodes put into a MODEL's network: of attention, of blocks, and of whole blocks.

They are called as ComfyUI's own networks call them. The blocks of Stage C are those of a transformer, and its attention
blocks count as a U-Net's: the one at half the depth is `middle` 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...wuerstchen_core.models.attention import AttnBlock, KeysValues

STG = "stg_self_attn_blocks"  # LTXV's Spatio-Temporal Guidance: numbers of blocks that pass their values on
OVERRIDE = "optimized_attention_override"
SCALES = "wuerstchen_attention_scales"  # factors by the name of a weight, from attention_scales.py
# Keys that only other families read; set by ScaleROPE, WanAnimate2Cache, ARVideoI2V, Chroma's and LTXV's nodes.
FOREIGN = {
    "rope_options",
    "animate2_cache",
    "ar_config",
    "chroma_radiance_options",
    "a2v_cross_attn",
    "v2a_cross_attn",
}
HOOKS = ("patches", "patches_replace", OVERRIDE, STG, SCALES)  # keys of transformer_options that concern the network
Patch = Callable[..., Any]


class Patches:
    """The patches of the running call, shared by all blocks of a network."""

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None  # ComfyUI's transformer_options, or None without any patch
        self.inputs: dict[str, Any] = {}  # of the network
        self.skips: dict[int, Tensor] = {}  # by level: the features before a patch changed their size
        self.sampling = False  # all conditionings of the sampling node are encoded
        self.clear()

    def clear(self) -> None:
        """Forgets which patches were found, which of them a block used, and how often a wrapper let the network run."""
        self.calls = self.runs = 0
        self.found: set[Hashable] = set()
        self.used: set[Hashable] = set()

    @contextmanager
    def running(
        self, options: Mapping[str, Any] | None, shape_of: Callable[[Tensor], list[int]], inputs: dict[str, Any]
    ) -> Iterator[None]:
        """Makes ComfyUI's transformer_options those of the call in the block.

        `shape_of` returns the shape of the finest attention for latents, and `inputs` are the network's.
        """
        self.found |= FOREIGN & (options or {}).keys()
        if options is None or not any(options.get(key) for key in HOOKS):
            yield
            return
        self.inputs = inputs
        self.options = {**options, "original_shape": shape_of(inputs["x"]), "transformer_index": -1}
        self.found |= {name for name, patches in options.get("patches", {}).items() if patches}
        for name, blocks in options.get("patches_replace", {}).items():
            self.found |= {(name, *_key(block)) for block in blocks}
        self.found |= {(STG, block) for block in options.get(STG, ())}
        try:
            yield
        finally:
            self.options, self.inputs, self.skips = None, {}, {}

    def of(self, name: str) -> list[Patch]:
        """Returns the patches of a name, such as `attn1_patch`."""
        found = (self.options or {}).get("patches", {}).get(name, [])
        if found:
            self.used.add(name)
        return found

    def replacement(self, name: str, *blocks: Hashable) -> Patch | None:
        """Returns what replaces the first of the given blocks that has a replacement."""
        replaced = (self.options or {}).get("patches_replace", {}).get(name, {})
        for block in blocks:
            if block in replaced:
                self.used.add((name, *_key(block)))
                return replaced[block]
        return None


def _key(block: Any) -> tuple[Any, ...]:
    return tuple(block[:2])  # a third entry is the number of a transformer within the block


class NamesMissing:
    """Mixin for modules of which other nodes read attributes: says that another model has those it lacks."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            raise AttributeError(
                f"Würstchen's models have no {name!r}: the node that reads it is made for another model family"
            ) from None


class PatchableAttnBlock(AttnBlock):
    """An attention block that runs patches of other nodes.

    `attn1` is the attention of the image to itself, `attn2` to the text; both are one softmax here. What replaces one
    of them gets its queries, keys and values [B, N, c], and its result counts by the softmax's sum over its keys.
    """

    patches: Patches
    name = ""  # of this module in the MODEL's state dict
    place = ("middle", 0)  # as in a U-Net
    number = 0  # among the network's attention blocks

    def forward(self, x: Tensor, cond: Tensor | KeysValues, mask: Tensor | None = None) -> Tensor:
        options = self.patches.options
        if options is None or isinstance(cond, KeysValues) or mask is not None or not self.self_attn:
            return super().forward(x, cond, mask)
        options["block"], options["block_index"] = self.place, self.number
        options["transformer_index"] += 1
        options["activations_shape"] = list(x.shape)
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, c]
        out = self._attend(tokens, self.kv_mapper(cond).to(tokens.dtype), options)
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _attend(self, tokens: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        attention: Any = self.attention
        heads = attention.nhead
        extra = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
        extra |= {"n_heads": heads, "dim_head": tokens.shape[-1] // heads, "attn_precision": None}
        image, text_keys, text_values = (tokens, tokens, tokens), text, text
        for patch in self.patches.of("attn1_patch"):
            out = patch(*image, extra)
            image = tuple(map(out.get, "qkv", image)) if isinstance(out, dict) else out  # a dict as in Flux's networks
        text_queries = image[0]
        for patch in self.patches.of("attn2_patch"):
            text_queries, text_keys, text_values = patch(text_queries, text_keys, text_values, extra)
        queries = attention.to_q(image[0])
        text_q = queries if text_queries is image[0] else attention.to_q(text_queries)
        q, k, v = self._scaled("attn1", queries, attention.to_k(image[1]), attention.to_v(image[2]))
        text_q, text_k, text_v = self._scaled("attn2", text_q, attention.to_k(text_keys), attention.to_v(text_values))
        if len(q) != len(k):  # a patch cut the queries into tiles: as in ComfyUI, each gets a band of the keys
            k, v = (x.reshape(len(q), -1, x.shape[-1]) for x in (k, v))
            text_k, text_v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (text_k, text_v))
        out = attention.out(self._joint(q, k, v, text_q, text_k, text_v, extra))
        for patch in self.patches.of("attn1_output_patch"):
            out = patch(out, extra)
        return out

    def _scaled(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Multiplies queries, keys and values, the last also by the output's factor."""
        scales = (self.patches.options or {}).get(SCALES)
        if not scales:
            return q, k, v
        by = [scales.get(f"{self.name}.{kind}.{layer}.weight", 1.0) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
        return q * by[0], k * by[1], v * (by[2] * by[3])

    def _joint(
        self, q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        blocks = ((*self.place, 0), self.place)
        image_patch, text_patch = (self.patches.replacement(name, *blocks) for name in ("attn1", "attn2"))
        if self.number in extra.get(STG, ()):
            self.patches.used.add((STG, self.number))
            image_patch = _pass_values
        keys, values = torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)
        if image_patch is None and text_patch is None:
            return self._softmax(q, text_q, keys, values, k.shape[1], extra)
        parts = [
            self._softmax(queries, queries, own_keys, own_values, 0, extra)
            if patch is None
            else patch(queries, own_keys, own_values, extra)
            for patch, queries, own_keys, own_values in (
                (image_patch, q, k, v),
                (text_patch, text_q, text_k, text_v),
            )
        ]
        of_text = torch.zeros_like(values)
        of_text[:, k.shape[1] :] = 1
        weight = self._softmax(q, text_q, keys, of_text, k.shape[1], {})  # the softmax's sum over the text
        return parts[0].lerp(parts[1], weight)

    def _softmax(
        self, q: Tensor, text_q: Tensor, keys: Tensor, values: Tensor, image_keys: int, extra: dict[str, Any]
    ) -> Tensor:
        """Returns attention [B, N, c]; the first `image_keys` keys have the queries q, the others text_q."""
        heads, same = self.attention.nhead, q is text_q
        if same and extra.get(OVERRIDE) is not None:
            return optimized_attention(q, keys, values, heads, transformer_options=extra)
        scale = (q.shape[-1] // heads) ** -0.5
        q, text_q, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, text_q, keys, values))
        if not same:  # one product over both: each part is zero at the other's
            zero = torch.zeros_like(keys)
            of_image = torch.cat([keys[:, :, :image_keys], zero[:, :, image_keys:]], dim=2)
            of_text = torch.cat([zero[:, :, :image_keys], keys[:, :, image_keys:]], dim=2)
            q, keys = torch.cat([q, text_q], dim=-1), torch.cat([of_image, of_text], dim=-1)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale).transpose(1, 2).flatten(2)


def _pass_values(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    return v


def resized(x: Tensor, size: Any) -> Tensor:
    """Returns x [B, c, H, W] at another size, bilinear."""
    return x if x.shape[2:] == size else F.interpolate(x, size=tuple(size), mode="bilinear")
