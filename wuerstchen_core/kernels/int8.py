"""Linear layers in int8 (W8A8): weights with one scale per output channel, inputs quantised at each call.

On CPUs with VNNI, oneDNN multiplies uint8 inputs by packed int8 weights: three to four times fp32's speed. A zero point
uses all 256 steps between an input's smallest and largest number, which halves the error of a symmetric scale. One
scale per call is as exact as one per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.devices import has_int8
from .dispatch import HasWeights, inference_on_cpu
from .linear import linear, refuse_second_order

# The operators that inductor calls. They are private to torch: where they are missing, weights are restored instead.
_PREPACK = getattr(torch.ops.onednn, "qlinear_prepack", None)
_PRODUCT = getattr(torch.ops.onednn, "qlinear_pointwise", None)
_STEPS = 254  # of 255: a rounded zero point never carries a number beyond 255, which makes clamping unnecessary
_ROWS = 128  # quantised at a time, which fit the cache
_FEWEST_ROWS = 32  # of an input on a GPU: `torch._int_mm` takes no less than 17


def multiplies_int8(x: Tensor) -> bool:
    """True if layers compute with x [..., c] in int8 by oneDNN."""
    return x.numel() > 0 and x.dtype != torch.float64 and inference_on_cpu(x) and has_int8()


class Quantized(NamedTuple):
    """Numbers [N, c] in uint8 that stand for (values - zero) * scale."""

    values: Tensor
    scale: float
    zero: int


def _range(low: float, high: float) -> tuple[float, int]:
    """Returns the scale and the zero point of numbers from `low` to `high`; 0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _STEPS or 1.0
    return scale, round(-low / scale)


def quantize(x: Tensor) -> Quantized | None:
    """Quantises x [N, c]; returns None if it holds NaN or infinity."""
    low, high = (float(bound) for bound in x.aminmax())
    if not math.isfinite(high - low):
        return None
    scale, zero = _range(low, high)
    values, rounded = torch.empty(x.shape, dtype=torch.uint8), torch.tensor(zero + 0.5)
    for part, out in zip(x.split(_ROWS), values.split(_ROWS), strict=True):
        # By way of int16, torch casts to uint8 in a fifth of the time.
        out.copy_(torch.add(rounded, part.float(), alpha=1 / scale).to(torch.int16))
    return Quantized(values, scale, zero)


class ScaledHidden:
    """The hidden numbers of an MLP between GELU and its second layer: [N, c] in chunks, scaled and shifted by channel.

    The largest number of each channel gives the range without a further pass, since GELU has a smallest number.
    """

    GELU_MIN = -0.17

    def __init__(self, chunks: list[Tensor]):
        self.chunks = chunks
        self._largest = torch.stack([part.amax(dim=(0, 1, 2)) for part in self.parts()]).amax(dim=0)

    def parts(self) -> Iterator[Tensor]:
        """Yields all numbers in parts [1, 1, n, c] that fit the cache."""
        return (part[None, None] for chunk in self.chunks for part in chunk.split(_ROWS))

    def quantize(self, factor: Tensor, shift: Tensor) -> list[Quantized] | None:
        """Returns the chunks times `factor` [c] plus `shift` [c], with one scale; None if they are not finite."""
        ends = torch.stack([torch.addcmul(shift, factor, end) for end in (self._largest, torch.tensor(self.GELU_MIN))])
        low, high = (float(bound) for bound in ends.aminmax())
        if not math.isfinite(high - low):
            return None
        scale, zero = _range(low, high)
        factor, shift = factor / scale, shift / scale + (zero + 0.5)
        out = []
        for chunk in self.chunks:
            values = torch.empty(chunk.shape, dtype=torch.uint8)
            for part, target in zip(chunk.split(_ROWS), values.split(_ROWS), strict=True):
                target.copy_(torch.addcmul(shift, part, factor).to(torch.int16))
            out.append(Quantized(values, scale, zero))
        return out


class PackedWeight:
    """The first columns of an int8 weight [c_out, c_in] in oneDNN's order, and the others as they are.

    The others multiply the latents that join Stage B's MLPs: 16 channels, which must be multiplied in fp32, for in int8
    they alone would cause nine tenths of the error. `bias` is in fp32.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, columns: int):
        self._packed = _PREPACK(weight[:, :columns].contiguous(), None)  # type: ignore[misc]
        self._others = weight[:, columns:].clone()
        self._scale = scale.flatten().contiguous()
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._joined: tuple[Any, ...] | None = None
        self.columns = columns
        self.bias = None if bias is None else bias.float()

    def unpack(self) -> Tensor:
        """Returns the weight [c_out, c_in] in int8."""
        return torch.cat([self._packed.to_dense().t(), self._others], dim=1)

    def row_sums(self) -> Tensor:
        """Returns the sums [c_out] of the first columns, in fp32."""
        return self._packed.to_dense().sum(dim=0) * self._scale

    def product(
        self,
        x: Quantized,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        gelu: bool = False,
        factor: float = 1.0,
    ) -> Tensor:
        """Returns x times the weight times `factor`, plus `bias` (default: its own); GELU if `gelu`; in `dtype`."""
        post: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
        bias = self.bias if bias is None else bias
        out: Tensor = _PRODUCT(  # type: ignore[misc]
            x.values, x.scale * factor, x.zero, self._packed, self._scale, self._zeros, bias, 1.0, 0, dtype, *post
        )
        return out

    def joined(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Merges a 1x1 convolution [c_others, c, 1, 1] into the other columns; returns a weight [c, c_out], a bias.

        The result is kept while the numbers stay the same. They are compared, since tensors of inference mode do not
        count their changes.
        """
        sources = [x.float() for x in (weight, bias, self.bias) if x is not None]
        joined = self._joined
        if joined is None or not all(map(torch.equal, sources, joined[0])):
            others = self._others.float() * self._scale[:, None]
            weight = (others @ sources[0].flatten(1)).t().contiguous()
            offset = others @ sources[1]
            offset = offset if self.bias is None else offset + self.bias
            joined = self._joined = [x.clone() for x in sources], weight, offset
        return joined[1], joined[2]


def packed_linear(layer: HasWeights, x: Tensor) -> Tensor | None:
    """Returns a layer of x [..., c_in] computed by oneDNN; None if the layer, x or the processor is not suited."""
    if not multiplies_int8(x) or (packed := layer.packed()) is None:
        return None
    quantized = quantize(x.reshape(-1, x.shape[-1]))
    if quantized is None:
        return None
    out: Tensor = packed.product(quantized, x.dtype)
    return out.view(*x.shape[:-1], -1)


def int8_linear(layer: Any, x: Tensor) -> Tensor:
    """Returns an Int8Linear of x [..., c_in]: by oneDNN on a CPU, by tensor cores on a GPU, else with plain weights."""
    if (out := packed_linear(layer, x)) is not None:
        return out
    if not _fits_tensor_cores(x, layer.weight):
        return linear(x, *layer.weights(x))
    product = _kitchen_product() or product_by_rows
    out = product(x.reshape(-1, x.shape[-1]), layer.weight, layer.weight_scale, layer.bias, x.dtype)
    return out.view(*x.shape[:-1], -1)


def frozen_linear(layer: Any, x: Tensor) -> Tensor:
    """Returns an Int8Linear of x [..., c_in] with gradients of x, which need no copy of the restored weight."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _FrozenLinear.apply(x, layer)
    return out


class _FrozenLinear(torch.autograd.Function):
    """A linear layer whose weight is restored from int8 in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear(x, *layer.weights(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_order()
        weight, _ = ctx.layer.weights(grad)
        return linear(grad, weight.t(), None), None


def _fits_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """True if an Nvidia or AMD GPU multiplies x with a weight [c_out, c_in] in int8."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cuda" and not needs_grad and all(side % 16 == 0 for side in weight.shape)


@cache
def _kitchen_product() -> Callable[..., Tensor] | None:
    """Returns the product of ComfyUI's kernels, if they are installed; it has the arguments of `product_by_rows`."""
    try:
        from comfy_kitchen import int8_linear as product
    except ImportError:
        return None
    return product


def product_by_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x [N, c_in] times an int8 weight [c_out, c_in] times its scales [c_out, 1], plus the bias, in `dtype`.

    Each row of x has its own symmetric scale, since a GPU's product takes no zero point.
    """
    steps = x.float().abs().amax(dim=1, keepdim=True).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    values = (x / steps).round_().to(torch.int8)
    padded = F.pad(values, (0, 0, 0, max(0, _FEWEST_ROWS - len(x))))
    out = torch._int_mm(padded, weight.t())[: len(x)] * steps * scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)
