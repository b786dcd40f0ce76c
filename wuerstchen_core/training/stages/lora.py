"""Trains a LoRA (arXiv 2106.09685) of a prior, and of its text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...checkpoints.key_maps import transformers_path
from ...checkpoints.lora_files import NETWORK_PREFIX
from ...checkpoints.modelspec import FIELD, spec_header
from ...checkpoints.release import release_of
from ...checkpoints.writer import write_tensors
from ...common.dataclass_config import Count, NotNegative, Range, from_table, option
from ...inference.pipeline import WuerstchenPipeline
from ...models.operations import Operations
from ...models.prior import Prior
from ...models.text_encoder import SelfAttention, TextEncoder
from ..data.caption_tokens import pad_states
from ..rng import StepRandom
from ..samples import SampleConfig
from .losses import NoiseConfig
from .networks import input_source, load_frozen
from .prior import TEXT_ENCODER, PriorStage

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # which diffusers' `load_lora_weights` looks for in a folder


@dataclass(frozen=True)
class AdapterConfig:
    """The `[lora]` table."""

    rank: Count = option(4, "rank of the changes")
    alpha: NotNegative = option(0.0, "the change is scaled by alpha / rank; 0: alpha is the rank")
    targets: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), "last components of the paths of adapted layers"
    )
    text_targets: tuple[str, ...] = option(
        (), "the same for the text encoder, with transformers' names: q_proj, fc1, ..."
    )
    dropout: Annotated[float, Range(least=0, below=1)] = option(0.0, "dropout of the adapters' inputs")


def lora_path(path: str) -> str:
    """Returns the name in ComfyUI's LoRA files of the module at `path` of a prior or its text encoder.

    That of the text encoder is diffusers' too.
    """
    if path.startswith(f"{TEXT_ENCODER}."):
        return f"text_encoder.text_model.{transformers_path(path.removeprefix(f'{TEXT_ENCODER}.'))}"
    return f"{NETWORK_PREFIX}{path}"


def target_layers(net: nn.Module, config: AdapterConfig) -> list[str]:
    """Returns the paths of the layers to adapt. ValueError if a target matches no linear layer."""
    if not config.targets and not config.text_targets:
        raise ValueError("[lora] targets and text_targets are empty: name layers, such as to_q")
    names = {path: lora_path(path) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    found = []
    for key, prefix, example in (("targets", NETWORK_PREFIX, "to_q"), ("text_targets", f"{TEXT_ENCODER}.", "q_proj")):
        for target in getattr(config, key):
            paths = [path for path, x in names.items() if x.startswith(prefix) and x.endswith(f".{target}")]
            if not paths:
                raise ValueError(f"[lora] {key}: no linear layer is called {target!r}; an example is {example}")
            found += paths
    return found


def attach(net: nn.Module, config: AdapterConfig) -> None:
    """Freezes a network and adds adapters, initially without effect. Its state dict then has only the adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = config.alpha or config.rank  # peft's annotation says int, but it only multiplies
    layers = target_layers(net, config)
    options = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=layers, lora_dropout=config.dropout)
    inject_adapter_in_model(options, net.requires_grad_(False))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}

    def drop_frozen(net: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.removeprefix(prefix) not in trained]:
            del state[key]

    def expect_trained(net: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in trained]

    net.register_state_dict_post_hook(drop_frozen)
    net.register_load_state_dict_post_hook(expect_trained)


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


def attach_text_encoder(prior: Prior, text_encoder: TextEncoder) -> None:
    """Makes a text encoder a submodule of a prior, which then also accepts tokens [2, B, n, 77] (ids, mask) as text."""
    for block in list[Any](text_encoder.transformer.resblocks):
        block.attn = SeparateAttention(block.attn)

    def encode_tokens(prior: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        latents, t, text, *mask = inputs
        if isinstance(text, Tensor) and not text.is_floating_point():
            states = prior.get_submodule(TEXT_ENCODER)(*text.flatten(1, 2))
            text = states.unflatten(0, text.shape[1:3]).flatten(1, 2)
        return latents, t, text, *mask

    prior.add_module(TEXT_ENCODER, text_encoder)
    prior.register_forward_pre_hook(encode_tokens)


def write_lora(path: Path, net: Prior, config: AdapterConfig, metadata: Mapping[str, Any]) -> None:
    """Writes the adapters of `attach` with the names that ComfyUI's LoRA loaders read, and beside them with diffusers'.

    The tensors include the factor alpha / rank, since not every reader supports alpha (diffusers' `load_lora_adapter`
    does not) and all take a missing alpha for the rank.
    """
    state, scale = {}, (config.alpha or config.rank) / config.rank
    for key, x in net.state_dict().items():
        layer, half = key.removesuffix(".default.weight").rsplit(".lora_", 1)
        state[f"{lora_path(layer)}.lora_{half}.weight"] = x * scale if half == "B" else x
    header = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items() if name != FIELD}
    header |= spec_header(["prior"], metadata, release_of(net.params), is_lora=True)
    write_tensors(path, state, {"format": "pt", **header})
    renamed = {key.replace(NETWORK_PREFIX, "prior."): x for key, x in state.items()}
    write_tensors(path.with_name(DIFFUSERS_FILE), renamed, {"format": "pt", **header})


class LoraStage(PriorStage):
    """Adapters of a prior, and of its text encoder, trained with the prior's loss."""

    name, part = "lora", ""
    tables = {"noise": NoiseConfig, "lora": AdapterConfig, "sample": SampleConfig}

    def build(self, config: Mapping[str, Any]) -> Prior:
        """Returns the prior of `[inputs]` with adapters; with the text encoder as a submodule if that is adapted."""
        if self.noise.slow_times:
            raise ValueError("[noise] slow_times is not for a LoRA, which trains no time mappers: remove it")
        self.adapters = from_table(AdapterConfig, config.get("lora", {}), "lora")
        self.bases = [input_source(config, "prior")]
        prior = load_frozen(config, "prior", Prior)
        if self.adapters.text_targets:
            self.inputs = {"features": "encoder"}
            self.bases.append(input_source(config, "text"))
            attach_text_encoder(prior, load_frozen(config, "text", TextEncoder))
        attach(prior, self.adapters)
        return prior

    def text_inputs(self) -> Callable[[Any, StepRandom, float], tuple[Tensor, Tensor | None]]:
        if not self.adapters.text_targets:
            return super().text_inputs()

        def tokens(picked: Any, rng: StepRandom, drop: float) -> tuple[Tensor, Tensor | None]:
            """Returns tokens [2, B, n, 77], and the mask [B, 77 n] of their states."""
            rows = [torch.stack(x, dim=1) for x in self.dataset.tokenizer(self.dataset.captions(picked, rng, drop))]
            padded, mask = pad_states(rows)  # [B, n, 2, 77], [B, n]
            length = padded.shape[-1]
            return padded.permute(2, 0, 1, 3), None if mask is None else mask.repeat_interleave(length, dim=1)

        return tokens

    def sampling(self) -> dict[str, Any]:
        return {}  # those of the prior that it is applied to

    def base_pipeline(self) -> WuerstchenPipeline:
        return self.pipeline(load_frozen(self.config, "prior", Prior).to(next(self.net.parameters()).device))

    def use_weights(self, pipeline: WuerstchenPipeline, path: Path) -> None:
        pipeline.unload_lora()
        pipeline.load_lora(path)

    def save(self, path: Path, net: Prior, metadata: Mapping[str, Any]) -> None:
        write_lora(path, net, self.adapters, metadata)
