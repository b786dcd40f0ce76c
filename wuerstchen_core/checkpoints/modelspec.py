"""The header fields `modelspec.*`, in which programs look for a model's architecture, title and trigger words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from ..common.dataclass_config import option

PREFIX = "modelspec."
HASH = f"{PREFIX}hash_sha256"  # of the tensors' bytes; the writer fills it in
FIELD = "modelspec"  # of a model's metadata: what its author stated
_SPEC = f"{PREFIX}sai_model_spec"
_DENOISERS = {"prior": "prior", "decoder": "decoder", "token_decoder": "decoder"}  # names by part, the first one counts
_TEXTS = ("title", "author", "description", "tags", "resolution")


@dataclass(frozen=True)
class Statement:
    """The `[modelspec]` table of a training configuration."""

    title: str = option("", "name of the model")
    author: str = option("", "who made it")
    description: str = option("", "about the model")
    tags: tuple[str, ...] = option((), "words to search by")
    trigger_words: tuple[str, ...] = option((), "words of a prompt that the model was trained to react to")

    def fields(self) -> dict[str, Any]:
        """Returns the fields that are not empty."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items() if x}


def spec_header(
    parts: Collection[str], metadata: Mapping[str, Any], release: str | None, kind: str = ""
) -> dict[str, str]:
    """Returns the header fields of a file with these parts, or of a `kind` "lora" or "textual-inversion" for them.

    Only the date is not reproducible.
    """
    stated, sampling = dict(metadata.get(FIELD, {})), metadata.get("sampling")
    size = [sampling.get(side) for side in ("width", "height")] if isinstance(sampling, Mapping) else []
    name = next((name for part, name in _DENOISERS.items() if part in parts), next(iter(parts)).replace("_", "-"))
    family = f"wuerstchen-{release}" if release else "wuerstchen"
    title = " ".join(["Würstchen", *([release] if release else []), *([] if name == "prior" else [name])])
    words = list(stated.get("trigger_words", ()))
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{family}-{name}{f'/{kind}' if kind else ''}",
        "implementation": "https://github.com/huggingface/diffusers",  # whose names the keys are
        "title": stated.get("title") or f"{title}{' LoRA' if kind == 'lora' else ''}",
        "date": date.today().isoformat(),
        "hash_sha256": "-",
        "license": metadata.get("licence"),
        "resolution": "x".join(map(str, size)) if all(size) else None,
        "trigger_phrase": ", ".join(words),
        **{key: ", ".join(x) if isinstance(x, list) else x for key in _TEXTS[1:] if (x := stated.get(key))},
    }
    header = {f"{PREFIX}{key}": str(value) for key, value in fields.items() if value}
    return header | ({"trained_words": json.dumps(words)} if words else {})  # read by ComfyUI


def adapter_header(part: str, metadata: Mapping[str, Any], release: str | None, kind: str) -> dict[str, str]:
    """Returns the header of a file of a `kind` for a part: the metadata, as JSON, and the fields of `spec_header`."""
    header = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items() if name != FIELD}
    return header | {"format": "pt", **spec_header([part], metadata, release, kind)}


def has_spec(header: Mapping[str, str]) -> bool:
    """True if a safetensors header has these fields."""
    return _SPEC in header


def stated_fields(header: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the author of a file stated in its header, for `FIELD`."""
    stated: dict[str, Any] = {key: x for key in _TEXTS if (x := header.get(f"{PREFIX}{key}"))}
    if phrase := header.get(f"{PREFIX}trigger_phrase"):
        stated["trigger_words"] = [phrase]
    return stated
