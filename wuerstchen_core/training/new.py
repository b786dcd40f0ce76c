"""Writes configurations to start from: of LoRAs, embeddings and fine-tunes, and of a whole model from scratch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .. import demo
from ..checkpoints.components import TOWERS, text_width
from ..checkpoints.open import open_source
from ..checkpoints.release import release_of_model
from ..checkpoints.source import Source
from ..common.atomic import write_text
from ..common.command_line import command
from ..common.geometry import check_size, nearest_legal
from ..common.text import check_choice, check_name
from ..common.toml import toml_value, write_toml
from ..inference.settings import SamplingSettings
from .config import INPUTS, read_config
from .data.folder import FolderSource

RECIPES = {  # by name, what it is for
    "lora": "a LoRA of a style or thing",
    "embedding": "a new word for a style or thing, by textual inversion",
    "finetune": "a fine-tune of Stage C",
    "resolution": "a fine-tune of Stage C for another size",
    "control": "a ControlNet for Stage C, which steers it by outlines and the like",
    "decoder-lora": "a LoRA of Stage B, for pictures unlike those that it can show",
    "distill": "LoRAs with which both stages need few steps",
    "scratch": "all stages of a small model",
}
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # of a model from scratch, in order
LARGE = 1024  # channels, from which on the settings for the released models fit
# Settings by recipe: first for small networks like the demo's, then for the released ones.
SETTINGS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (
        {"steps": 400, "batch": 12, "accumulate": 1, "lr": "4e-3", "rank": 32},
        {"steps": 2000, "batch": 4, "accumulate": 4, "lr": "1e-4", "rank": 16},
    ),
    "decoder-lora": (
        {"steps": 600, "batch": 8, "accumulate": 1, "lr": "6e-3", "rank": 16},
        {"steps": 2000, "batch": 2, "accumulate": 8, "lr": "1e-4", "rank": 16},
    ),
    "control": (
        {"steps": 2000, "batch": 16, "accumulate": 1, "lr": "2e-3"}
        | {"widths": "[32, 64, 128, 160]", "repeats": "[1, 1, 1, 2]"},
        {"steps": 20_000, "batch": 8, "accumulate": 4, "lr": "1e-4"}
        | {"widths": "[64, 128, 256, 512]", "repeats": "[1, 1, 2, 4]"},
    ),
    "embedding": (
        {"steps": 300, "batch": 12, "accumulate": 1, "lr": "2e-2"},
        {"steps": 2000, "batch": 4, "accumulate": 4, "lr": "5e-3"},
    ),
    "distill": (
        {"steps": 600, "batch": 16, "accumulate": 1, "lr": "3e-3", "rank": 16},
        {"steps": 10_000, "batch": 2, "accumulate": 8, "lr": "1e-4", "rank": 64},
    ),
    "finetune": (
        {"steps": 1500, "batch": 16, "accumulate": 1, "lr": "3e-4"},
        {"steps": 10_000, "batch": 4, "accumulate": 16, "lr": "1e-5"},
    ),
    "resolution": (
        {"steps": 1500, "batch": 16, "accumulate": 1, "lr": "1e-3"},
        {"steps": 10_000, "batch": 4, "accumulate": 16, "lr": "1e-5"},
    ),
}
SCALES = (
    {"weight": "v", "precision": "", "checkpointing": "false", "keep_every": 250},
    {"weight": "p2", "precision": "bf16", "checkpointing": "true", "keep_every": 2500},  # 4 GB each
)
STUDENTS = {  # steps of a distilled stage, of its teacher for each of them, and text_drop, in the same order
    "distill-lora": ((2, 3, 0.2), (4, 8, 0.05)),
    "decoder-distill-lora": ((1, 4, 0.05), (2, 12, 0.05)),
}
PURPOSES = {  # of the templates that serve several stages
    "lora": "a LoRA of a style or thing, from a folder of a dozen to a few thousand pictures",
    "decoder-lora": "a LoRA of Stage B, which makes it show pictures like those of a folder better",
    "embedding": "a new word for a style or thing, from a folder of a few to a few dozen pictures",
    "distill-lora": "a LoRA with which Stage C needs few steps and no guidance",
    "decoder-distill-lora": "a LoRA with which Stage B needs few steps",
    "decoder-embedding": "the same word for the text encoder of Stage B. Train embedding.toml first",
}
_TARGETS = 'targets = ["to_q", "to_k", "to_v", "to_out.0", {}"channelwise.0", "channelwise.4"] # attention, {}MLPs\n'
TARGETS = {  # by recipe, first for small networks: a small prior learns a new thing through more than its attention
    "lora": (_TARGETS.format('"kv_mapper.1", ', "text projections, "), ""),
    "decoder-lora": (_TARGETS.format("", ""),) * 2,
}
FOLDER = Path(__file__).parent / "templates"
DEMO_RECIPES = Path(demo.__file__).parent / "recipe"


def write_new(folder: Path, recipe: str, models: Sequence[str], pictures: Path | None, size: int | None) -> list[Path]:
    """Writes the configurations of a recipe into a folder, and returns their paths in the order of their training.

    `models` are sources that together have the parts of the base model; `pictures` defaults to `folder / "pictures"`,
    `size` (pixels) to the base model's own. Files that exist and are the same stay. ValueError if a file exists with
    other content, a name is not UTF-8, a part is missing or the size is impossible.
    """
    check_choice("recipe", recipe, RECIPES)
    if size is not None:
        check_size(size, size)
    pictures = pictures or folder / "pictures"
    check_name(folder)
    check_name(pictures)
    if recipe == "scratch":
        texts = {stage: _from_scratch(folder, stage, pictures, size or 256) for stage in STAGES}
    else:
        opened = {model: open_source(model, headers_only=True) for model in models}
        stages = _stages(recipe, opened)
        texts = {stage: _from_template(folder, stage, recipe, opened, pictures, size) for stage in stages}
    paths = {folder / f"{stage}.toml": text for stage, text in texts.items()}
    missing = {path: text for path, text in paths.items() if not path.exists()}
    if other := [str(path) for path, text in paths.items() if path not in missing and not _contains(path, text)]:
        raise ValueError(f"{other[0]} exists with other content: remove it, or choose another folder")
    for path, text in missing.items():
        write_text(path, text)
    return list(paths)


def _contains(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8", errors="replace") == text


def count_pictures(folder: Path) -> tuple[int, int]:
    """Returns the number of pictures in and below a folder, 0 if there is none, and of those with a caption."""
    if not folder.is_dir():
        return 0, 0
    source = FolderSource([folder])
    pictures = np.flatnonzero(source.records["line"] == 0).tolist()
    captions = 0
    for index in pictures:
        with suppress(ValueError):
            captions += source.caption(index) != ""
    return len(pictures), captions


def train_arguments(path: Path) -> list[str]:
    """Returns the arguments of the command line that train what a configuration of `write_new` describes."""
    return ["train", path.stem, "--config", str(path)]


def _stages(recipe: str, opened: Mapping[str, Source]) -> tuple[str, ...]:
    """Returns the stages that a recipe trains, for the parts of the base model."""
    if recipe in ("finetune", "resolution"):
        return ("prior",)
    prior, decoder, tokens = (_params(opened, part) for part in ("prior", "decoder", "token_decoder"))
    if recipe == "distill":
        return tuple(stage for stage in STUDENTS if decoder is not None or not stage.startswith("decoder"))
    if recipe == "decoder-lora" and decoder is None and tokens is not None:
        return ("token-decoder-lora",)
    if recipe == "embedding" and prior and decoder and text_width(prior) != text_width(decoder):
        return ("embedding", "decoder-embedding")
    return (recipe,)


def _params(opened: Mapping[str, Source], part: str) -> Any:
    """Returns the params of a part of the base model; None without it."""
    return next((one.lazy_part(part).params for one in opened.values() if part in one.networks), None)


def _from_template(
    folder: Path, stage: str, recipe: str, opened: Mapping[str, Source], pictures: Path, size: int | None
) -> str:
    base = "prior" if "decoder" not in stage else "token-decoder" if "token" in stage else "decoder"
    params = _params(opened, INPUTS[base])
    parts = {**INPUTS, "text": TOWERS[base != "prior"]}
    found = {name: model for name, part in parts.items() if (model := _first(opened, part, params))}
    needed = (base, "encoder", "text") if base == "prior" else (base, "vqgan", "encoder", "text")
    if missing := [name for name in needed if name not in found]:
        lacking = ", ".join(parts[name].replace("_", " ") for name in missing)
        raise ValueError(f"{', '.join(opened)} has no {lacking}: name more files or folders after --model")
    start = found[base]
    inputs = {name: model for name, model in found.items() if stage != name}
    scale = int((params.c if base == "prior" else max(params.c_hidden)) >= LARGE)
    own = _own_size(opened[start].metadata, 1024 if scale else 256)
    size = size or nearest_legal(own * 3 // 2 if recipe == "resolution" else own)
    kind, title = stage.removeprefix("token-"), folder.resolve().name
    values: dict[str, Any] = {**SETTINGS[recipe][scale], **SCALES[scale], "size": size, "multiple": _multiple(size)}
    name = re.sub(r"[^\w.-]+", "-", title)
    first = (folder / "embedding" / f"{name}.safetensors").as_posix()
    blocks = {
        "weight": "" if base == "token-decoder" else f'weight = "{values["weight"]}"\n',
        "targets": TARGETS[recipe][scale] if recipe in TARGETS else "",
        "go_on": f"start = {toml_value(first)}\n" if kind == "decoder-embedding" else "",
        "sample": (FOLDER / "sample.toml").read_text("utf-8") if base == "prior" else "",
    }
    if stage in STUDENTS:
        student, teacher, text_drop = STUDENTS[stage][scale]
        settings = SamplingSettings.from_metadata(opened[start].metadata, release_of_model([params]))
        guidance = max(1.0, settings.prior_guidance if base == "prior" else settings.decoder_guidance)
        blocks |= {"student_steps": str(student), "teacher_steps": str(teacher)}
        blocks |= {"guidance": str(guidance), "text_drop": str(text_drop)}
    text = Template((FOLDER / f"{kind.removeprefix('decoder-')}.toml").read_text("utf-8"))
    return text.substitute(
        values | blocks,
        stage=stage,
        title=title,
        quoted_title=toml_value(title),
        purpose=f" for {size}x{size} pixels" if recipe == "resolution" else PURPOSES.get(kind, ""),
        command=command(train_arguments(folder / f"{stage}.toml")),
        run=toml_value(folder.as_posix()),
        start=toml_value(start),
        inputs="\n".join(f"{name} = {toml_value(model)}" for name, model in inputs.items()),
        pictures=toml_value(pictures.as_posix()),
        ratio=2.0 if size >= 512 else 1.0,
        name=toml_value(name),
    )


def _first(opened: Mapping[str, Source], part: str, params: Any) -> str:
    """Returns the source of a part; of a text encoder, of one that has the width that a network with `params` reads."""

    def fits(source: Source) -> bool:
        if part not in source.networks:
            return False
        return part not in TOWERS or params is None or source.lazy_part(part).params.width == text_width(params)

    return next((model for model, source in opened.items() if fits(source)), "")


def _multiple(size: int) -> int:
    return 64 if size % 128 else 128


def _own_size(metadata: Mapping[str, Any], default: int) -> int:
    sampling = metadata.get("sampling", {})
    return int(sampling.get("width", default))


def _from_scratch(folder: Path, stage: str, pictures: Path, size: int) -> str:
    """Returns the demo's configuration of a stage, with pictures instead of its drawings."""
    path = DEMO_RECIPES / f"{stage}.toml"
    config = read_config(path, [])
    data = {"source": pictures.as_posix(), "size": size, "multiple": _multiple(size)}
    config |= {"run": folder.as_posix(), "data": data}
    about = path.read_text("utf-8").splitlines()[0].replace(" of the demo", "")
    return f"{about}\n# `train {stage} --keys` lists all keys.\n{write_toml(config)}"
