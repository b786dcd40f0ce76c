"""Texts in picture files that say how they were made, as ComfyUI, other tools and `generate --like` read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .comfyui_nodes import canvas
from .workflow import build_graph

RECORD = "wuerstchen"  # our own settings, as JSON
PROMPT, WORKFLOW = "prompt", "workflow"  # ComfyUI's graph, for its API and for its canvas
PARAMETERS = "parameters"  # a text that most other tools read
KEYS = (PARAMETERS, PROMPT, WORKFLOW, RECORD)

# ComfyUI's EXIF tags, each with a text "key:content".
EXIF_TAGS = {PROMPT: ExifTags.Base.Model, WORKFLOW: ExifTags.Base.Make, RECORD: ExifTags.Base.ImageDescription}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
COMMENT_HEAD = b"UNICODE\0"
WITH_EXIF = ("JPEG", "WEBP", "AVIF")
JPEG_LIMIT = 65500  # bytes of EXIF in a JPEG


class GeneratedImage(Image.Image):
    """A picture whose `info` has the texts KEYS, which `save` writes to PNG, JPEG, WebP and AVIF files.

    `info.clear()` leaves them out. Copies and edited pictures are plain images, which Pillow saves without them.
    """

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        super().save(fp, format=format, **{**save_options(self.info, format or _format_of(fp)), **params})


def embed(image: Image.Image, record: Mapping[str, Any]) -> GeneratedImage:
    """Returns the picture with the texts of its record, the settings that made it."""
    generated = GeneratedImage()
    vars(generated).update(vars(image))
    generated.info = dict(image.info)
    for key, text in texts(record).items():
        generated.info[key] = text
    return generated


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of KEYS; those of ComfyUI only if its nodes can repeat the picture."""
    found = {PARAMETERS: parameters(record)}
    if (graph := build_graph(record)) is not None:
        prompt, titles = graph
        found |= {PROMPT: json.dumps(prompt), WORKFLOW: json.dumps(canvas(prompt, titles))}
    return found | {RECORD: json.dumps(record, default=_plain)}


def _plain(value: Any) -> Any:
    """Returns numbers of numpy or torch as Python's, and anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def parameters(record: Mapping[str, Any]) -> str:
    """Returns the text of A1111's web UI: the prompts, then a line of settings."""
    prompt = record.get("prompt", "")
    if isinstance(prompt, Mapping):
        prompt = " AND ".join(f"{text} :{weight:g}" for text, weight in prompt.items())
    loras = "".join(f" <lora:{Path(lora['file']).stem}:{lora['strength']:g}>" for lora in record.get("loras", ()))
    settings = {
        "Steps": record["prior_steps"],
        "Sampler": record["sampler"],
        "Schedule type": record["schedule"],
        "CFG scale": record["prior_guidance"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record.get("model"),
        "Denoising strength": record.get("strength"),
        "Decoder steps": record["decoder_steps"],
        "Decoder CFG scale": record["decoder_guidance"],
        "Decoder reuse": record.get("decoder_reuse"),
    }
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items() if value is not None)
    negative = f"Negative prompt: {record['negative']}\n" if record.get("negative") else ""
    return f"{prompt}{loras}\n{negative}{line}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def save_options(info: Mapping[Any, Any], format: str) -> dict[str, Any]:
    """Returns the arguments of Pillow's `save` that write the texts of KEYS in `info` to a file of this format."""
    found = {key: info[key] for key in KEYS if isinstance(info.get(key), str)}
    if not found:
        return {}
    if format.upper() == "PNG":
        png = PngInfo()
        for key, text in found.items():
            png.add_itxt(key, text) if not text.isascii() else png.add_text(key, text)
        return {"pnginfo": png}
    if format.upper() not in WITH_EXIF:
        return {}
    exif = _exif(found)
    for key in (WORKFLOW, PROMPT, PARAMETERS, RECORD):  # the first to go if a JPEG has no room
        if format.upper() != "JPEG" or len(exif) <= JPEG_LIMIT:
            break
        found.pop(key, None)
        exif = _exif(found)
    return {"exif": exif}


def _exif(found: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    for key, tag in EXIF_TAGS.items():
        if key in found:
            exif[tag] = f"{key}:{found[key]}"
    if PARAMETERS in found:
        exif[EXIF_IFD] = {USER_COMMENT: COMMENT_HEAD + found[PARAMETERS].encode("utf-16-be", "replace")}
    return exif.tobytes()


def _format_of(file: Any) -> str:
    """Returns the format that Pillow chooses by a file's name; "" if that is unknown."""
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "")
    return Image.registered_extensions().get(Path(name).suffix.lower(), "") if isinstance(name, str) else ""


def read_texts(image: Image.Image) -> dict[str, str]:
    """Returns the texts of KEYS in an opened picture file."""
    found = {key: image.info[key] for key in KEYS if isinstance(image.info.get(key), str)}
    exif = image.getexif()
    for key, tag in EXIF_TAGS.items():
        value = exif.get(tag)
        if key not in found and isinstance(value, str) and value.startswith(f"{key}:"):
            found[key] = value.removeprefix(f"{key}:")
    comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
    if PARAMETERS not in found and isinstance(comment, bytes) and comment.startswith(COMMENT_HEAD):
        found[PARAMETERS] = comment.removeprefix(COMMENT_HEAD).decode("utf-16-be", "replace")
    return found
