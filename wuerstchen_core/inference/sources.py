"""Reads the components of a pipeline from one source, or from one per component."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from ..checkpoints import PARTS, Part
from ..checkpoints.components import TEXT_ENCODER, TOWERS
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.modelspec import FIELD
from ..checkpoints.open import open_source
from ..checkpoints.source import Source, is_stage_b, merge_licences, no_part

AnyPath = str | PathLike[str]


class PartFiles(TypedDict, total=False):
    """Sources of components that replace those of a base model; `text_encoder` replaces both text encoders."""

    prior: AnyPath | None
    decoder: AnyPath | None
    token_decoder: AnyPath | None
    vqgan: AnyPath | None
    image_encoder: AnyPath | None
    text_encoder: AnyPath | None
    prior_text_encoder: AnyPath | None
    decoder_text_encoder: AnyPath | None


def read_sources(
    source: AnyPath | Mapping[str, AnyPath], replaced: Mapping[str, Any], version: str
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Returns the parts of a source or of one source per part, some of them `replaced`, and the model's metadata."""
    files = dict(source) if isinstance(source, Mapping) else {}
    files |= {name: file for name, file in replaced.items() if file is not None}
    for path in (*files.values(), *(() if isinstance(source, Mapping) else (source,))):
        if not isinstance(path, str | PathLike):
            raise ValueError(f"a model is loaded from a path or a name, got {type(path).__name__}: give one of these")
    base = None if isinstance(source, Mapping) else open_source(source, version=version)
    if base is None and not files:
        raise ValueError(f"no file was given: name at least one of {', '.join(PARTS)}")
    networks = base.networks if base else {}
    if version == "auto":  # the model's Stage B determines the release of its prior
        names = {*files, *networks}
        version = "v1" if "token_decoder" in names else "v2" if "decoder" in names else version
    opened = {
        name: open_source(file, None if name == TEXT_ENCODER else name, version=version) for name, file in files.items()
    }
    parts: dict[str, Part] = {}
    for name, one in sorted(opened.items(), key=lambda item: item[0] != TEXT_ENCODER):  # a stage's own encoder wins
        if name == TEXT_ENCODER:
            parts |= _text_encoders(one)
        else:
            parts[name] = one.lazy_part(name)
    if base is not None:
        replaceable = PartFiles.__annotations__.keys() - parts.keys()  # ControlNets are no component of a pipeline
        parts |= {name: base.lazy_part(name) for name in networks if name in replaceable}
    return {name: parts[name] for name in PARTS if name in parts}, _metadata(base, opened)


def file_records(source: AnyPath | Mapping[str, AnyPath], replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names, without folders, and the fingerprints of a model's files."""
    found: dict[str, Any] = {}
    parts = dict(source) if isinstance(source, Mapping) else {}
    if not isinstance(source, Mapping):
        found |= {"model": source_name(source), "weights": fingerprint(source)}
    parts |= {name: file for name, file in replaced.items() if file is not None}
    if parts:
        found["parts"] = {name: {"file": source_name(x), "weights": fingerprint(x)} for name, x in parts.items()}
    return found


def source_name(source: AnyPath) -> str:
    """Returns the name of a source without its folder."""
    return Path(source).name or Path(source).resolve().name


def _text_encoders(source: Source) -> dict[str, Part]:
    """Returns a source's text encoders; a single one serves both stages."""
    found = {name: source.lazy_part(name) for name in TOWERS if name in source.networks}
    if not found:
        raise no_part(source.path, TEXT_ENCODER, list(source.networks))
    return found


def _metadata(base: Source | None, opened: Mapping[str, Source]) -> dict[str, Any]:
    """Returns a model's metadata: the base's, with the settings of its replaced stages and all licences.

    A prior's settings and words count before the base's, as do its title and trigger words; a decoder's only for
    Stage B.
    """
    if base is None:
        return opened["prior" if "prior" in opened else next(iter(opened))].metadata
    metadata = dict(base.metadata)
    for name in (*reversed(TOWERS), TEXT_ENCODER, "prior"):
        own = opened[name].metadata if name in opened else {}
        fields = ("vocabulary", *([FIELD] if name == "prior" else []))
        metadata |= {key: own[key] for key in fields if key in own}
        stored, kept = own.get("sampling", {}), metadata.get("sampling", {})
        if stored.keys() & {"schedule", "prior_steps"}:  # these belong together, with the sampler
            kept = {key: x for key, x in kept.items() if key not in ("schedule", "prior_steps", "sampler")}
        if stored:
            metadata["sampling"] = {**kept, **stored}
    for name in ("decoder", "token_decoder"):
        stored = opened[name].metadata.get("sampling", {}) if name in opened else {}
        own = {key: x for key, x in stored.items() if is_stage_b(key)}
        if own:
            metadata["sampling"] = {**metadata.get("sampling", {}), **own}
    return metadata | (merge_licences([base, *opened.values()]) if opened else {})
