"""Train a LoRA (arXiv 2106.09685) of a prior, and of its text tower: low-rank changes of some of their weights, which
stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.key_maps import transformers_path
from ...checkpoints.writer import write_tensors
from ...common.dataclass_config import from_table
from ...models.prior import Prior
from ...models.text_encoder import TextEncoder, tokenize
from ..rng import StepRandom
from .networks import input_source, load_frozen
from .prior import PriorStage

if TYPE_CHECKING:
    from peft import LoraConfig

TEXT_ENCODER = "text_encoder"  # the prior's submodule


@dataclass(frozen=True)
class AdapterConfig:
    """The `[lora]` table."""

    rank: int = 4
    alpha: float = 0.0  # the change is scaled by alpha / rank; 0: alpha is the rank
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # how the paths of the changed layers end
    text_targets: tuple[str, ...] = ()  # the same in the text tower, as transformers calls them: q_proj, fc1, ...
    dropout: float = 0.0  # of what the adapters see; the prior's own is as in its file

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"[lora] rank must be 1 or more, got {self.rank}")
        if self.alpha < 0:
            raise ValueError(f"[lora] alpha must be above 0, or 0 for the rank, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"[lora] dropout is a share from 0 to below 1, got {self.dropout}")
        if not self.targets and not self.text_targets:
            raise ValueError("[lora] targets and text_targets are empty: name what learns, such as to_q")

    def of_peft(self, paths: list[str]) -> LoraConfig:
        """As peft takes it, for the layers at these paths."""
        from peft import LoraConfig

        alpha: Any = self.alpha or self.rank  # which peft calls a whole number, and multiplies with
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=paths, lora_dropout=self.dropout)


def name_of(path: str) -> str:
    """What diffusers' LoRA files call the module of a prior at `path`, or of its text tower."""
    if path.startswith(f"{TEXT_ENCODER}."):
        return f"text_encoder.text_model.{transformers_path(path.removeprefix(f'{TEXT_ENCODER}.'))}"
    return f"prior.{path}"


def targeted(net: nn.Module, config: AdapterConfig) -> list[str]:
    """The paths of the layers that a configuration names. ValueError if a name is no linear layer's."""
    paths, found = [path for path, layer in net.named_modules() if isinstance(layer, nn.Linear)], []
    for key, place, known in (
        ("targets", "prior", "to_q and kv_mapper.1"),
        ("text_targets", TEXT_ENCODER, "q_proj and fc1"),
    ):
        names = {path: name for path in paths if (name := name_of(path)).startswith(f"{place}.")}
        for target in getattr(config, key):
            some = [path for path, name in names.items() if name.endswith(f".{target}")]
            if not some:
                raise ValueError(f"[lora] {key}: no linear layer's path ends in {target!r}; {known} are two")
            found += some
    return found


def attach(net: nn.Module, config: AdapterConfig) -> None:
    """Freeze a network and put adapters on it, which start as no change; its state dict is then theirs alone.

    ValueError if a target names no linear layer.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config.of_peft(targeted(net, config)), net.requires_grad_(False))
    learned = {name for name, p in net.named_parameters() if p.requires_grad}

    def leave_out(net: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.removeprefix(prefix) not in learned]:
            del state[key]

    def ask_for_no_more(net: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in learned]

    net.register_state_dict_post_hook(leave_out)
    net.register_load_state_dict_post_hook(ask_for_no_more)


def write_lora(path: Path, net: nn.Module, config: AdapterConfig, metadata: Mapping[str, Any]) -> None:
    """Write what `attach` put on a prior, and on its tower, as a file with diffusers' names and metadata in its header.

    The scale is multiplied into the tensors: not every reader knows a place for alpha (`load_lora_adapter` of diffusers
    knows none), and all take it for the rank where it is missing.
    """
    scale = {"A": 1.0, "B": (config.alpha or config.rank) / config.rank}
    state = {}
    for key, x in net.state_dict().items():
        layer, half = key.removesuffix(".default.weight").rsplit(".lora_", 1)
        state[f"{name_of(layer)}.lora_{half}.weight"] = x * scale[half]
    told = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items()}
    write_tensors(path, state, {"format": "pt", **told})


class SeparateAttention(nn.Module):
    """An `nn.MultiheadAttention` with a layer for each of its projections, as transformers has them.

    Adapters need layers that are called; that one only takes their weights. peft can put them there nonetheless, but
    adds them to the weights and takes them off again at each step, whose rounding the frozen weights keep.
    """

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        self.heads = packed.num_heads
        thirds = zip(packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
        self.q_proj, self.k_proj, self.v_proj = (_linear(weight, bias) for weight, bias in thirds)
        self.out_proj = packed.out_proj

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, need_weights: bool) -> tuple[Tensor, None]:
        """Attend from q [B, N, c] to k and v [B, M, c], with a mask [B * heads, N, M] that is added to the scores."""
        given = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in given)
        mask = attn_mask.unflatten(0, (len(q), -1)).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with these weights, which aren't copied."""
    out, width = weight.shape
    layer = nn.Linear(width, out, device="meta")
    layer.weight, layer.bias = (nn.Parameter(x.detach(), x.requires_grad) for x in (weight, bias))
    return layer


def attach_text_encoder(prior: Prior, tower: TextEncoder) -> None:
    """Make a tower a part of a prior, which then takes tokens [2, B, L] (ids and mask) in place of text states, too."""
    for block in tower.transformer.resblocks:
        block.attn = SeparateAttention(block.attn)
    prior.add_module(TEXT_ENCODER, tower)
    prior.register_forward_pre_hook(_read)


def _read(prior: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    latents, t, text = given
    if isinstance(text, Tensor) and not text.is_floating_point():
        text = prior.get_submodule(TEXT_ENCODER)(*text)
    return latents, t, text


class LoraStage(PriorStage):
    """Adapters on a prior, and on its text tower, trained as the prior itself is."""

    name = "lora"
    tables: tuple[str, ...] = ("noise", "lora")

    def start(self, config: Mapping[str, Any]) -> Prior:
        """The prior that `[inputs]` names, with adapters on it; it holds the text tower too if that learns."""
        if self.noise.slow_times:
            raise ValueError("[noise] slow_times is of no use to a LoRA, which leaves the time as it is: take it out")
        self.adapters = from_table(AdapterConfig, config.get("lora", {}), "lora")
        prior = load_frozen(config, "prior", "prior", Prior)
        if self.adapters.text_targets:
            self.networks = {name: network for name, network in self.networks.items() if name != "text"}
            attach_text_encoder(prior, load_frozen(config, "text", "prior_text_encoder", TextEncoder))
        attach(prior, self.adapters)
        return prior

    def bases(self, config: Mapping[str, Any]) -> list[str | Path]:
        return [input_source(config, name) for name in ("prior", *(("text",) if self.adapters.text_targets else ()))]

    def texts(self) -> Callable[[Any, StepRandom, float], Tensor]:
        if not self.adapters.text_targets:
            return super().texts()
        return lambda picked, rng, drop: torch.stack(tokenize(self.dataset.captions(picked, rng, drop)))

    def reader(self, net: Prior) -> TextEncoder:
        tower = net.get_submodule(TEXT_ENCODER) if self.adapters.text_targets else super().reader(net)
        assert isinstance(tower, TextEncoder)
        return tower

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        """None: a LoRA is no network."""
        return {}

    def save(self, path: Path, net: Prior, metadata: Mapping[str, Any]) -> None:
        write_lora(path, net, self.adapters, metadata)
