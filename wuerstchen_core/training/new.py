"""Writes configurations to start from: of a LoRA, of a fine-tune, and of a whole model from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from .. import demo
from ..checkpoints.open import open_source
from ..checkpoints.source import Source
from ..common.atomic import replace_file
from ..common.command_line import command
from ..common.geometry import check_size, nearest_legal
from ..common.text import check_choice
from ..common.toml import toml_value, write_toml
from .config import INPUTS, read_config

RECIPES = {  # by name: the stage, and what it is for
    "lora": "a LoRA of a style or thing",
    "finetune": "a fine-tune of Stage C",
    "resolution": "a fine-tune of Stage C for another size",
    "scratch": "all stages of a small model",
}
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # of a model from scratch, in order
LARGE = 1024  # channels of a prior, from which on the settings for the released models fit
# Settings by stage: first for small priors like the demo's, then for the released ones.
SETTINGS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (
        {"steps": 600, "batch": 12, "accumulate": 1, "lr": "1.5e-3", "rank": 8},
        {"steps": 2000, "batch": 4, "accumulate": 4, "lr": "1e-4", "rank": 16},
    ),
    "prior": (
        {"steps": 1500, "batch": 16, "accumulate": 1, "lr": "3e-4"},
        {"steps": 10_000, "batch": 4, "accumulate": 16, "lr": "1e-5"},
    ),
}
SCALES = (
    {"weight": "v", "precision": "", "checkpointing": "false"},
    {"weight": "p2", "precision": "bf16", "checkpointing": "true"},
)
FOLDER = Path(__file__).parent / "templates"
DEMO_RECIPES = Path(demo.__file__).parent / "recipe"


def write_new(folder: Path, recipe: str, models: Sequence[str], pictures: Path | None, size: int | None) -> list[Path]:
    """Writes the configurations of a recipe into a folder, and returns their paths in the order of their training.

    `models` are sources that together have the parts of the base model; `pictures` defaults to `folder / "pictures"`,
    `size` (pixels) to the base model's own. ValueError if a file exists, a part is missing
    or the size is impossible.
    """
    check_choice("recipe", recipe, RECIPES)
    if size is not None:
        check_size(size, size)
    pictures = pictures or folder / "pictures"
    if recipe == "scratch":
        texts = {stage: _from_scratch(folder, stage, pictures, size or 256) for stage in STAGES}
    else:
        stage = "lora" if recipe == "lora" else "prior"
        texts = {stage: _from_template(folder, stage, recipe, [*models], pictures, size)}
    paths = {folder / f"{stage}.toml": text for stage, text in texts.items()}
    if existing := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"{existing[0]} exists: remove it, or choose another folder")
    for path, text in paths.items():
        replace_file(path, partial(Path.write_text, data=text, encoding="utf-8"))
    return list(paths)


def train_arguments(path: Path) -> list[str]:
    """Returns the arguments of the command line that train what a configuration of `write_new` describes."""
    return ["train", path.stem, "--config", str(path)]


def _from_template(
    folder: Path, stage: str, recipe: str, models: list[str], pictures: Path, size: int | None
) -> str:  # fmt: skip
    opened = {model: open_source(model, headers_only=True) for model in models}
    found = {name: model for name, part in INPUTS.items() if (model := _first(opened, part))}
    if missing := [name for name in ("prior", "encoder", "text") if name not in found]:
        parts = ", ".join(INPUTS[name].replace("_", " ") for name in missing)
        raise ValueError(f"{', '.join(models)} has no {parts}: name more files or folders after --model")
    start = found.pop("prior")
    inputs = {"prior": start, **found} if stage == "lora" else found
    params: Any = opened[start].lazy_part("prior").params
    scale = int(params.c >= LARGE)
    own = _own_size(opened[start].metadata, 1024 if scale else 256)
    size = size or nearest_legal(own * 3 // 2 if recipe == "resolution" else own)
    values = {**SETTINGS[stage][scale], **SCALES[scale], "size": size, "multiple": _multiple(size)}
    text = Template((FOLDER / f"{stage}.toml").read_text("utf-8"))
    return text.substitute(
        values,
        title=folder.resolve().name,
        quoted_title=toml_value(folder.resolve().name),
        purpose=f" for {size}x{size} pixels" if recipe == "resolution" else "",
        command=command(train_arguments(folder / f"{stage}.toml")),
        run=toml_value(folder.as_posix()),
        start=toml_value(start),
        inputs="\n".join(f"{name} = {toml_value(model)}" for name, model in inputs.items()),
        pictures=toml_value(pictures.as_posix()),
        ratio=2.0 if size >= 512 else 1.0,
    )


def _first(opened: Mapping[str, Source], part: str) -> str:
    return next((model for model, source in opened.items() if part in source.networks), "")


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
