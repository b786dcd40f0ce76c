"""The MLP that every convolution ends in, most of the networks' work: pointwise, with a norm over the whole picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dropout import Dropout, can_draw
from ..kernels.linear import back_through, bare, first_order, heard, learning_cpu, of_weights, plain_cpu, product

M = TypeVar("M", bound=nn.Module)

EPS = 1e-6  # of every norm in Würstchen
MANY, ROWS = 256, 2048  # places from which on an MLP works in pieces, and how many a piece has
LEARNT_ROWS = 512  # places that are worked on at a time where gradients are wanted, or those of one picture


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, section 3) over [B, H, W, C]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma and beta as `x` needs them (under autocast, fp32 parameters would pull the product up to fp32)."""
        return self.gamma.to(x.dtype), self.beta.to(x.dtype)

    def energy(self, x: Tensor) -> Tensor:
        """The sum of squares of each channel [B, 1, 1, C].

        The plain sum is several times faster on a CPU than a vector norm.
        """
        if x.dtype == torch.float16:  # squares leave its range: they are summed in fp32, and never held
            return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).square()
        return x.square().sum(dim=(1, 2), keepdim=True)

    def scaled(self, x: Tensor, energy: Tensor) -> Tensor:
        """x [B, H, W, C], or a part of it, by its response to the energy of the whole."""
        gamma, beta = self.affine(x)
        return torch.addcmul(beta, x, self.scale(energy, gamma))

    def scale(self, energy: Tensor, gamma: Tensor) -> Tensor:
        """What a channel of some energy is multiplied by."""
        norm = (energy + 1e-12).sqrt()  # the tiny term keeps the gradient finite where a channel is zero everywhere
        return gamma * (norm / (norm.mean(dim=-1, keepdim=True) + EPS)).to(gamma.dtype) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.energy(x))


def own(operations: Any, layer: type[M]) -> type[M]:
    """The namespace's own version of one of our layers, if it has one: without bare parameters, or casting them."""
    return getattr(operations, layer.__name__, layer)


class Injected(NamedTuple):
    """What joins the input of an MLP: `mapper`, a 1x1 convolution [c_mapped, c, 1, 1], of latents [B, c, H, W]."""

    latents: Tensor
    mapper: nn.Module


class _End(torch.autograd.Function):
    """What an MLP makes of its first layer's result [B, H, W, c], where gradients are wanted.

    All but that is computed again for them: of the four tensors of its size that torch keeps, one is left. The passes
    that this takes are made up for by those that are made in place: a step of a full-size prior takes as long.
    """

    @staticmethod
    def forward(
        norm: GlobalResponseNorm,
        dropout: Dropout,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        dropout, hidden = dropout.again(), torch.empty_like(x)
        for part, into in _pictures(x, hidden):
            part = F.gelu(part)
            scale = norm.scale(norm.energy(part), gamma)
            torch.addcmul(beta * dropout.scale, part, scale * dropout.scale, out=into)
            dropout(into)
        with torch.autocast("cpu", enabled=False):
            return product(hidden, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.norm, ctx.dropout, *tensors, bias = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm, dropout = ctx.norm, ctx.dropout.again()
        x, gamma, beta, weight = ctx.saved_tensors
        gamma = gamma.detach().requires_grad_()
        grads, hidden = back_through(grad, weight), torch.empty_like(x)
        of_affine = torch.zeros(2, *gamma.shape)
        for part, of_part, into in _pictures(x, grads, hidden):
            gelu = F.gelu(part)
            energy = norm.energy(gelu).requires_grad_()
            with torch.enable_grad():
                scale = norm.scale(energy, gamma) * dropout.scale
            torch.addcmul(beta * dropout.scale, gelu, scale.detach(), out=into)
            dropout(into, of_part)
            of_scale = (of_part * gelu).sum(dim=(1, 2), keepdim=True)
            of_energy, of_gamma = torch.autograd.grad(scale, (energy, gamma), of_scale)
            of_affine[0] += of_gamma
            of_affine[1] += of_part.sum(dim=(0, 1, 2)) * dropout.scale
            of_part.mul_(scale.detach()).addcmul_(gelu, 2 * of_energy)
            torch.ops.aten.gelu_backward.grad_input(of_part, part, grad_input=of_part)
        of_weight = of_weights(grad, hidden, weight.dtype) if ctx.needs_input_grad[5] else None
        of_bias = grad.sum(dim=(0, 1, 2)).to(ctx.bias_dtype) if ctx.needs_input_grad[6] else None
        return None, None, grads, *of_affine.to(x.dtype), of_weight, of_bias


def _pictures(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many pictures [B, H, W, c] of each of the tensors at a time as fit a CPU's cache."""
    count = max(1, LEARNT_ROWS // tensors[0].shape[1:3].numel())
    return zip(*(x.split(count) for x in tensors), strict=True)


class ChannelwiseMLP(nn.Sequential):
    """Pointwise MLP with global response normalisation; dropout keeps its slot, since keys depend on it."""

    def __init__(self, c_in: int, c: int, dropout: float, operations: Any, **factory: Any):
        super().__init__(
            operations.Linear(c_in, c * 4, **factory),
            nn.GELU(),
            own(operations, GlobalResponseNorm)(c * 4, **factory),
            nn.Dropout(dropout),
            operations.Linear(c * 4, c, **factory),
        )

    def forward(self, x: Tensor, injected: Injected | None = None) -> Tensor:
        """x [B, H, W, c_in] to [B, H, W, c]; the last of the c_in channels are those of `injected`, if it is given."""
        layers: Any = self
        first, gelu, norm, dropout, last = layers
        linear = (first, last) if injected is None else (first, last, injected.mapper)
        # In this order: a graph is not to depend on how many places there are.
        unheard = type(gelu) is nn.GELU and isinstance(norm, GlobalResponseNorm) and not any(map(heard, layers))
        if plain_cpu(x) and not self.training and x.shape[1] * x.shape[2] >= MANY and len(x):
            if unheard and all(map(bare, linear)):
                return self._fast(x, injected)
        if injected is not None and learning_cpu(x) and all(map(bare, linear)):
            with torch.autocast("cpu", enabled=False):  # of weights, whose product is small
                x, weight, bias = joined(x, injected, *first.ready(x))
            x = product(x, weight, bias)
        else:
            if injected is not None:
                x = torch.cat([x, injected.mapper(injected.latents.to(x.dtype)).permute(0, 2, 3, 1)], dim=-1)
            x = first(x)
        ours = bare(last) and unheard and can_draw(dropout.p) and x.numel()
        if x.dtype != torch.float16 and learning_cpu(x) and ours:
            end: Tensor = _End.apply(
                norm, Dropout(dropout.p if dropout.training else 0), x, *norm.affine(x), *last.ready(x)
            )
            return end
        return last(dropout(norm(gelu(x))))

    def _fast(self, x: Tensor, injected: Injected | None) -> Tensor:
        """The same by fewer products, and in pieces that fit a CPU's cache.

        Prior, 1024x1024 pixels, bf16: 0.9 of the time; Stage B's finest level 0.6.
        """
        layers: Any = self
        first, _, norm, _, last = layers
        (weight, bias), project = first.ready(x), last.ready(x)
        if injected is not None:
            x, weight, bias = joined(x, injected, weight, bias)
        pictures = []
        for one in x.flatten(1, 2):
            hidden = [product(piece, weight, bias, gelu=True)[None, None] for piece in one.split(ROWS)]
            energy = torch.stack([norm.energy(piece).float() for piece in hidden]).sum(dim=0)
            pictures.append(torch.cat([product(norm.scaled(piece, energy), *project)[0, 0] for piece in hidden]))
        return torch.stack(pictures).unflatten(1, x.shape[1:3])


def joined(x: Tensor, injected: Injected, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input, weight and bias of an MLP's first layer, with what is injected.

    This goes through two linear maps, one after the other. Made one, they take its 16 channels instead of 1024: a
    sixth of all products of v2's Stage B, and a tenth of the time of its training step. They are multiplied anew each
    time, so that no patch of theirs is missed.
    """
    mapper: Any = injected.mapper
    inner, inner_bias = mapper.ready(x)
    own_part, mapped_part = weight.split([x.shape[-1], inner.shape[0]], dim=1)
    weight = torch.cat([own_part, mapped_part @ inner[:, :, 0, 0]], dim=1)
    x = torch.cat([x, injected.latents.to(x.dtype).permute(0, 2, 3, 1)], dim=-1)
    return x, weight, bias + mapped_part @ inner_bias
