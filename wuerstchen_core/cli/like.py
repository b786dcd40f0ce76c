"""`generate --like`: takes the options of a picture's file that the command line does not give."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.shipped import SHIPPED
from ..common.text import parse_json
from ..inference.control import Hint
from ..inference.images import opened
from ..inference.metadata import PROMPT, RECORD, read_texts
from ..inference.read_graph import record_of_graph
from ..inference.settings import SamplingOptions

log = logging.getLogger(__name__)

SAME = ("prompt", "negative", "seed", "count", "dtype", "width", "height", *SamplingOptions.__annotations__)
SCHEDULE = ("schedule", "prior_steps", "sampler")  # belong together


def options_of(picture: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of options that are None and that a picture's file names.

    Raises ValueError if the file does not say how it was made, if `generate` cannot repeat it, or if a model file that
    it names is neither in the current folder nor beside the picture.
    """
    record = read_record(picture)
    if command := record.get("command"):
        source = f" from {record['image']}" if "image" in record else ""
        raise ValueError(
            f"{picture} was made by `{command}`{source}, and --like repeats `generate` only: run `{command}`"
        )
    found = {name: record[name] for name in SAME if record.get(name) is not None}
    dropped: tuple[str, ...] = SCHEDULE if options.schedule is not None or options.prior_steps is not None else ()
    dropped += ("decoder_steps",) if options.schedule is not None else ()
    found = {name: value for name, value in found.items() if name not in dropped}
    parts = record.get("parts", {})
    if options.model is None:
        if "model" not in record and parts:
            raise ValueError(f"{picture} was made with separate files ({', '.join(parts)}): add --model")
        if "model" in record:
            found["model"] = _find(picture, record["model"], record.get("weights"), "--model")
        for name, part in parts.items():
            if getattr(options, name, None) is None:
                found[name] = _find(picture, part["file"], part.get("weights"), f"--{name.replace('_', '-')}")
    if options.lora is None:
        files = (
            (lora, _find(picture, lora["file"], lora.get("weights"), "--lora")) for lora in record.get("loras", ())
        )
        found["lora"] = [(file, lora.get("strength", 1.0)) for lora, file in files]
    if options.control is None:
        found["control"] = [_hint(picture, entry) for entry in record.get("control", ())]
    if options.embedding is None:
        entries = record.get("embeddings", ())
        found["embedding"] = [Path(_find(picture, x["file"], x.get("weights"), "--embedding")) for x in entries]
    return found


def read_record(picture: Path) -> Mapping[str, Any]:
    """Returns the settings in a picture's file: ours, or those of the ComfyUI graph. Raises ValueError without any."""
    with opened(picture, str(picture)) as file:
        texts = read_texts(file)
    try:
        record = parse_json(texts.get(RECORD) or texts.get(PROMPT) or "null")
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{picture} does not say how it was made: give a picture that Würstchen saved with its metadata"
        )
    if RECORD in texts:
        return _checked(record, picture)
    try:
        return record_of_graph(record)
    except ValueError as error:
        raise ValueError(f"{picture} cannot be repeated here: {error}. Open it in ComfyUI") from error


def _checked(record: dict[str, Any], picture: Path) -> dict[str, Any]:
    """Returns a record. Raises ValueError if its entries are not of the kinds that we write."""
    prompt, parts = record.get("prompt"), record.get("parts", {})
    files = [
        *(record.get(name, []) for name in ("loras", "embeddings", "control")),
        [*parts.values()] if _is_table(parts) else None,
    ]
    valid = "command" in record or isinstance(prompt, str) or (_is_table(prompt) and prompt)
    valid = valid and isinstance(record.get("model", ""), str)
    valid = valid and all(isinstance(entries, list) and all(map(_names_file, entries)) for entries in files)
    hints = record.get("control", ()) if valid else ()
    if not valid or not all(isinstance(x, str) for hint in hints for x in (hint.get("image"), hint.get("mask", ""))):
        raise ValueError(f"{picture} has damaged metadata: give the picture as Würstchen saved it")
    return record


def _hint(picture: Path, entry: Mapping[str, Any]) -> Hint:
    """Returns a hint from its record. Raises ValueError if its picture or mask was not a file."""
    if not entry["image"] or entry.get("mask") == "":
        raise ValueError(f"{picture} was made with a hint that was not a file: add --control NET PICTURE")
    files = {name: _find(picture, entry[name], None, "--control") for name in ("image", "mask") if name in entry}
    net = _find(picture, entry["file"], entry.get("weights"), "--control")
    times = {name: entry[name] for name in ("strength", "start", "end") if name in entry}
    return Hint(net, files["image"], **times, mask=files.get("mask"))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _names_file(entry: Any) -> bool:
    return _is_table(entry) and isinstance(entry.get("file"), str) and isinstance(entry.get("strength", 1), int | float)


def _find(picture: Path, name: str, weights: str | None, option: str) -> str:
    """Returns the path of a model's file by its name; warns if its weights have changed."""
    path = name
    if name not in SHIPPED:
        outside = Path(name).anchor or ".." in Path(name).parts  # a picture of others may name any file
        places = [folder / name for folder in (Path(), picture.parent) if not outside]
        path = next((str(place) for place in places if place.exists()), "")
        if not path:
            raise ValueError(f"{picture} was made with {name}, which is neither here nor beside it: add {option} FILE")
    if weights is not None and fingerprint(path) != weights:
        log.warning("%s has other weights than when %s was made: the image will differ", path, picture)
    return path
