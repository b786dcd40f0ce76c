"""The MLP of every ConvNeXt block on a CPU: linear, GELU, global response norm, dropout, linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import has_hooks, inference_on_cpu, is_plain, training_on_cpu
from .dropout import Dropout, supports_rate
from .int8 import ScaledHidden, multiplies_int8, quantize
from .linear import cast_linear, linear, refuse_second_order, weight_grad

MIN_POSITIONS = 256  # H * W from which inference works in chunks
INFERENCE_CHUNK = 2048  # positions per chunk
INT8_CHUNK = 512  # positions per chunk of inference in int8
TRAINING_CHUNK = 512  # positions per chunk in training, but at least one image


class MappedLatents(NamedTuple):
    """Latents [B, c, H, W] that join an MLP's input through `mapper`, a 1x1 convolution from c to c_mapped channels."""

    latents: Tensor
    mapper: nn.Module

    def append_to(self, x: Tensor) -> Tensor:
        """Returns x [B, H, W, c_in] with the mapped latents appended to its channels."""
        mapped = self.mapper(self.latents.to(x.dtype))
        return torch.cat([x, mapped.permute(0, 2, 3, 1)], dim=-1)


def mlp(layers: nn.Sequential, x: Tensor, injected: MappedLatents | None = None) -> Tensor | None:
    """Fast path of `ChannelwiseMLP.forward`; returns None where it does not apply."""
    if torch.compiler.is_compiling():  # first: a graph must not depend on the number of positions
        return None
    first, gelu, norm, dropout, last = modules = list[Any](layers)
    plain_tail = is_plain(norm) and is_plain(last) and not (has_hooks(gelu) or has_hooks(dropout))
    if not plain_tail or type(gelu) is not nn.GELU or type(dropout) is not nn.Dropout:
        return None
    plain_input = is_plain(first) and (injected is None or is_plain(injected.mapper))
    if plain_input and inference_on_cpu(x) and not layers.training:
        if multiplies_int8(x) and (result := _int8_mlp(modules, x, injected)) is not None:
            return result
        if len(x) and x.shape[1] * x.shape[2] >= MIN_POSITIONS:
            return _chunked_mlp(modules, x, injected)
    if not (torch.is_grad_enabled() and x.device.type == "cpu" and x.numel() and supports_rate(dropout.p)):
        return None
    if injected is not None and plain_input and first.weight.dtype != torch.int8 and training_on_cpu(x):
        with torch.autocast("cpu", enabled=False):  # the product of two weights is small
            x, weight, bias = _join(x, injected, *first.weights(x))
        h = linear(x, weight, bias)
    else:
        h = first(x if injected is None else injected.append_to(x))
    if h.dtype == torch.float16 or last.weight.dtype == torch.int8 or not training_on_cpu(h):
        return last(dropout(norm(gelu(h))))
    rate = dropout.p if dropout.training else 0
    out: Tensor = _MLPTail.apply(norm, Dropout(rate), h, *norm.weights(h), *last.weights(h))
    return out


def _chunked_mlp(modules: list[Any], x: Tensor, injected: MappedLatents | None) -> Tensor:
    """Computes the MLP in chunks that fit a CPU's cache, with the injected latents' mapper merged into the first layer.

    In bf16 at 1024x1024 pixels this takes 0.9 of the plain time in the prior and 0.6 in Stage B's finest level.
    """
    first, _, norm, _, last = modules
    (weight, bias), (last_weight, last_bias) = first.weights(x), last.weights(x)
    if injected is not None:
        x, weight, bias = _join(x, injected, weight, bias)
    images = []
    for image in x.flatten(1, 2):
        hidden = [linear(chunk, weight, bias, gelu=True)[None, None] for chunk in image.split(INFERENCE_CHUNK)]
        energy = torch.stack([norm.energy(chunk).float() for chunk in hidden]).sum(dim=0)
        out = [linear(norm.scaled(chunk, energy), last_weight, last_bias)[0, 0] for chunk in hidden]
        images.append(torch.cat(out))
    return torch.stack(images).unflatten(1, x.shape[1:3])


def _int8_mlp(modules: list[Any], x: Tensor, injected: MappedLatents | None) -> Tensor | None:
    """Computes the MLP in int8, in chunks that fit a CPU's cache; returns None if a layer or a number is not suited.

    At 1024x1024 pixels it takes 0.27 of fp32's time in the prior and 0.37 in Stage B's finest level, or 0.53 and 0.7 of
    native bf16's.
    """
    first, _, norm, _, last = modules
    packed, last_packed, like = first.packed(x.shape[-1]), last.packed(), torch.empty(())
    if packed is None or last_packed is None:
        return None
    latents, joined, bias = None, None, None
    if injected is not None:
        mapper: Any = injected.mapper
        joined, bias = packed.joined(*mapper.weights(like))
        latents = injected.latents.float().permute(0, 2, 3, 1).flatten(1, 2)
    gamma, beta = norm.weights(like)
    images = []
    for i, image in enumerate(x.flatten(1, 2)):
        if (quantized := quantize(image)) is None:
            return None
        hidden = []
        for start in range(0, len(image), INT8_CHUNK):
            part = quantized._replace(values=quantized.values[start : start + INT8_CHUNK])
            h = packed.product(part, torch.float32, bias=bias, gelu=latents is None)
            if latents is not None:
                h = torch.ops.aten.gelu_(h.addmm_(latents[i, start : start + INT8_CHUNK], joined))
            hidden.append(h)
        scaled = ScaledHidden(hidden)
        energy = torch.stack([norm.energy(part) for part in scaled.parts()]).sum(dim=0)
        chunks = scaled.quantize(norm.scale(energy, gamma).flatten(), beta.flatten())
        if chunks is None:
            return None
        images.append(torch.cat([last_packed.product(chunk, x.dtype) for chunk in chunks]))
    return torch.stack(images).unflatten(1, x.shape[1:3])


def _join(x: Tensor, injected: MappedLatents, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the mapper into an MLP's first layer; returns that layer's new input, weight and bias.

    Two linear maps in sequence become one, which reads the latents' 16 channels instead of 1024 mapped ones. That saves
    a sixth of all products of v2's Stage B and a tenth of its training step's time. The merged weight is computed for
    each call, so that patched weights take effect.
    """
    mapper: Any = injected.mapper
    mapper_weight, mapper_bias = mapper.weights(x)
    x_part, mapped_part = weight.split([x.shape[-1], mapper_weight.shape[0]], dim=1)
    weight = torch.cat([x_part, mapped_part @ mapper_weight[:, :, 0, 0]], dim=1)
    x = torch.cat([x, injected.latents.to(x.dtype).permute(0, 2, 3, 1)], dim=-1)
    return x, weight, bias + mapped_part @ mapper_bias


class _MLPTail(torch.autograd.Function):
    """GELU, GRN, dropout and the second linear layer over [B, H, W, c], with gradients.

    The backward pass recomputes everything from the input: one activation is stored instead of four. In-place
    operations make up for the time.
    """

    @staticmethod
    def forward(
        ctx: Any, norm: Any, dropout: Dropout, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Any
    ) -> Tensor:
        ctx.norm, ctx.dropout, ctx.bias_dtype = norm, dropout, None if bias is None else bias.dtype
        ctx.save_for_backward(x, gamma, beta, weight)
        dropout, hidden = dropout.restarted(), torch.empty_like(x)
        for part, part_hidden in _image_chunks(x, hidden):
            part = F.gelu(part)
            scale = norm.scale(norm.energy(part), gamma)
            torch.addcmul(beta * dropout.scale, part, scale * dropout.scale, out=part_hidden)
            dropout(part_hidden)
        return cast_linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        norm, dropout = ctx.norm, ctx.dropout.restarted()
        x, gamma, beta, weight = ctx.saved_tensors
        gamma = gamma.detach().requires_grad_()
        grad_x = cast_linear(grad, weight.t(), None)  # gradient of `hidden`; the loop turns it into that of x
        hidden, grad_affine = torch.empty_like(x), torch.zeros(2, *gamma.shape)
        for part, part_grad, part_hidden in _image_chunks(x, grad_x, hidden):
            gelu = F.gelu(part)
            energy = norm.energy(gelu).requires_grad_()
            with torch.enable_grad():
                scale = norm.scale(energy, gamma) * dropout.scale
            torch.addcmul(beta * dropout.scale, gelu, scale.detach(), out=part_hidden)
            dropout(part_hidden, part_grad)
            grad_scale = (part_grad * gelu).sum(dim=(1, 2), keepdim=True)
            grad_energy, grad_gamma = torch.autograd.grad(scale, (energy, gamma), grad_scale)
            grad_affine[0] += grad_gamma
            grad_affine[1] += part_grad.sum(dim=(0, 1, 2)) * dropout.scale
            part_grad.mul_(scale.detach()).addcmul_(gelu, 2 * grad_energy)
            torch.ops.aten.gelu_backward.grad_input(part_grad, part, grad_input=part_grad)
        grad_weight = weight_grad(grad, hidden, weight.dtype) if ctx.needs_input_grad[5] else None
        grad_bias = grad.sum(dim=(0, 1, 2)).to(ctx.bias_dtype) if ctx.needs_input_grad[6] else None
        return None, None, grad_x, *grad_affine.to(x.dtype), grad_weight, grad_bias


def _image_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors [B, H, W, c] into chunks of images that fit a CPU's cache."""
    count = max(1, TRAINING_CHUNK // tensors[0].shape[1:3].numel())
    return zip(*(x.split(count) for x in tensors), strict=True)
