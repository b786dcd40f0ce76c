"""The core's networks built from ComfyUI's layers and called with ComfyUI's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...wuerstchen_core.common.text import listed
from ...wuerstchen_core.kernels.dispatch import HasWeights
from ...wuerstchen_core.kernels.int8 import packed_linear
from ...wuerstchen_core.kernels.linear import linear, uses_onednn
from ...wuerstchen_core.models.attention import Attention, KeysValues
from ...wuerstchen_core.models.decoder import Decoder
from ...wuerstchen_core.models.feature_reuse import DeepFeatures
from ...wuerstchen_core.models.layers import GlobalResponseNorm
from ...wuerstchen_core.models.prior import KVCache, Prior
from ...wuerstchen_core.models.token_decoder import TokenDecoder
from ...wuerstchen_core.models.unet import Block
from .feature_reuse import deep_features
from .int8 import Int8Layer, dequantised
from .network_patches import NamesMissing, PatchableAttnBlock, Patches, resized

CONTROL = "wuerstchen"  # key of what our ControlNets add, in ComfyUI's `control`


class CastGlobalResponseNorm(GlobalResponseNorm):
    """Moves its parameters to the input's device and dtype, since ComfyUI's partial load offloads only layers."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cast = comfy.model_management.cast_to_device  # without waiting for the device
        copy = torch.is_grad_enabled()  # autograd saves no tensors of inference mode, in which nodes load models
        return cast(self.gamma, x.device, x.dtype, copy), cast(self.beta, x.device, x.dtype, copy)


class BypassByWeight:
    """Mixin for layers: applies an adapter in ComfyUI's bypass mode to a copy of the weight at each call.

    ComfyUI replaces a layer's `forward` and adds the adapter's output, which fails for grouped and for transposed
    convolutions and gives another result than a patched weight for OFT.
    """

    weight_function: list[Callable[[Tensor], Tensor]]
    bypass_functions: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            hook = getattr(value, "__self__", None)
            if hasattr(hook, "adapter"):
                self.bypass_functions = (*self.bypass_functions, _weight_function(hook))
                self.weight_function = self.weight_function
                return
            before, self.bypass_functions = self.bypass_functions, ()
            self.weight_function = [f for f in self.weight_function if f not in before]
        elif name == "weight_function":  # a new list whenever the layer is loaded
            value = [*value, *(f for f in self.bypass_functions if f not in value)]
        super().__setattr__(name, value)


def _weight_function(hook: Any) -> Callable[[Tensor], Tensor]:
    """Returns a function that applies the adapter of a ComfyUI bypass hook to a weight."""
    if isinstance(hook.adapter, nn.Module):  # in training
        return hook.adapter
    return lambda weight: hook.adapter.calculate_weight(
        weight.clone(), "", hook.multiplier, 1.0, offset=None, function=lambda change: change
    )


def castable(operations: Any) -> Any:
    """Returns ComfyUI's layer namespace extended by our layers, in a form that ComfyUI can cast and offload."""

    class Cast(BypassByWeight, HasWeights):
        """Gives kernels the weights. They run on a CPU, so that no stream copies these, which would be released later.

        On other devices ComfyUI's own layers compute, which overlap the copying of offloaded weights with computing.
        """

        def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            weight, bias = comfy.ops.cast_bias_weight(self, x)
            return dequantised(weight), bias

    int8 = (Int8Layer,) if hasattr(operations.Linear, "set_weight") else ()

    class Linear(*int8, Cast, operations.Linear):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if (out := packed_linear(self, x)) is not None:
                return out
            return linear(x, *self.weights(x)) if uses_onednn(x) else super().forward(x)

    class Conv2d(Cast, operations.Conv2d):
        pass

    class ConvTranspose2d(BypassByWeight, operations.ConvTranspose2d):
        pass

    class Embedding(operations.Embedding):
        """Casts fp8 weights to fp32: integer tokens tell ComfyUI no dtype to compute in."""

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens, out_dtype=torch.float32)

    # Attention has q, k and v as separate layers: the original's packed matrix is a bare parameter, never offloaded.
    own = {
        "GlobalResponseNorm": CastGlobalResponseNorm,
        "PackedAttention": Attention,
        "AttnBlock": PatchableAttnBlock,
        "Linear": Linear,
        "Conv2d": Conv2d,
        "ConvTranspose2d": ConvTranspose2d,
        "Embedding": Embedding,
    }
    return type("Operations", (operations,), own)


class HostNetwork(NamesMissing, nn.Module):
    """Mixin that gives a network of the core ComfyUI's constructor and arguments, and runs other nodes' patches.

    `predict` calls the core's network with the arguments of `forward`.
    """

    in_channels: int  # of the latents

    def __init__(self, params: Any, *, operations: Any, device: Any = None, dtype: Any = None, **_: Any):
        super().__init__(params, operations=castable(operations), device=device, dtype=dtype)
        self.dtype = dtype
        self.patches = Patches()
        for number, (name, block) in enumerate(self.attention_blocks().items()):
            block.patches, block.name, block.number = self.patches, f"diffusion_model.{name}", number
            block.place = self.place(name, number)

    def attention_blocks(self) -> dict[str, PatchableAttnBlock]:
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, PatchableAttnBlock)}

    def place(self, name: str, number: int) -> tuple[str, int]:
        """Returns an attention block's place in a U-Net, such as `middle` 0, from its name and number."""
        raise NotImplementedError

    def patch_shape(self, x: Tensor) -> list[int]:
        """Returns the shape [B, c, H, W] whose H W are the tokens of the finest attention."""
        raise NotImplementedError

    def blocks_in_words(self) -> str:
        """Returns the blocks that patches can name, for users."""
        raise NotImplementedError

    def predict(self, x: Tensor, timestep: Tensor, context: Tensor, **conds: Any) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Tensor:
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options or {})
        if not wrappers:
            return self._run(x, timestep, context, control, transformer_options, **conds)
        counted = not torch.compiler.is_compiling()  # a graph would depend on the numbers
        self.patches.calls += counted

        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.patches.runs += counted
            return self._run(*args, **kwargs)

        executor = WrapperExecutor.new_class_executor(run, self, wrappers)
        return executor.execute(x, timestep, context, control, transformer_options, **conds)

    def _run(
        self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, transformer_options: Any, **conds: Any
    ) -> Tensor:
        inputs = {"x": x, "timesteps": timestep, "context": context, "emb": None, "y": None}
        with self.patches.running(transformer_options, self.patch_shape, inputs):
            return self.predict(x, timestep, context, control=control, **conds)


class HostPrior(HostNetwork, Prior):  # type: ignore[misc]
    """Stage C."""

    kv_cache: KVCache | None = None  # ComfyUI passes the same text in a new tensor at each step

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        return self.params.c_in

    def place(self, name: str, number: int) -> tuple[str, int]:
        middle = self.params.depth // 2
        if number == middle:
            return "middle", 0
        return ("input", number) if number < middle else ("output", number - middle - 1)

    def patch_shape(self, x: Tensor) -> list[int]:
        return list(x.shape)

    def blocks_in_words(self) -> str:
        return f"double_block 0 to {self.params.depth - 1} (for attention: input, middle and output blocks)"

    def predict(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any = None, **_: Any) -> Tensor:
        cached = not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and self.patches.options is None
        text = self.kv_cache(context) if cached and self.kv_cache is not None else context
        return Prior.forward(self, x, timestep, text, control=control[CONTROL] if control else ())

    def run_block(
        self, index: int, x: Tensor, time: Tensor, cond: Tensor | KeysValues, mask: Tensor | None = None
    ) -> Tensor:
        replaced = self.patches.replacement("dit", ("double_block", index))
        if replaced is None:
            return super().run_block(index, x, time, cond, mask)
        size = x.shape[2:]

        def original(args: dict[str, Any]) -> dict[str, Any]:
            out = Prior.run_block(self, index, to_image(args["img"], size), args["vec"], args["txt"])
            return {**args, "img": to_tokens(out)}

        args = {"img": to_tokens(x), "txt": cond, "vec": time, "pe": None, "attn_mask": None}
        out = replaced({**args, "transformer_options": self.patches.options}, {"original_block": original})
        return to_image(out["img"], size)

    @contextmanager
    def caching_keys_values(self) -> Iterator[None]:
        """Computes keys and values once per text; the weights must not change meanwhile."""
        self.kv_cache = KVCache(self)
        try:
            yield
        finally:
            self.kv_cache = None


def to_tokens(x: Tensor) -> Tensor:
    """Converts [B, c, H, W] to [B, H W, c]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, size: Any) -> Tensor:
    """Converts [B, H W, c] to [B, c, H, W] of a size (H, W)."""
    return tokens.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


class HostStageB(HostNetwork):
    """Mixin for Stage B; ComfyUI passes Stage C's latents under Stable Cascade's name."""

    in_channels = 4

    def place(self, name: str, number: int) -> tuple[str, int]:
        way, level, layer = name.split(".")
        depth = len(self.down_blocks)
        level_number = int(level) + (depth if way == "up_blocks" else 0)
        return next(
            (block.kind, block.number)
            for block in self.blocks
            if block.level == level_number and block.start <= int(layer) < block.stop
        )

    def patch_shape(self, x: Tensor) -> list[int]:
        attended = [int(name.split(".")[1]) for name in self.attention_blocks() if name.startswith("down_blocks")]
        factor = self.params.patch_size << min(attended, default=0)
        return [len(x), x.shape[1], *(side // factor for side in x.shape[-2:])]

    def blocks_in_words(self) -> str:
        last = {block.kind: block.number for block in self.blocks}
        attended = [f"{kind} {number}" for kind, number in (block.place for block in self.attention_blocks().values())]
        return (
            f"input 0 to {last['input']}, middle 0 and output 0 to {last['output']}, with attention in "
            f"{listed(attended, most=100)}"
        )

    def _run(
        self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, transformer_options: Any, **conds: Any
    ) -> Tensor:
        deep = deep_features(transformer_options, x)
        return super()._run(x, timestep, context, control, transformer_options, deep=deep, **conds)

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        stable_cascade_prior: Tensor | None = None,
        deep: DeepFeatures | None = None,
        **_: Any,
    ) -> Tensor:
        return super(HostNetwork, self).forward(x, timestep, stable_cascade_prior, context, deep=deep)

    def join(self, block: Block, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        if self.patches.options is None:
            return x, skip
        self.patches.options["block"] = (block.kind, block.number)
        for patch in self.patches.of("output_block_patch"):
            x, skip = patch(x, skip, self.patches.options)
        return resized(x, skip.shape[2:]), skip

    def finish(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        options, whole = self.patches.options, x
        if options is None:
            return x, x
        options["block"] = (block.kind, block.number)
        if block.kind == "middle":
            for patch in self.patches.of("middle_block_after_patch"):
                x = patch({**self.patches.inputs, "h": x, "transformer_options": options})["h"]
        if block.kind != "input":
            return x, x
        for patch in self.patches.of("input_block_patch"):
            x = patch(x, options)
        saved = x
        for patch in self.patches.of("input_block_patch_after_skip"):
            x = patch(x, options)
        if x.shape != whole.shape:
            self._check_shrunk(block, x)
            self.patches.skips.setdefault(block.level, whole)
        return x, self.patches.skips.get(block.level, saved)

    def _check_shrunk(self, block: Block, x: Tensor) -> None:
        coarser = 1 << len(self.down_blocks) - 1 - block.level
        if min(x.shape[2:]) < coarser:
            raise ValueError(
                f"a node shrinks Stage B's features at input block {block.number} to {x.shape[3]}x{x.shape[2]}, but "
                f"the network halves them to {coarser} times less: choose a smaller factor or a larger image"
            )


class HostDecoder(HostStageB, Decoder):  # type: ignore[misc]
    """Stage B of v2."""


class HostTokenDecoder(HostStageB, TokenDecoder):  # type: ignore[misc]
    """Stage B of v1, with the attention keys of the other networks."""
