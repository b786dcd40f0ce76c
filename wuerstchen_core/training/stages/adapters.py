"""Adapters of frozen networks, as peft computes them: their configuration, and attaching them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from ...checkpoints.key_maps import transformers_path
from ...checkpoints.lora_files import NETWORK_PREFIX
from ...common.dataclass_config import Count, NotNegative, OneOf, Positive, Range, option
from ...common.text import one_line
from .diffusion import TEXT_ENCODER
from .text_tower import train_only

LINEAR = ("lora", "dora")  # the kinds of peft's LoraConfig
ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class AdapterConfig:
    """The `[lora]` table.

    `kind`: `lora` (arXiv 2106.09685), `dora`, which also trains the norms of the weights' rows (arXiv 2402.09353),
    `loha`, a product of two changes of low rank (arXiv 2108.06098), or `lokr`, a Kronecker product (arXiv 2309.14859).
    `rslora`: arXiv 2312.03732. Patterns are regular expressions for the last components of the paths of layers.
    """

    rank: Count = option(4, "rank of the changes")
    alpha: NotNegative = option(0.0, "the change is scaled by alpha / rank; 0: alpha is the rank")
    targets: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), "last components of the paths of adapted layers"
    )
    text_targets: tuple[str, ...] = option(
        (), "the same for the text encoder, with transformers' names: q_proj, fc1, ..."
    )
    dropout: Annotated[float, Range(least=0, below=1)] = option(0.0, "dropout of the inputs of lora and dora")
    kind: Annotated[str, OneOf(("lora", "dora", "loha", "lokr"))] = option("lora", "lora, dora, loha or lokr")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead, for lora and dora")
    init: Annotated[str, OneOf(("", "gaussian", "orthogonal", "lycoris"))] = option(
        "", "other initial values: gaussian or orthogonal for lora and dora, lycoris for lokr; none has an effect"
    )
    factor: Annotated[int, Range(least=-1)] = option(-1, "size of lokr's smaller factor; -1: about the root")
    rank_pattern: dict[str, Count] | None = option(None, 'ranks of some layers, such as {"to_q" = 8}')
    alpha_pattern: dict[str, Positive] | None = option(None, 'alphas of some layers, such as {"blocks.2.*" = 4.0}')
    start: str = option("", "file or folder of a LoRA to go on from, of the same kind, ranks and layers")

    def __post_init__(self) -> None:
        is_linear, is_lokr = self.kind in LINEAR, self.kind == "lokr"
        fits = {
            "dropout": is_linear or not self.dropout,
            "rslora": is_linear or not self.rslora,
            "factor": is_lokr or self.factor == -1,
            "init": not self.init or (is_lokr if self.init == "lycoris" else is_linear),
        }
        if wrong := [name for name, possible in fits.items() if not possible]:
            raise ValueError(f"[lora] {wrong[0]} = {getattr(self, wrong[0])!r} is not for {self.kind}: remove it")


@dataclass(frozen=True)
class Layer:
    """An adapted layer: its name in ComfyUI's LoRA files, and the numbers of its adapter."""

    name: str
    rank: int
    alpha: float
    scale: float  # which peft multiplies the change by


def lora_path(path: str) -> str:
    """Returns the name in ComfyUI's LoRA files of the module at `path` of a network or its text encoder.

    That of a prior's text encoder is diffusers' too.
    """
    if path.startswith(f"{TEXT_ENCODER}."):
        return f"text_encoder.text_model.{transformers_path(path.removeprefix(f'{TEXT_ENCODER}.'))}"
    return f"{NETWORK_PREFIX}{path}"


def target_layers(net: nn.Module, config: AdapterConfig) -> dict[str, Layer]:
    """Returns the layers to adapt by path.

    ValueError if a target matches no linear layer or convolution, or a pattern no target, or for grouped convolutions,
    whose change is no product of two factors.
    """
    if not config.targets and not config.text_targets:
        raise ValueError("[lora] targets and text_targets are empty: name layers, such as to_q")
    names = {path: lora_path(path) for path, layer in net.named_modules() if isinstance(layer, ADAPTABLE)}
    found: list[str] = []
    for key, prefix, example in (("targets", NETWORK_PREFIX, "to_q"), ("text_targets", f"{TEXT_ENCODER}.", "q_proj")):
        for target in getattr(config, key):
            paths = [path for path, x in names.items() if x.startswith(prefix) and x.endswith(f".{target}")]
            if not paths:
                raise ValueError(
                    f"[lora] {key}: no linear layer or convolution is called {target!r}; an example is {example}"
                )
            found += paths
    chosen = {path: names[path] for path in found}
    if grouped := [path for path in chosen if getattr(net.get_submodule(path), "groups", 1) > 1]:
        if config.kind in LINEAR:
            raise ValueError(f'[lora] {grouped[0]} is a depthwise convolution: set kind to "loha" or "lokr" for it')
    ranks, alphas = (_matches(key, getattr(config, key) or {}, chosen) for key in ("rank_pattern", "alpha_pattern"))
    layers = {}
    for path, name in chosen.items():
        rank = ranks.get(path, config.rank)
        alpha = alphas.get(path, config.alpha or rank)
        layers[path] = Layer(name, rank, alpha, alpha / (rank**0.5 if config.rslora else rank))
    return layers


def _matches(key: str, patterns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the value of the first pattern that matches a layer, by its path; `names` are the layers' names."""
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        try:
            matching = [path for path, name in names.items() if re.match(rf"(.*\.)?({pattern})$", name)]
        except re.error as error:
            raise ValueError(f"[lora] {key} has an invalid pattern {pattern!r} ({error}): correct it") from error
        if not matching:
            raise ValueError(f"[lora] {key}: no target matches {pattern!r}; an example is {next(iter(names.values()))}")
        found = dict.fromkeys(matching, value) | found
    return found


def peft_config(config: AdapterConfig, layers: Mapping[str, Layer]) -> Any:
    """Returns peft's configuration of adapters of the layers at these paths."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    common: dict[str, Any] = {"r": config.rank, "target_modules": list(layers)}
    common["rank_pattern"] = _patterns({path: x.rank for path, x in layers.items()}, config.rank)
    alpha = config.alpha or config.rank
    common["alpha_pattern"] = _patterns({path: x.alpha for path, x in layers.items()}, alpha)
    if config.kind in LINEAR:
        common |= {"lora_alpha": alpha, "lora_dropout": config.dropout, "init_lora_weights": config.init or True}
        return LoraConfig(use_dora=config.kind == "dora", use_rslora=config.rslora, **common)
    if config.kind == "loha":
        return LoHaConfig(alpha=alpha, **common)  # type: ignore[arg-type]  # it only multiplies
    return LoKrConfig(alpha=alpha, decompose_factor=config.factor, init_weights=config.init or True, **common)  # type: ignore[arg-type]


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns peft's patterns for the values, by path, that are not the default."""
    others = {value: [re.escape(path) for path, x in values.items() if x == value] for value in set(values.values())}
    return {"|".join(paths): value for value, paths in others.items() if value != default}


def attach(net: nn.Module, config: AdapterConfig) -> dict[str, Layer]:
    """Freezes a network and adds adapters without effect; returns their layers, by path.

    The network's state dict then has only the adapters. ValueError if the configuration does not fit.
    """
    from peft import inject_adapter_in_model

    layers = target_layers(net, config)
    try:
        inject_adapter_in_model(peft_config(config, layers), net.requires_grad_(False))
    except (ValueError, TypeError) as error:
        raise ValueError(f"[lora] peft cannot make these adapters: {one_line(error):.200}") from error
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # peft gives them the dtype of their layers
    train_only(net)
    return layers
