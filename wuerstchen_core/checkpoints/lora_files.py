"""Reads LoRA files and folders as adapters by our module paths, and converts them for ComfyUI."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.text import listed, parse_json
from .adapters import Adapter, Adapters, Fit, is_complete, keys_of, rank_of, tucker
from .components import State
from .damage import names_source
from .embeddings import BUNDLED
from .lazy import load_state
from .lora_config import DIFFUSERS_CONFIG, KOHYA_ALPHA, PEFT_CONFIG, Config, set_alphas
from .lora_folders import ENDINGS, STEMS, find_loras
from .lora_keys import PEFT_PREFIX, family, parse_key, stage_of
from .modelspec import FIELD, has_spec, spec_header, stated_fields
from .shipped import LORAS, given_path
from .weight_files import read_file_metadata, read_json, read_weight_file
from .writer import write_tensors

logger = logging.getLogger(__name__)

NETWORK_PREFIX = "diffusion_model."  # of a network's keys in ComfyUI's LoRA files

_CLIP = re.compile(r"(?:^|\.)(clip_[gh])\.transformer\.")


@dataclass(frozen=True)
class Lora:
    """Adapters in a LoRA file: of the network, and of a text tower (transformers' paths below `text_model`).

    `unknown` are keys of unsupported adapters, `embeddings` bundled textual inversions by key. `clip` is ComfyUI's
    name of the tower: clip_g, or clip_h for Stage B's. `strength` says where alphas are stated, if they are; `note`
    says what is doubtful about the strength or the settings. `sampling` are the settings that a distilled model needs.
    """

    network: Adapters = field(default_factory=dict)
    text: Adapters = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    embeddings: State = field(default_factory=dict)
    clip: str = "clip_g"
    strength: str = ""
    note: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All keys except those of embeddings."""
        return [*keys_of(self.network), *keys_of(self.text), *self.unknown]

    def family(self) -> str:
        """Returns the name of the model that the keys suggest."""
        return family(self.keys)


@names_source
def read_lora(path: str | os.PathLike[str]) -> Lora:
    """Reads a LoRA from a safetensors or PyTorch file, or from a folder of PEFT or diffusers.

    Supported are LoRA, LoHa, LoKr (all also with Tucker cores), each with or without DoRA's magnitudes, OFT, and
    differences or new values of weights and biases; not GLoRA, BOFT and rescaled OFT. Raises ValueError if there is no
    supported adapter, or a configuration beside it asks for something unsupported.
    """
    path = given_path(path)
    if not path.exists():
        names = " or ".join(f'"{name}"' for name in LORAS)
        raise ValueError(f"{path} does not exist: give a LoRA file or folder, or {names}")
    files = find_loras(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no LoRA file: expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")
    loras = [_read_file(file) for file in files]
    lora = loras[0]
    for other in loras[1:]:  # the text encoder's beside the prior's
        clip = other.clip if other.text else lora.clip
        lora = Lora(
            lora.network | other.network,
            lora.text | other.text,
            lora.unknown + other.unknown,
            lora.embeddings | other.embeddings,
            clip,
            lora.strength or other.strength,
            lora.note or other.note,
            lora.sampling,
        )
    if not lora.network and not lora.text:
        raise _unsupported(path.name, lora)
    return lora


def _read_file(path: Path) -> Lora:
    content = read_weight_file(path)
    state = load_state(next(iter(content.states.values())))
    config, note = _peft_config(path, state)
    try:
        lora = lora_from_state(state, content.metadata, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sampling, damage = _sampling(content.metadata)
    notes = filter(None, (note, lora.note, damage))
    return replace(lora, note="; ".join(notes), sampling=sampling)


def _sampling(header: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Returns the settings of sampling in a header that `train distill-lora` wrote, and a note if they are damaged."""
    if "distillation" not in header:
        return {}, ""
    try:
        settings = parse_json(header.get("sampling", "{}"))
    except ValueError:
        settings = None
    if isinstance(settings, dict):
        return settings, ""
    return {}, "it was distilled for few steps, and its header's settings for them cannot be read"


def _peft_config(path: Path, state: State) -> tuple[Config | None, str]:
    """Returns the PEFT configuration beside a file, and a note if there should be one that is certainly the file's."""
    file = path.with_name(PEFT_CONFIG)
    if not any(PEFT_PREFIX in key for key in state):
        return None, ""
    if not file.is_file():
        reason = f"has no {PEFT_CONFIG} beside it, which states its strength"
    elif path.stem not in STEMS and sum(other.suffix in ENDINGS for other in path.parent.iterdir()) > 1:
        reason = f"is beside other files, so {PEFT_CONFIG} there may not be its own"
    else:
        return read_json(file), ""
    return None, f"it {reason}: alpha is taken to be the rank; give the folder that PEFT wrote for the trained strength"


def lora_from_state(state: State, metadata: Mapping[str, str] | None = None, config: Config | None = None) -> Lora:
    """Returns the adapters in a file's tensors.

    Where tensors state no alpha, it is that of PEFT's configuration `config`, or of diffusers' or Kohya's in the
    header `metadata`; without any, adapters are not scaled. Raises ValueError for a configuration that does not fit,
    and for values that are not finite.
    """
    targets: dict[str, Adapters] = {"network": {}, "text": {}}
    unknown: list[str] = []
    embeddings: State = {}
    for key, x in state.items():
        if ".original_module." in key:  # PEFT's copy of what `modules_to_save` replaces
            continue
        if key.startswith(BUNDLED):
            embeddings[key] = x
            continue
        target, path, tensor = parse_key(key)
        adapter = targets.get(target, {}).setdefault(path, Adapter())
        is_number = x.is_floating_point() or tensor == "alpha"
        if target not in targets or not is_number or tensor in adapter.tensors:  # a repetition in another naming
            if not (tensor == "set_weight" and key.startswith(PEFT_PREFIX)):  # PEFT writes some biases twice
                unknown.append(key)
        else:
            if not x.float().isfinite().all():
                raise ValueError(f"{key} has values that are not finite: use a file from before the training diverged")
            if x.numel() != 1 if tensor == "alpha" else not x.numel() or not x.ndim:
                raise ValueError(f"{key} has the shape {list(x.shape)}, which no adapter has: download the file again")
            adapter.keys.append(key)
            adapter.tensors[tensor] = x
    strength = set_alphas(targets, metadata or {}, config)
    for adapters in targets.values():
        for path, adapter in list(adapters.items()):
            _normalise(adapter.tensors)
            if not is_complete(adapter):
                unknown += adapters.pop(path).keys
            elif (bias := adapters.get(f"{path}.bias")) and "diff_b" in adapter.tensors:  # one change per parameter
                bias.tensors["set_weight"] = bias.tensors["set_weight"] + adapter.tensors.pop("diff_b")
    clip = next((found[1] for key in keys_of(targets["text"]) if (found := _CLIP.search(key))), "clip_g")
    note = "its tensors have no alpha, so that of the header is used" if KOHYA_ALPHA in strength else ""
    return Lora(targets["network"], targets["text"], tuple(unknown), embeddings, clip, strength, note)


def _normalise(tensors: dict[str, Tensor]) -> None:
    """Brings tensors to the shapes that ComfyUI's adapters expect."""
    magnitude = tensors.pop("magnitude", None)  # PEFT's: [out] or [1, out, 1, 1]
    if magnitude is not None:
        tensors["dora_scale"] = magnitude[:, None] if magnitude.ndim == 1 else magnitude.transpose(0, 1)
    for name, x in tensors.items():
        if name.startswith("hada_w") and x.ndim == 4:  # OneTrainer's convolutions
            tensors[name] = x.flatten(1)
    rank, alpha = rank_of(tensors), tensors.get("alpha")
    scale = 1.0 if rank is None or alpha is None else float(alpha) / rank
    if "lora_bias" in tensors and "dora_scale" not in tensors:  # PEFT's: added to the layer's bias
        tensors["diff_b"] = tensors.pop("lora_bias") * scale
    if tensors.keys() >= {"lokr_t2", "lokr_w2_a", "lokr_w2_b"}:  # a Tucker core
        a, b, core = (tensors.pop(f"lokr_{name}") for name in ("w2_a", "w2_b", "t2"))
        tensors["lokr_w2"] = tucker(a, b, core).unflatten(1, (-1, *core.shape[2:])) * scale
        tensors.pop("alpha", None)


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
    """Writes a LoRA of any naming as a file with ComfyUI's keys and its metadata; logs one line about what is left out.

    Alphas are in the tensors then.
    """
    lora = read_lora(path)
    state = to_comfyui(lora.network, lora.text, lora.clip) | lora.embeddings
    write_tensors(target, state, converted_metadata(path, state))
    log_ignored(path.name, lora, ())


def converted_metadata(path: Path, state: State) -> dict[str, str]:
    """Returns the header of a LoRA that is written under ComfyUI's keys: its own, with the fields of `modelspec`."""
    metadata = read_file_metadata(find_loras(path)[0] if path.is_dir() else path)
    metadata.pop(DIFFUSERS_CONFIG, None)  # alphas are tensors now
    modules = (key.removeprefix(NETWORK_PREFIX) for key in state if key.startswith(NETWORK_PREFIX))
    stage = next((name for module in modules if (name := stage_of(module))), None)
    if stage and not has_spec(metadata):
        stated = {"title": metadata.get("ss_output_name"), **stated_fields(metadata)}
        metadata = spec_header([stage], {FIELD: stated}, "v2", kind="lora") | metadata
    return metadata


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
    ]
    return [f"{len(keys)} {title} ({listed(keys)}{note})" for title, keys, note in groups if keys]


def log_ignored(name: str, lora: Lora, fits: Iterable[Fit]) -> None:
    """Logs one line about the keys that are not applied, and one about what is doubtful."""
    if unused := ignored(lora, fits):
        logger.warning(f"{name}: ignored {'; '.join(unused)}")
    if lora.note:
        logger.warning(f"{name}: {lora.note}")


def _unsupported(name: str, lora: Lora) -> ValueError:
    keys = listed(lora.unknown, width=100) or "embeddings only"
    return ValueError(
        f"{name} uses an unsupported adapter format ({keys}): use a file of LoRA, LoHa, LoKr, OFT or differences"
    )
