"""Writes the model card of exported weights: README.md with what the Hugging Face hub reads from its head."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .. import demo
from ..checkpoints.diffusers_pipeline import INDEX, WHOLE
from ..checkpoints.shipped import SHIPPED
from ..checkpoints.weight_files import read_json
from ..common.atomic import replace_file, write_text
from ..common.dataclass_config import from_table
from ..common.text import one_line
from .checkpoint import read_log
from .hub import LICENCES, HubConfig, hub_name
from .report import comfyui_use, first_caption, generate_arguments
from .run_folder import read_starts
from .stage import Stage
from .stages.lora_output import DIFFUSERS_FILE
from .stages.networks import weights_metadata

CARD, IMAGES = "README.md", "images"
ARTWORK_LICENCE = Path(demo.__file__).parent / "ARTWORK-LICENSE.txt"  # that of the shipped models names it
TEMPLATE = Path(__file__).parent / "templates" / "card.md.template"
KINDS = {"lora": "lora", "embedding": "textual-inversion"}  # the hub's names by the table of the configuration
DISTILLED = {  # facts by their keys in the metadata
    "Teacher": "teacher",
    "Guidance of the teacher": "guidance",
    "Steps when it generates": "steps",
    "Steps of the teacher for each": "teacher_steps",
}
_MARKUP = re.compile(r"([\\`*_\[\]#|~]|^[-+=]|(?<=\d)[.)](?= ))")


def write_card(
    folder: Path,
    name: str,
    stage: Stage[Any],
    config: Mapping[str, Any],
    run_folder: Path,
    step: int,
    images: Sequence[Image.Image],
) -> None:
    """Writes README.md and the images of the prompts in [sample] into a folder with exported weights.

    `name` is the model's on the hub, NAME or OWNER/NAME, or ""; `step` is that of the weights.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    seeds = stage.sample.seeds
    texts = [prompt for prompt in stage.sample.prompts for _ in seeds]
    pictures = {f"{IMAGES}/{number}.png": image for number, image in enumerate(images)}
    for path, image in pictures.items():
        replace_file(folder / path, partial(image.save, format="PNG"))
    shown = list(zip(texts, pictures, strict=False))
    metadata, words = weights_metadata(stage), list(stage.stated.get("trigger_words", ()))
    hub, licence = from_table(HubConfig, config.get("hub", {}), "hub"), metadata.get("licence", "")
    index = folder / INDEX
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    for_diffusers = bool(pipeline) or (folder / DIFFUSERS_FILE).is_file()
    head = ModelCardData(
        base_model=hub.base_model or next(filter(None, map(hub_name, stage.bases)), None),
        license=hub.license or _licence_name(licence),
        license_name=one_line(licence) if not hub.license and _licence_name(licence) == "other" else None,
        library_name="diffusers" if for_diffusers else None,
        pipeline_tag="text-to-image",
        tags=_tags(stage, for_diffusers),
        instance_prompt=", ".join(words) or None,
        widget=[{"text": text, "output": {"url": path}} for text, path in shown] or None,
    )
    if ARTWORK_LICENCE.name in licence:
        replace_file(folder / ARTWORK_LICENCE.name, partial(shutil.copyfile, ARTWORK_LICENCE))
    address = name if "/" in name else f"OWNER/{name or 'NAME'}"
    name = address.rpartition("/")[2]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": markdown, "fenced": fenced}
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        head=head.to_yaml(),
        title=stage.stated.get("title") or f"Würstchen {stage.name}",
        about=stage.stated.get("description", ""),
        words=words,
        images=shown,
        command=_command(stage, config, folder, pipeline, name),
        download=shlex.join(["hf", "download", address, "--local-dir", name]),
        kind=_kind(stage),
        comfyui=_comfyui(stage, folder),
        name=json.dumps(address),
        pipeline=pipeline,
        for_diffusers=for_diffusers,
        few_steps=", ".join(f"{key} {x}" for key, x in stage.few_steps().items() if x is not None),
        call=diffusers_call(stage, pipeline) if for_diffusers else "",
        facts=_facts(stage, config, run_folder, step),
        licence=licence,
    )
    write_text(folder / CARD, text)


def markdown(text: Any) -> str:
    """Returns text, in one line, that Markdown and HTML show as it is."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def fenced(code: str, language: str) -> str:
    """Returns code as a block of Markdown, which nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"


def _licence_name(licence: str) -> str | None:
    """Returns the hub's name of a licence; None if there is none."""
    known = licence.strip().lower()
    return known if known in LICENCES else "other" if known else None


def _kind(stage: Stage[Any]) -> str:
    """Returns "lora", "textual-inversion" or, for a whole network, ""."""
    return next((kind for table, kind in KINDS.items() if table in stage.tables), "")


def _tags(stage: Stage[Any], for_diffusers: bool) -> list[str]:
    kind = _kind(stage)
    known = ["text-to-image", "wuerstchen", *(["diffusers"] if for_diffusers else []), *([kind] if kind else [])]
    known += ["template:sd-lora"] if kind == "lora" else []  # the hub's gallery of images
    return list(dict.fromkeys([*known, *stage.stated.get("tags", ())]))


def _comfyui(stage: Stage[Any], folder: Path) -> dict[str, str]:
    """Returns file, folder and node with which ComfyUI uses the weights in the folder; {} if no node does."""
    if not stage.comfyui_folder:
        return {}
    parts = sorted(folder.glob(f"*{stage.part}/diffusion_pytorch_model.safetensors"))  # of a pipeline
    file = parts[0].relative_to(folder).as_posix() if parts else f"{stage.stem}.safetensors"
    return {"file": file, "folder": f"models/{stage.comfyui_folder}", "node": stage.comfyui_node} | {
        "use": comfyui_use(stage)
    }


def _command(stage: Stage[Any], config: Mapping[str, Any], folder: Path, pipeline: str, name: str) -> str:
    """Returns the command that generates with the weights in the folder, which is `name` for others; or "".

    It has names instead of paths.
    """
    prompt = stage.sample.prompts[0] if stage.sample.prompts else first_caption(stage)
    if pipeline == WHOLE:
        arguments = ["generate", prompt, "--model", str(folder)]
    else:
        file = folder if pipeline else folder / f"{stage.stem}.safetensors"
        arguments = generate_arguments(stage, config, file, prompt)
    own = {str(folder): name, **{str(path): f"{name}/{path.name}" for path in folder.iterdir()}}
    names = [own.get(x) or (_name(x) if Path(x).exists() else x) for x in arguments]
    return shlex.join(["wuerstchen", *names]) if arguments else ""


def diffusers_call(stage: Stage[Any], pipeline: str) -> str:
    """Returns the call of a diffusers pipeline with the settings of a distilled stage; "" for others."""
    settings = stage.few_steps()
    if not settings:
        return ""
    network = stage.network  # type: ignore[attr-defined]
    steps, guidance = f"{network}_timesteps", f"{network}_guidance"
    values = {steps: [round(t, 4) for t in stage.times().tolist()]}  # type: ignore[attr-defined]
    values |= {f"{guidance}_scale": settings[guidance]} if guidance in settings else {}
    names = {name: name if pipeline == WHOLE else name.removeprefix(f"{network}_") for name in values}
    return f"pipeline(..., {', '.join(f'{names[name]}={x}' for name, x in values.items())})"


def _name(source: str | Path) -> str:
    """Returns the name of a file or folder without its path, or its name on the hub."""
    return hub_name(source) or Path(source).resolve().name


def _base_name(source: str | Path) -> str:
    return f"{source}, which ComfyUI-Wuerstchen contains" if source in SHIPPED else _name(source)


def _facts(stage: Stage[Any], config: Mapping[str, Any], folder: Path, step: int) -> dict[str, Any]:
    """Returns facts about the training."""
    train, rows = config["train"], read_log(folder)
    starts = read_starts(folder)
    processes = starts[-1]["processes"] if starts else 1
    about = stage.few_steps() and weights_metadata(stage)["distillation"]
    size = train["batch"] * train.get("accumulate", 1) * processes
    found = {
        "Stage": stage.name,
        "Base model": ", ".join(dict.fromkeys(map(_base_name, stage.bases))) or "none: trained from random weights",
        **({name: about[key] for name, key in DISTILLED.items()} if about else {}),
        "Steps": step,
        "Pictures per step": size,
        "Pictures": stage.dataset.pictures or "",
        "Size": f"{'x'.join(map(str, stage.dataset.size))} pixels",
        "Trained parameters": f"{sum(p.numel() for p in stage.net.parameters() if p.requires_grad):,}",
        "Optimizer": train.get("optimizer", ""),
        "Learning rate": train["lr"],
        **{f"LoRA {key}": config["lora"][key] for key in ("kind", "rank", "alpha") if config.get("lora", {}).get(key)},
        "Seed": train.get("seed", 0),
        **{
            f"{title} loss": f"{values[-1]:.4f}"
            for title, key in (("Training", "loss"), ("Validation", "validation"))
            if (values := [row[key] for row in rows if key in row and row["step"] <= step])
        },
        "torch": starts[-1]["versions"]["torch"] if starts else "",
    }
    return {name: value for name, value in found.items() if value not in ("", None)}
