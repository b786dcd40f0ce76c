"""Describes the content of a source from its headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..common.devices import WEIGHT_DTYPES
from ..common.text import printable
from ..models.prior import V1
from .components import BUNDLE_LOADER, PARTS_OF, TEXT_ENCODER, TOWERS, Loader, Part, component, text_width, tower_name
from .damage import names_source
from .lazy import LazyTensor
from .modelspec import FIELD
from .open import open_source
from .release import check_parts
from .source import BUNDLE, Source

_DTYPES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
_SCALED = ("fp8", "fp8_e5m2", "int8")
OPEN = "v1 (or v2's first file, of June 2023)"
SHARED = "v1 and v2 alike"
HIDDEN = ("dropout", "stages", "prior_values")  # params that a description in words leaves out


@dataclass(frozen=True)
class PartInfo:
    """One part: its number of parameters (without buffers), dtype and params, and the ComfyUI folder and node for it.

    `folder` and `node` are None if no node can load it from this file.
    """

    name: str
    stage: str
    parameters: int
    dtype: str
    sizes: dict[str, Any]
    folder: str | None
    node: str | None


@dataclass(frozen=True)
class Description:
    """A description of a source. `missing` are the parts that a complete model of its release needs as well.

    `problems` are the reasons why something in it cannot be loaded, by part; under "model" why the parts do not fit
    one another. Only without any is a source complete.
    """

    source: str
    kind: str
    version: str
    parts: tuple[PartInfo, ...]
    text_towers: dict[str, str]  # the text tower that each stage needs
    missing: tuple[str, ...]
    refused: tuple[str, ...]  # other content, which is not loaded
    vocabulary: int | None  # number of words, if the model knows only some
    licence: str | None
    title: str
    trigger_words: str
    problems: dict[str, str]

    def lines(self) -> list[str]:
        """Returns the description as lines of text, with control characters escaped."""
        out = [f"{self.source}: {self.kind}, {self.version}"]
        out += [f"  title: {self.title}"] if self.title else []
        out += [f"  trigger words: {self.trigger_words}"] if self.trigger_words else []
        for part in self.parts:
            sizes = ", ".join(f"{key} {value}" for key, value in part.sizes.items() if key not in HIDDEN)
            out.append(f"  {part.name} ({part.stage}): {part.parameters:,} parameters, {part.dtype} ({sizes})")
        out += [f"  the {name} needs {tower}" for name, tower in self.text_towers.items()]
        out += [f"  it also holds {other}" for other in self.refused]
        if self.vocabulary is not None:
            out.append(f"  it knows {self.vocabulary} words")
        if self.licence:
            out.append(f"  licence: {self.licence}")
        loaders: dict[tuple[str | None, str | None], list[str]] = {}
        for part in self.parts:
            loaders.setdefault((part.folder, part.node), []).append(part.name)
        for (folder, node), names in loaders.items():
            if folder is not None:
                out.append(f"  in ComfyUI: models/{folder}, {node} ({', '.join(names)})")
            else:
                out.append(f"  in ComfyUI: no node loads {', '.join(names)} from this file; use `convert` to make")
                out.append(f"    single files, or one bundle{' with the missing parts' if self.missing else ''}")
        out += [f"  damaged: {name} ({problem})" for name, problem in self.problems.items()]
        missing = ", ".join(self.missing).replace("image_encoder", "image_encoder (only needed for images as input)")
        if missing:
            out.append(f"  missing for a complete model: {missing}")
        elif not self.problems:
            out.append("  complete")
        return list(map(printable, out))


@names_source
def describe(source: str | os.PathLike[str]) -> Description:
    """Describes a source without reading its weights. Raises ValueError as `read_part` if nothing in it can be loaded.

    A prior that may be v1's or v2's is described as v1's, which is most likely.
    """
    content = open_source(source, headers_only=True)
    parts, problems = _parts(content)
    version = _version(content, parts)
    release = "v1" if version in ("v1", OPEN) else "v2"
    words = content.metadata.get("vocabulary", {}).get("words")
    loaders = _loaders(content, parts)
    return Description(
        source=str(source),
        kind="weights only" if content.layout == "bare" else content.layout,
        version=version,
        parts=tuple(_part_info(part, content, loaders[name]) for name, part in parts.items()),
        text_towers={name: tower_name(width) for name, part in parts.items() if (width := text_width(part.params))},
        missing=tuple(name for name in PARTS_OF[release] if name not in content.networks),
        refused=content.refused,
        vocabulary=None if words is None else len(words),
        licence=content.metadata.get("licence"),
        title=content.metadata.get(FIELD, {}).get("title", ""),
        trigger_words=", ".join(content.metadata.get(FIELD, {}).get("trigger_words", ())),
        problems=problems,
    )


def _parts(content: Source) -> tuple[dict[str, Part[LazyTensor]], dict[str, str]]:
    """Returns the parts that can be loaded, and the reasons why others cannot. Raises ValueError if none can."""
    parts, problems = {}, {}
    for name, own in content.part_names().items():
        try:
            parts[name] = replace(content.lazy_part(own), name=name)
        except ValueError as error:
            problems[name] = str(error)
    if not parts:
        raise ValueError("; ".join(problems.values()))
    towers = dict.fromkeys(TOWERS, parts[TEXT_ENCODER]) if TEXT_ENCODER in parts else {}
    try:
        check_parts(parts | towers)
    except ValueError as error:
        problems["model"] = str(error)
    return parts, problems


def _loaders(content: Source, parts: Iterable[str]) -> dict[str, Loader | None]:
    """Returns the ComfyUI loader for each part; None if there is none.

    A node loads a part from a file only if it is the one part for this node. Exceptions: the bundle node loads a whole
    v2 model, and parts of a v1 bundle are chosen by name.
    """
    own = {name: component(name).loader for name in parts}
    if content.layout == BUNDLE:
        if content.metadata.get("version") == "v1":
            folder = BUNDLE_LOADER.folder
            return {name: loader._replace(folder=folder) if len(own) > 1 else loader for name, loader in own.items()}
        if set(PARTS_OF["v2"]) <= content.networks.keys():
            return dict.fromkeys(own, BUNDLE_LOADER)
    elif content.path.is_dir():  # each part has its own file
        return dict(own)
    loaders = list(own.values())
    return {name: loader if loaders.count(loader) == 1 else None for name, loader in own.items()}


def _part_info(part: Part[LazyTensor], content: Source, loader: Loader | None) -> PartInfo:
    floats = {key: x for key, x in part.state_dict.items() if x.dtype.is_floating_point}
    learned = [x for key, x in floats.items() if not key.endswith(("running_mean", "running_var"))]
    stored = {x.stored or x.dtype for x in floats.values()}
    names = {_DTYPES.get(dtype, str(dtype).removeprefix("torch.")) for dtype in stored}
    scaled = (content.networks.get(part.name) or content.networks[TOWERS[0]]).scaled
    return PartInfo(
        name=part.name,
        stage=component(part.name).stage,
        parameters=sum(math.prod(x.shape) for x in learned),
        dtype=" and ".join(sorted(f"{name} (scaled)" if name in _SCALED and scaled else name for name in names)),
        sizes=asdict(part.params),
        folder=loader.folder if loader else None,
        node=loader.node if loader else None,
    )


def _version(content: Source, parts: Mapping[str, Part[LazyTensor]]) -> str:
    """Returns the releases that the parts show, or that both have such parts."""
    if "version" in content.metadata:
        return str(content.metadata["version"])
    releases = content.releases()
    if "prior" in parts and not releases:
        params = parts["prior"].params
        release = content.known_release(params) or (OPEN if params.c_cond == V1["c_cond"] else None)
        releases = {release} if release else set()
    return " and ".join(sorted(releases)) or SHARED
