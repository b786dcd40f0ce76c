"""Reads LoRA files in every trainer's key names as adapters by our module paths, merges and converts them.

A key names the network or a text tower, a module in it, and one of the tensors that change the module's weight. It is
dotted (diffusers, PEFT, ComfyUI, OneTrainer) or flat, with underscores between modules (Kohya, OneTrainer's KOHYA_LORA
and its files of 2023 and 2024).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.text import listed
from .adapters import Adapter, Adapters, Fit, fit, is_complete, keys_of, merge_lora
from .components import TOWERS, State
from .key_maps import COMFYUI_CLIPS, text_from_transformers, text_to_transformers
from .weight_files import read_file_metadata, read_weight_file
from .writer import write_tensors

logger = logging.getLogger(__name__)

Loras = Mapping[str | os.PathLike[str], float]  # strength by file

# Ends of keys, and ComfyUI's name of that tensor. `lora_A` is PEFT's, followed by the adapter's name in files that
# PEFT itself wrote; `processor.to_q_lora.down` is diffusers' of 2023.
_TENSORS = tuple(
    (re.compile(rf"[._]{end}$"), tensor)
    for end, tensor in (
        (r"lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?", "lora_down.weight"),
        (r"lora(?:_linear_layer)?[._](?:up|B)(?:\.default)?(?:\.weight)?", "lora_up.weight"),
        (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
        (r"w_norm", "diff"),  # LyCORIS' differences of norms
        (r"b_norm", "diff_b"),
        *((name, name) for name in ("alpha", "dora_scale", "diff", "diff_b", "set_weight", "oft_blocks")),
        *((f"{name}_{side}",) * 2 for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for side in "ab"),
        *((name, name) for name in ("lokr_w1", "lokr_w2", "hada_t1", "hada_t2")),
        (r"lora_mid\.weight", "lora_mid.weight"),
        # Unsupported, so that their modules are left out. ComfyUI applies no LoKr with a Tucker core either.
        (r"(?:[ab][12]\.weight|oft_\w+(?:\.weight)?|lokr_t2|rescale|reshape_weight|lora_B\.bias)", None),
    )
)

_TEXT = re.compile(
    r"^(?:(?:text_encoder|(?:text_encoders\.)?clip_[a-z]\.transformer)\.|lora_(?:prior_te|te1?)[._])"
    r"(?:base_model\.model\.)?(?:text_model[._])?|^text_model[._]"
)
_NETWORK = re.compile(
    r"^(?:(?:prior|unet|model|diffusion_model|base_model\.model)\.|lora_(?:prior_unet|prior_prior|unet)[._]|lycoris_)*"
)
# The underscores of a flat path that stand for dots: next to a number, and after these modules.
_DOTS = re.compile(r"_(?=\d+(?:_|$))|(?<=\d)_|(?<=attention)_|(?<=self_attn)_|(?<=encoder)_|(?<=mlp)_")

_EMBEDDINGS = "bundle_emb."  # textual inversions that OneTrainer stores in the same file

NETWORK_PREFIX = "diffusion_model."  # of a network's keys in ComfyUI's LoRA files
_CLIP = re.compile(r"(?:^|\.)(clip_[gh])\.transformer\.")
_CLIPS = dict(zip(COMFYUI_CLIPS.values(), TOWERS, strict=True))

_FAMILIES = (
    (r"lora_te2|text_encoder_2|(?:input|output|mid)_block|_blocks[._]\d+[._]attentions", "Stable Diffusion or SDXL"),
    (r"double_blocks|single_(?:transformer_)?blocks", "Flux"),
    (r"attention[._]attn[._]", "Stable Cascade"),
    (r"(?:down|up)_blocks[._]\d+[._]\d+[._]", "Würstchen's decoder or Stable Cascade"),
    (r"(?:^|[._])blocks[._]\d+[._]attention[._]", "Würstchen's prior"),
    (r"transformer", "a model of another family"),
)


@dataclass(frozen=True)
class Lora:
    """Adapters in a LoRA file: of the network, and of a text tower (transformers' paths below `text_model`).

    `unknown` are keys of unsupported adapters, `embeddings` those of bundled textual inversions. `clip` is ComfyUI's
    name of the tower: clip_g, or clip_h for Stage B's.
    """

    network: Adapters
    text: Adapters
    unknown: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    clip: str = "clip_g"

    @property
    def keys(self) -> list[str]:
        """All keys except those of embeddings."""
        return [*keys_of(self.network), *keys_of(self.text), *self.unknown]

    def family(self) -> str:
        """Returns the name of the model that the keys suggest."""
        keys = self.keys
        return next((name for mark, name in _FAMILIES if any(re.search(mark, key) for key in keys)), "another model")


def read_lora(path: str | os.PathLike[str]) -> Lora:
    """Reads a LoRA from a safetensors or PyTorch file. Raises ValueError if it holds no supported adapter.

    Supported are LoRA, LoHa (both also with Tucker cores), LoKr, each with or without DoRA's magnitudes, OFT, and
    differences or new values of weights and biases; not GLoRA, BOFT, rescaled OFT and LoKr with a Tucker core.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a LoRA file")
    content = read_weight_file(path)
    lora = lora_from_state(next(iter(content.states.values())), content.metadata)
    if not lora.network and not lora.text:
        raise _unsupported(path.name, lora)
    return lora


def lora_from_state(state: State, metadata: Mapping[str, str] | None = None) -> Lora:
    """Returns the adapters in a file's tensors; `metadata` is the file's, in which diffusers may store alpha."""
    targets: dict[str, Adapters] = {"network": {}, "text": {}}
    unknown, embeddings = [], []
    for key, x in state.items():
        if key.startswith(_EMBEDDINGS):
            embeddings.append(key)
            continue
        target, path, tensor = parse_key(key)
        adapter = targets.get(target, {}).setdefault(path, Adapter())
        if target not in targets or tensor in adapter.tensors:  # a repetition in another naming
            unknown.append(key)
        else:
            adapter.keys.append(key)
            adapter.tensors[tensor] = x
    for adapters in targets.values():
        for path, adapter in list(adapters.items()):
            _normalise(adapter.tensors)
            if not is_complete(adapter):
                unknown += adapters.pop(path).keys
    for name, target in (("prior", "network"), ("text_encoder", "text")):
        _set_alpha(targets[target], metadata or {}, name)
    clip = next((found[1] for key in keys_of(targets["text"]) if (found := _CLIP.search(key))), "clip_g")
    return Lora(targets["network"], targets["text"], tuple(unknown), tuple(embeddings), clip)


def parse_key(key: str) -> tuple[str, str, str]:
    """Splits a key into ("network" or "text", module path, tensor); all are empty if it is not an adapter's key."""
    for end, tensor in _TENSORS:
        found = end.search(key)
        if found:
            return (*_parse_path(key[: found.start()]), tensor or found[0])
    return "", "", ""


def _parse_path(path: str) -> tuple[str, str]:
    text = _TEXT.match(path)
    path = path[text.end() :] if text else _NETWORK.sub("", path)
    if "." not in path:
        path = _DOTS.sub(".", path)
    if text:
        return "text", re.sub(r"(?<=self_attn\.)to_(q|k|v|out)$", r"\1_proj", path)
    return "network", re.sub(r"(?<=\.to_out)$", ".0", path.replace(".processor.", "."))


def _normalise(tensors: dict[str, Tensor]) -> None:
    """Brings tensors to the shapes that ComfyUI's adapters expect."""
    magnitude = tensors.pop("magnitude", None)  # PEFT's: [out] or [1, out, 1, 1]
    if magnitude is not None:
        tensors["dora_scale"] = magnitude[:, None] if magnitude.ndim == 1 else magnitude.transpose(0, 1)
    for name, x in tensors.items():
        if name.startswith("hada_w") and x.ndim == 4:  # OneTrainer's convolutions
            tensors[name] = x.flatten(1)


def _set_alpha(adapters: Adapters, metadata: Mapping[str, str], name: str) -> None:
    """Sets missing alphas to the one in diffusers' metadata for `name`; without alpha, an adapter is not scaled."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:  # not written by diffusers
        return
    alpha = config.get(f"{name}.lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, int | float):
        return
    patterns = config.get(f"{name}.alpha_pattern") or {}
    for path, adapter in adapters.items():
        down = adapter.tensors.get("lora_down.weight")
        if down is not None and "alpha" not in adapter.tensors:
            own = next((value for part, value in patterns.items() if f".{path}".endswith(f".{part}")), alpha)
            scale = math.sqrt(down.shape[0]) if config.get(f"{name}.use_rslora") else 1.0
            adapter.tensors["alpha"] = torch.tensor(float(own) * scale)


def is_lora(path: Path) -> bool:
    """True for a weight file that has keys of adapters; False for other files and folders."""
    if path.is_dir() or path.suffix == ".json":  # the index of a sharded file
        return False
    content = read_weight_file(path, headers_only=True)
    return any(parse_key(key)[0] for state in content.states.values() for key in state)


def to_comfyui(network: Adapters, text: Adapters, clip: str) -> State:
    """Returns the tensors of adapters under the keys that ComfyUI's own LoRA loaders read."""
    text_prefix = f"text_encoders.{clip}.transformer.text_model."
    return {
        f"{prefix}{path}.{name}": x
        for prefix, adapters in ((NETWORK_PREFIX, network), (text_prefix, text))
        for path, adapter in adapters.items()
        for name, x in adapter.tensors.items()
    }


def convert_lora(path: Path, target: Path) -> None:
    """Writes a LoRA file of any naming under ComfyUI's keys, with its metadata; logs one line about keys left out."""
    lora = read_lora(path)
    write_tensors(target, to_comfyui(lora.network, lora.text, lora.clip), read_file_metadata(path))
    log_ignored(path.name, lora, ())


def ignored(lora: Lora, fits: Iterable[Fit]) -> list[str]:
    """Returns descriptions of the keys that are not applied, each with their number and examples."""
    fits = list(fits)
    groups = [
        ("keys of unsupported formats", lora.unknown, ""),
        ("keys of unknown modules", [key for found in fits for key in keys_of(found.absent)], ""),
        (
            "keys of another size",
            [key for found in fits for key in keys_of(found.misshaped)],
            next((f"; {found.example}" for found in fits if found.example), ""),
        ),
        ("bundled embeddings", lora.embeddings, "; not part of a LoRA"),
    ]
    return [f"{len(keys)} {title} ({listed(keys)}{note})" for title, keys, note in groups if keys]


def log_ignored(name: str, lora: Lora, fits: Iterable[Fit]) -> None:
    """Logs one line about the keys that are not applied."""
    if unused := ignored(lora, fits):
        logger.warning(f"{name}: ignored {'; '.join(unused)}")


def merge_loras(networks: dict[str, Any], loras: Loras) -> None:
    """Merges LoRA files into the stage that each fits, and its text tower. Networks that two parts share are replaced.

    Logs one line about the keys that are not applied; raises ValueError if nothing fits the stage or the text tower.
    """
    for file, strength in loras.items():
        name, lora = Path(file).name, read_lora(file)
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {name} must be a number such as 0.8, got {strength}")
        parts = ((_stage_of(networks, lora), lora.network), (_CLIPS[lora.clip], lora.text))
        fits = [_merge(networks, part, adapters, strength, name, lora) for part, adapters in parts if adapters]
        log_ignored(name, lora, fits)


def _stage_of(networks: Mapping[str, nn.Module | None], lora: Lora) -> str:
    """Returns the stage that most adapters of a LoRA fit: the prior if none fits."""
    counts = {
        name: len(fit(lora.network, _shapes(network.state_dict())).fitting)
        for name in ("prior", "decoder", "token_decoder")
        if (network := networks.get(name)) is not None
    }
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else "prior"


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: x.shape for key, x in state.items()}


def _merge(networks: dict[str, Any], part: str, adapters: Adapters, strength: float, name: str, lora: Lora) -> Fit:
    network: nn.Module | None = networks.get(part)
    title, is_tower = part.replace("_", " "), part in TOWERS
    if network is None:
        raise ValueError(f"{name} changes the {title}, which this model lacks: load a complete model")
    state = text_to_transformers(network.state_dict()) if is_tower else network.state_dict()
    found = fit(adapters, _shapes(state))
    if not found.fitting:
        keys = keys_of(adapters)
        reason = found.example or f"such as {listed(keys, most=1, width=100)}"
        raise ValueError(
            f"none of the {len(keys)} keys of {name} fits this {title} ({reason}; it seems to be for {lora.family()}): "
            "use a LoRA for this model"
        )
    merged = merge_lora(state, found.fitting, strength)
    if any(other is network for key, other in networks.items() if key != part):  # the decoder keeps the unchanged tower
        network = networks[part] = deepcopy(network)
    network.load_state_dict(text_from_transformers(merged) if is_tower else merged, assign=True)
    return found


def _unsupported(name: str, lora: Lora) -> ValueError:
    keys = listed(lora.unknown, width=100) or "embeddings only"
    return ValueError(
        f"{name} uses an unsupported adapter format ({keys}): use a file of LoRA, LoHa, LoKr, OFT or differences"
    )
