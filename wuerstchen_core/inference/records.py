"""The settings that made a picture, as they are stored in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.devices import NETWORK_DTYPES
from ..diffusion.samplers import plain_seed
from .components import Components
from .settings import SamplingOptions

SETTINGS = ("width", "height", *SamplingOptions.__annotations__)
FILES, ENDS = ("image", "mask"), ("a", "b")  # of pictures only the file's name is stored; ends can be prompts too
NOT_STORED = ("seed", "count", "callback", "progress", *SETTINGS)


def records(
    model: Components, method: str, arguments: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Returns the record of each picture that a method of the pipeline returned, called with these `arguments`."""
    request: dict[str, Any] = {} if method == "generate" else {"command": method}
    for name, value in arguments.items():
        is_picture = name in FILES or (name in ENDS and not isinstance(value, str | Mapping))
        stored = _file_name(value) if is_picture else value
        if name not in NOT_STORED and stored is not None:
            request[name] = stored
    sampling = model.sampling.updated(**{name: arguments.get(name) for name in SETTINGS}).as_dict()
    if method != "generate" and (arguments.get("width") or arguments.get("height")):
        request["resized"] = True
    return [
        {
            **request,
            **_of_picture(method, arguments, i),
            **provenance(model),
            **sampling,
            "width": image.width,
            "height": image.height,
        }
        for i, image in enumerate(images)
    ]


def provenance(model: Components) -> dict[str, Any]:
    """Returns the names and fingerprints of a model's files, and the dtype it computes in."""
    dtype = next((name for name, dtype in NETWORK_DTYPES.items() if dtype == model.dtype), str(model.dtype))
    loras = model.lora_stack.records()
    return {**model.files, **({"loras": loras} if loras else {}), "dtype": dtype}


def _of_picture(method: str, arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns what differs between the pictures of one call: the seed, and the prompt, file or fraction."""
    seed, own = 0 if arguments.get("seed") is None else plain_seed(arguments["seed"]), {}
    if method == "interpolate":
        return {"seed": seed}
    prompt, image = arguments.get("prompt"), arguments.get("image")
    if isinstance(prompt, Iterable) and not isinstance(prompt, str | Mapping) and (several := list(prompt)):
        own["prompt"] = several[index // (arguments.get("count") or 1)]
    if isinstance(image, Sequence) and not isinstance(image, str) and (name := _file_name(image[index])):
        own["image"] = name
    return {**own, "seed": seed[index] if isinstance(seed, Sequence) else seed + index}


def _file_name(picture: Any) -> str | None:
    """Returns the name of a picture's file without its folder; None if there is no file."""
    path = getattr(picture, "filename", None) if isinstance(picture, Image.Image) else picture
    return Path(path).name if path and isinstance(path, str | PathLike) else None
