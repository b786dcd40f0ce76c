"""LoRA files in the key names of every trainer, to adapters addressed by our module paths.

A key names a place (the network, or a text tower), a module in it, and one of the tensors that change the module's
weight. It is dotted (diffusers, PEFT, ComfyUI, OneTrainer) or flat, with underscores between modules (Kohya,
OneTrainer's KOHYA_LORA and its files of 2023 and 2024).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapter, Adapters, is_complete, keys_of
from .components import State, listed
from .weight_files import read_weight_file

# How a key ends, and which tensor that is, in the words of ComfyUI's own adapters. `lora_A` is PEFT's, with the name
# of the adapter behind it where PEFT itself wrote the file; `processor.to_q_lora.down` diffusers' of 2023.
_TENSORS = tuple(
    (re.compile(rf"[._]{end}$"), tensor)
    for end, tensor in (
        (r"lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?", "lora_down.weight"),
        (r"lora(?:_linear_layer)?[._](?:up|B)(?:\.default)?(?:\.weight)?", "lora_up.weight"),
        (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
        *((name, name) for name in ("alpha", "dora_scale")),
        *((f"{name}_{side}",) * 2 for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for side in "ab"),
        *((name, name) for name in ("lokr_w1", "lokr_w2")),
        # Not understood, and their modules refused: Tucker factors, OFT, GLoRA, PEFT's biases, whole differences.
        (r"(?:(?:lora_mid|oft_R|[ab][12])\.weight|hada_t[12]|lokr_t2|oft_\w+|lora_B\.bias|diff(?:_b)?)", None),
    )
)

_TEXT = re.compile(
    r"^(?:(?:text_encoder|(?:text_encoders\.)?clip_[a-z]\.transformer)\.|lora_(?:prior_te|te1?)[._])"
    r"(?:base_model\.model\.)?(?:text_model[._])?|^text_model[._]"
)
_NETWORK = re.compile(
    r"^(?:(?:prior|unet|model|diffusion_model|base_model\.model)\.|lora_(?:prior_unet|prior_prior|unet)[._]|lycoris_)*"
)
# The underscores of a flat path that stand for dots: beside a number, and behind these modules.
_DOTS = re.compile(r"_(?=\d+(?:_|$))|(?<=\d)_|(?<=attention)_|(?<=self_attn)_|(?<=encoder)_|(?<=mlp)_")

_EMBEDDINGS = "bundle_emb."  # textual inversions that OneTrainer puts into the same file

_FAMILIES = (
    (
        r"lora_te2|text_encoder_2|(?:input|output|mid)_blocks?[._]|_blocks[._]\d+[._]attentions",
        "Stable Diffusion or SDXL",
    ),
    (r"double_blocks|single_(?:transformer_)?blocks", "Flux"),
    (r"attention[._]attn[._]", "Stable Cascade"),
    (r"(?:down|up)_blocks[._]\d+[._]\d+[._]", "Würstchen's decoder or Stable Cascade"),
    (r"(?:^|[._])blocks[._]\d+[._]attention[._]", "Würstchen's prior"),
    (r"transformer", "a model of another family"),
)


@dataclass(frozen=True)
class Lora:
    """A LoRA file: adapters of the network and of a text tower (transformers' paths below `text_model`).

    `unknown` are the keys of no known adapter, `embeddings` those of bundled textual inversions.
    """

    network: Adapters
    text: Adapters
    unknown: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All keys but those of embeddings."""
        return [*keys_of(self.network), *keys_of(self.text), *self.unknown]

    def family(self) -> str:
        """The model that it seems to be made for."""
        keys = self.keys
        return next((name for mark, name in _FAMILIES if any(re.search(mark, key) for key in keys)), "another model")


def read_lora(path: str | os.PathLike[str]) -> Lora:
    """Read a LoRA from a safetensors or PyTorch file; ValueError if it holds no adapter of a kind that is known.

    Known are LoRA, LoHa and LoKr, each also with DoRA's magnitudes; OFT, GLoRA, Tucker factors and whole differences
    are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a LoRA file")
    content = read_weight_file(path)
    lora = lora_from_state(next(iter(content.states.values())), content.metadata)
    if not lora.network and not lora.text:
        raise ValueError(
            f"{path.name} is no LoRA that is understood (its keys: {listed(lora.unknown) or 'embeddings only'}): "
            "LoRA, DoRA, LoHa and LoKr files are"
        )
    return lora


def lora_from_state(state: State, metadata: Mapping[str, str] | None = None) -> Lora:
    """Sort the keys of a file; `metadata` is that of its header, in which diffusers may keep the strength (alpha)."""
    places: dict[str, Adapters] = {"network": {}, "text": {}}
    unknown, embeddings = [], []
    for key, x in state.items():
        if key.startswith(_EMBEDDINGS):
            embeddings.append(key)
            continue
        place, path, tensor = address(key)
        adapter = places.get(place, {}).setdefault(path, Adapter())
        if place not in places or tensor in adapter.tensors:  # the same in two namings: the first counts
            unknown.append(key)
        else:
            adapter.keys.append(key)
            adapter.tensors[tensor] = x
    for adapters in places.values():
        for adapter in adapters.values():
            _shape(adapter.tensors)
        for path in [path for path, adapter in adapters.items() if not is_complete(adapter)]:
            unknown += adapters.pop(path).keys
    for name, place in (("prior", "network"), ("text_encoder", "text")):
        _set_alpha(places[place], metadata or {}, name)
    return Lora(places["network"], places["text"], tuple(unknown), tuple(embeddings), dict(metadata or {}))


def address(key: str) -> tuple[str, str, str]:
    """A key as ("network" or "text", module path, tensor); all empty if it ends as no adapter's key does."""
    for end, tensor in _TENSORS:
        found = end.search(key)
        if found:
            return (*_place(key[: found.start()]), tensor or found[0])
    return "", "", ""


def _place(path: str) -> tuple[str, str]:
    text = _TEXT.match(path)
    path = path[text.end() :] if text else _NETWORK.sub("", path)
    if "." not in path:
        path = _DOTS.sub(".", path)
    if text:
        return "text", re.sub(r"(?<=self_attn\.)to_(q|k|v|out)$", r"\1_proj", path)
    return "network", re.sub(r"(?<=\.to_out)$", ".0", path.replace(".processor.", "."))


def _shape(tensors: dict[str, Tensor]) -> None:
    """Bring tensors to the shapes that ComfyUI's adapters compute with."""
    magnitude = tensors.pop("magnitude", None)  # PEFT's: [out] or [1, out, 1, 1]
    if magnitude is not None:
        tensors["dora_scale"] = magnitude[:, None] if magnitude.ndim == 1 else magnitude.transpose(0, 1)
    for name, x in tensors.items():
        if name.startswith("hada_") and x.ndim == 4:  # OneTrainer's, of a convolution
            tensors[name] = x.flatten(1)


def _set_alpha(adapters: Adapters, metadata: Mapping[str, str], name: str) -> None:
    """Give adapters without an alpha the one that diffusers wrote into the header for `name` (without: their rank)."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:  # a header of another make; diffusers' own is JSON
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
