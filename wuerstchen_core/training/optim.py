"""Optimizers and gradient checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.text import nearest, one_line
from ..models.attention import AttnBlock
from ..models.layers import FeedForwardBlock, ResBlock
from ..models.text_encoder import TextEncoder
from .config import ADAMW, LoopConfig
from .rates import parameter_groups


def build_optimizers(
    net: nn.Module,
    device: torch.device,
    muon_lr: float = 0.0,
    optimizer: str = ADAMW,
    arguments: Mapping[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """Returns the optimizer of an import path, and Muon for the matrices of the blocks if `muon_lr` is set.

    They are named by their classes, in lower case (Muon: kellerjordan.github.io/posts/muon). `device` is where the
    weights will be. AdamW is fused where torch has that: on a CPU it takes a tenth of the time (0.5 instead of 5.8 ns
    per weight on one core), which saves 5 s per step of a full-size prior. `factors` are those of `set_factors`.
    ValueError if the optimizer cannot be imported or its arguments do not fit.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if muon_lr and "blocks." in name and p.ndim == 2}
    others = {name: p for name, p in trained.items() if name not in matrices}
    if not others:
        raise ValueError("[train] muon_lr leaves no weights for AdamW: remove it")
    kind = _optimizer_class(optimizer)
    _check_arguments(kind, optimizer, arguments or {})
    fused = {"fused": device.type in ("cpu", "cuda") or None} if optimizer == ADAMW else {}  # None: torch decides
    try:
        optimizers: dict[str, torch.optim.Optimizer] = {
            kind.__name__.lower(): kind(parameter_groups(others, factors or {}), **{**fused, **(arguments or {})})
        }
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"[train] optimizer_args do not fit {optimizer}: {one_line(error):.200}") from error
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon: update torch, or remove [train] muon_lr")
        groups = parameter_groups(matrices, factors or {})
        optimizers["muon"] = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
    return optimizers


def group_settings(config: LoopConfig, name: str) -> dict[str, Any]:
    """Returns the settings that each step gives the parameter groups of an optimizer of `build_optimizers`."""
    if name == "muon":
        return {"lr": config.muon_lr, "weight_decay": config.weight_decay}
    betas = {"betas": config.betas} if config.optimizer == ADAMW else {}
    return {"lr": config.lr, "weight_decay": config.weight_decay, **betas, **(config.optimizer_args or {})}


def set_group(group: dict[str, Any], settings: Mapping[str, Any], lr: float) -> None:
    """Changes the settings that a parameter group has, and its learning rate."""
    if isinstance(group["lr"], Tensor):  # torchao's, for torch.compile
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
    group.update({key: x for key, x in settings.items() if key in group and key != "lr"})


def _optimizer_class(path: str) -> Any:
    """Returns the class of an import path. ValueError if it cannot be imported or the loop cannot use it."""
    module_name, _, name = path.rpartition(".")
    where = f"[train] optimizer {path}"
    if not module_name:
        raise ValueError(f"{where} must be the import path of a class, such as {ADAMW}")
    try:
        module = import_module(module_name)
    except Exception as error:  # libraries for GPUs raise other errors too
        library = path.partition(".")[0]
        reason = "is not installed" if getattr(error, "name", "") == library else f"fails: {one_line(error):.100}"
        raise ValueError(f"{where} cannot be imported: {library} {reason}; install it, or correct the path") from error
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        known = [key for key, x in vars(module).items() if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)]
        raise ValueError(f"{where} is not a torch optimizer{nearest(name, known)}: name one such as {ADAMW}")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{where} needs a closure, which this training does not have: choose another")
    return kind


def _check_arguments(kind: Any, path: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that an optimizer does not take."""
    known = inspect.signature(kind).parameters
    names = [name for name in known if name not in ("params", "lr")]
    takes_any = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values())
    if unknown := [name for name in arguments if name not in names and (name in known or not takes_any)]:
        note = " (set [train] lr)" if unknown[0] == "lr" else nearest(unknown[0], names)
        raise ValueError(f"[train] optimizer_args has no key {unknown[0]}{note}: {path} takes {', '.join(names)}")


def recompute_blocks(net: nn.Module) -> None:
    """Turns on gradient checkpointing (arXiv 1604.06174). ValueError if the network has no blocks to recompute."""
    blocks: list[Any] = []
    for module in net.modules():
        if isinstance(module, ResBlock | AttnBlock | FeedForwardBlock):
            blocks.append(module)
        elif isinstance(module, TextEncoder):
            blocks += module.transformer.resblocks
    if not blocks:
        raise ValueError("[train] checkpointing works for priors, decoders and text encoders: remove it here")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
