"""Writes a model as the folder of a diffusers pipeline: Stage C, Stages B and A, or all three."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.atomic import link_file, write_text
from ..models.tokenizer import vocabulary
from .bundle import AnyPart, merge_towers
from .components import TEXT_ENCODER, TOWERS, parts_of
from .diffusers_layout import CLASSES, CONFIG, TEXT_CLASS, TEXT_FILE, is_in_diffusers, save_component

log = logging.getLogger(__name__)

INDEX, WHOLE = "model_index.json", "WuerstchenCombinedPipeline"
# The modules of the networks in diffusers 0.38 and later, whose packages do not export all that loading them needs.
MODULES = {
    part: f"diffusers.pipelines.deprecated.wuerstchen.modeling_{name}"
    for part, name in (("prior", "wuerstchen_prior"), ("decoder", "wuerstchen_diffnext"), ("vqgan", "paella_vq_model"))
}
PRIOR = {"prior": "prior", "text_encoder": TOWERS[0]}  # folders of WuerstchenPriorPipeline, and their parts
DECODER = {"decoder": "decoder", "vqgan": "vqgan", "text_encoder": TOWERS[1]}  # of WuerstchenDecoderPipeline
PIPELINES = {  # the first one whose networks are there is written
    WHOLE: {**{f"prior_{name}": part for name, part in PRIOR.items()}, **DECODER},
    "WuerstchenPriorPipeline": PRIOR,
    "WuerstchenDecoderPipeline": DECODER,
}
SCHEDULER = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}
_START = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": {"__type": "AddedToken", **_START},
    **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "model_max_length": 77,
}


def write_pipeline(
    folder: Path,
    parts: Mapping[str, AnyPart],
    metadata: Mapping[str, Any],
    dtype: Callable[[str], torch.dtype | None] = lambda name: None,
    progress: Callable[[Path, int, int], None] | None = None,
) -> list[Path]:
    """Writes parts as a pipeline for `from_pretrained`, and returns the files of weights.

    It is WuerstchenCombinedPipeline if there are Stages C and B, else the one of the stage that is there. `dtype`
    returns the dtype of a part's floating-point tensors, None for their own. Files that have them as diffusers does are
    linked, and equal text encoders are stored once. ValueError if a part is missing or unknown to diffusers.
    """
    parts = {name: part for kind, part in parts.items() for name in parts_of(kind)}
    kind = next((name for name, needed in PIPELINES.items() if _denoisers(needed) <= parts.keys()), None)
    if kind is None:
        raise ValueError(f"diffusers' pipelines need a prior or v2's decoder, but there is only {', '.join(parts)}")
    folders = PIPELINES[kind]
    if missing := [part for part in folders.values() if part not in parts]:
        raise ValueError(f"{kind} needs {' and '.join(missing)}: name the files that have them too")
    if unknown := [part for part in folders.values() if not is_in_diffusers(part, parts[part])]:
        raise ValueError(f"diffusers has no {' and '.join(unknown)} of this kind: it has networks of v2 only")
    if others := [part for part in parts if part not in folders.values()]:
        log.warning("%s has no %s: left out", kind, " and ".join(others))
    if TEXT_ENCODER in merge_towers(parts):
        parts |= dict.fromkeys(TOWERS, parts[TOWERS[0]])
    written: dict[tuple[int, torch.dtype | None], Path] = {}
    index: dict[str, Any] = {"_class_name": kind}
    for name, part in folders.items():
        report = None if progress is None else partial(progress, folder / name)
        stored = id(parts[part]), dtype(part)
        if stored in written:
            link_file(written[stored], folder / name / TEXT_FILE)
            link_file(written[stored].with_name(CONFIG), folder / name / CONFIG)
        else:
            written[stored] = save_component(folder / name, part, parts[part], metadata, stored[1], report)
        index[name] = [MODULES[part], CLASSES[part]] if part in MODULES else ["transformers", TEXT_CLASS]
    for prefix in ("prior_", "")[kind != WHOLE :]:
        _write_tokenizer(folder / f"{prefix}tokenizer")
        _write_json(folder / f"{prefix}scheduler" / "scheduler_config.json", SCHEDULER)
        index[f"{prefix}tokenizer"] = ["transformers", TOKENIZER["tokenizer_class"]]
        index[f"{prefix}scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    _write_json(folder / INDEX, index)  # last: the folder is complete
    return list(written.values())


def _denoisers(folders: Mapping[str, str]) -> set[str]:
    return {part for part in folders.values() if part in ("prior", "decoder")}


def _write_tokenizer(folder: Path) -> None:
    ids, merges = vocabulary()
    _write_json(folder / "vocab.json", ids)
    text = "\n".join(["#version: 0.2", *merges, ""])
    write_text(folder / "merges.txt", text)
    _write_json(folder / "tokenizer_config.json", TOKENIZER)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_text(path, text)
