"""The settings that made a picture, as they are stored in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..common.devices import NETWORK_DTYPES
from ..diffusion.samplers import plain_seed
from ..models.control_net import ControlNet
from .components import Components
from .control import IN_MEMORY, Hint, list_hints
from .images import picture_name
from .settings import SamplingOptions
from .sources import source_name

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
        stored = picture_name(value) if is_picture else value
        if name == "control":
            stored = hint_records(value) or None
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
    if isinstance(image, Sequence) and not isinstance(image, str) and (name := picture_name(image[index])):
        own["image"] = name
    return {**own, "seed": seed[index] if isinstance(seed, Sequence) else seed + index}


def hint_records(control: Any) -> list[dict[str, Any]]:
    """Returns what metadata say about the hints of `generate`'s argument `control`."""
    return [_hint_record(hint) for hint in list_hints(control)]


def _hint_record(hint: Hint) -> dict[str, Any]:
    net: dict[str, Any] = {"file": IN_MEMORY}
    if not isinstance(hint.net, ControlNet):
        net = {"file": source_name(hint.net), "weights": hint.weights}
    mask = {} if hint.mask is None else {"mask": picture_name(hint.mask) or ""}
    times = {"strength": hint.strength, "start": hint.start, "end": hint.end}
    return {**net, "image": picture_name(hint.picture) or "", **times, **mask}
