"""The strengths of adapters whose tensors do not state them: PEFT's and diffusers' configurations, Kohya's header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.text import parse_json
from .adapters import Adapters, rank_of
from .lora_keys import PEFT_PREFIX, split_key
from .lora_patterns import matches

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the header, PEFT's fields behind "prior." or "text_encoder."
KOHYA_ALPHA = "ss_network_alpha"

Config = Mapping[str, Any]

_ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # the field by PEFT's type of adapter
_DEFAULT_ALPHA = 8  # PEFT's
_STATED = {"r", *_ALPHAS.values()}  # a configuration in a header has one of these
# Fields of a configuration that do more than scale an adapter.
_UNSUPPORTED = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Other values of `init_lora_weights`, such as pissa, also replace the base model's weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def set_alphas(targets: Mapping[str, Adapters], metadata: Mapping[str, str], config: Config | None) -> str:
    """Sets the alphas that tensors lack, and returns where alphas are stated; "" if nowhere.

    PEFT's configuration `config` comes first, then diffusers' and Kohya's in the header `metadata`. Raises ValueError
    if it is not supported, or not that of these adapters.
    """
    header = f"{DIFFUSERS_CONFIG} of the header"
    configs: Mapping[str, Config] = {"": config} if config is not None else _diffusers_configs(metadata)
    source = header if config is None else PEFT_CONFIG
    for one in configs.values():
        _check(one, source)
    everything = [(target, adapter) for target, adapters in targets.items() for adapter in adapters.values()]
    # PEFT's and diffusers' naming has no alphas: their converters multiply them into the factors.
    is_kohya = not any(".lora_A" in key or ".lora_B" in key for _, adapter in everything for key in adapter.keys)
    found = dict.fromkeys(["alpha"] if any("alpha" in adapter.tensors for _, adapter in everything) else [])
    for target, adapter in everything:
        tensors = adapter.tensors
        if "alpha" in tensors or not (rank_of(tensors) or "lokr_w1" in tensors):
            continue
        path = split_key(adapter.keys[0])[0].removeprefix(PEFT_PREFIX)
        component, _, rest = path.partition(".")
        if component not in configs:
            fitting = (x for x in configs if not x or x.startswith("text_encoder") == (target == "text"))
            component, rest = next(fitting, ""), path
        if component in configs:
            scale, stated = _peft_scale(configs[component], rest, rank_of(tensors), source), source
        elif is_kohya and (alpha := _kohya_alpha(metadata, tensors)):
            scale, stated = alpha / (rank_of(tensors) or alpha), f"{KOHYA_ALPHA} of the header"
        else:
            continue
        found[stated] = None
        if (rank := rank_of(tensors)) is not None:
            tensors["alpha"] = torch.tensor(scale * rank)
        elif scale != 1:  # a LoKr of two whole factors
            tensors["lokr_w1"] = tensors["lokr_w1"] * scale
    return " and ".join(found)


def _check(config: Config, source: str) -> None:
    """Raises ValueError if a PEFT configuration has a type or option that is not supported."""
    if (kind := config.get("peft_type") or "LORA") not in _ALPHAS:
        raise ValueError(f"{source}: adapters of the type {kind} are not supported: use LoRA, LoHa or LoKr")
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("init_lora_weights") not in _INITS:
        unsupported.append(f"init_lora_weights {config['init_lora_weights']}")
    if unsupported:
        raise ValueError(
            f"{source}: {', '.join(unsupported)} is not supported, because it changes more than the adapters: "
            "train without it, or merge the adapter with PEFT and use the merged weights"
        )


def _peft_scale(config: Config, path: str, rank: int | None, source: str) -> float:
    """Returns the factor that PEFT applies to the adapter of the module at `path`, with factors of this rank.

    Raises ValueError if the configuration states another rank, or no numbers.
    """
    ranks, alphas = (config.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    if not (isinstance(ranks, Mapping) and isinstance(alphas, Mapping)):
        raise ValueError(f"{source} has a rank_pattern or alpha_pattern that is not an object: correct it")
    r = _by_pattern(ranks, path, config.get("r", rank or _DEFAULT_ALPHA), source)
    alpha = _by_pattern(alphas, path, config.get(_ALPHAS[config.get("peft_type") or "LORA"], _DEFAULT_ALPHA), source)
    if rank is not None and r != rank:
        raise ValueError(f"{source} states rank {r:g} of {path}, which is {rank}: use this LoRA's own configuration")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any, source: str) -> float:
    """Returns the value of the first pattern, a regular expression for the last components of a path, that matches."""
    try:
        value = next((x for key, x in patterns.items() if matches(key, path)), default)
    except ValueError as error:
        raise ValueError(f"{source} cannot be used ({error}): correct it") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{source} states {value!r} as rank or alpha of {path}: a positive number was expected")
    return value


def _diffusers_configs(metadata: Mapping[str, str]) -> Mapping[str, Config]:
    """Returns the configurations by component ("prior", ...), or of a single network under ""; {} if there is none."""
    try:
        fields = parse_json(metadata.get(DIFFUSERS_CONFIG, "{}"))
    except ValueError:  # not written by diffusers
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items() if isinstance(fields, dict) else ():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return {component: config for component, config in configs.items() if config.keys() & _STATED}


def _kohya_alpha(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> float | None:
    """Returns the alpha that a header of Kohya or LyCORIS states for an adapter; None if it states none."""
    try:
        arguments = parse_json(metadata.get("ss_network_args") or "{}")
        is_spatial = any(x.ndim == 4 and x.shape[-1] > 1 for x in tensors.values())
        alpha = float((is_spatial and arguments.get("conv_alpha")) or metadata[KOHYA_ALPHA])
        return alpha if alpha and math.isfinite(alpha) else None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
