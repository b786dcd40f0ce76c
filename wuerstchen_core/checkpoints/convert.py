"""Weights from any layout into one bundle, or into a file for each part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from ..common.devices import DTYPES
from .bundle import merge_towers, save_bundle, save_part
from .components import PARTS, TEXT_ENCODER, PlannedPart, check_towers, text_width
from .lazy import Planned
from .open import open_source
from .quant import FP8
from .release import check_release, of_others
from .source import TOWERS, Source, merged

CHOICES = {"keep": None, **DTYPES, "fp8": FP8}
ENDING = ".safetensors"

Report: TypeAlias = Callable[[Path, int, int], None]  # of which file, bytes written, bytes in all
Given: TypeAlias = str | os.PathLike[str]


def convert(
    sources: Sequence[Given],
    target: Given,
    *,
    dtype: str = "keep",
    version: str = "auto",
    force: bool = False,
    progress: Report | None = None,
) -> list[Path]:
    """Write all parts of `sources` as one bundle, if `target` ends in .safetensors, else as a file each in that folder.

    `dtype` is one of `CHOICES`, or by part, as "bf16,vqgan=fp32"; "keep" keeps each tensor's. `version`: `open_source`.
    Weights are read as they are written: no more than one tensor is held in memory. Returns the files.
    ValueError if the sources do not make one model or a file exists without `force`; OSError if one can't be written.
    """
    wanted, path = parse_dtypes(dtype), Path(target)
    opened = _open(sources, version)
    parts = _gather(opened)
    metadata = {key: value for key, value in merged(opened).items() if key not in ("version", "format", "parts")}
    stored = partial(_stored, wanted)
    with _watched(opened, progress or (lambda path, done, total: None)) as report:
        if path.suffix == ENDING:
            _check_free([path], force)
            save_bundle(path, parts, metadata, stored, progress=partial(report, path))
            return [path]
        if path.suffix and not path.is_dir():
            raise ValueError(
                f"{path} is neither a folder nor the name of a bundle: let it end in {ENDING}, or in nothing"
            )
        files = {path / f"{name}{ENDING}": part for name, part in merge_towers(parts).items()}
        _check_free(files, force)
        for file, part in files.items():
            assert isinstance(part, PlannedPart)
            save_part(file, replace(part, name=file.stem), metadata, stored, progress=partial(report, file))
    return list(files)


def parse_dtypes(text: str) -> dict[str, str]:
    """Names of dtypes by part, and under "" the one for all others: of "bf16,vqgan=fp32"."""
    found = {"": "keep"}
    for word in text.split(","):
        name, _, dtype = word.strip().rpartition("=")
        if dtype not in CHOICES:
            raise ValueError(f"dtype {dtype!r} is unknown: choose {', '.join(CHOICES)}, as in bf16,vqgan=fp32")
        if name not in ("", TEXT_ENCODER, *PARTS):
            raise ValueError(f"{name!r} is no part of a model: the parts are {', '.join(PARTS)}")
        found[name] = dtype
    return found


def _check_free(files: Iterable[Path], force: bool) -> None:
    """Raise ValueError where a file stands that may not be written over."""
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give another name to the file")
        if file.exists() and not force:
            raise ValueError(f"{file} exists already: choose another name, or write over it with --force")


def _stored(wanted: Mapping[str, str], name: str, key: str, x: Planned) -> torch.dtype | None:
    """The dtype that a tensor is written in; None for its own."""
    chosen = wanted.get(name) or (wanted.get(TEXT_ENCODER) if name in TOWERS else None) or wanted[""]
    if chosen == "keep" and x.stored == FP8:  # which was widened as it was read
        return FP8
    return CHOICES[chosen]


def _open(sources: Sequence[Given], version: str) -> list[Source]:
    """The sources, each told what the others say of the release."""
    opened = [open_source(source, version=version) for source in sources]
    if not opened:
        raise ValueError("nothing was given to convert: name at least one file or folder")
    told = of_others(source.release_of(name) for source in opened for name in source.networks)
    return [replace(source, version=told) if told and version == "auto" else source for source in opened]


def _gather(opened: Sequence[Source]) -> dict[str, PlannedPart]:
    """The parts of all sources."""
    parts: dict[str, PlannedPart] = {}
    origins: dict[str, Path] = {}
    towers: list[tuple[Path, PlannedPart]] = []
    for source in opened:
        loose = _names_no_stage(source)
        for name in source.networks:
            if loose and name in TOWERS:
                continue
            if name in parts:
                raise ValueError(f"both {origins[name]} and {source.path} hold a {name}: give one of them")
            parts[name], origins[name] = source.planned(name), source.path
        if loose:
            towers.append((source.path, source.planned(TOWERS[0])))
    for path, tower in towers:
        for name in _stages_of(tower, parts, len(towers) > 1, path):
            parts[name] = replace(tower, name=name)
    check_towers(parts)
    check_release({name: part.params for name, part in parts.items()})
    return {name: parts[name] for name in PARTS if name in parts}


@contextmanager
def _watched(opened: Sequence[Source], report: Report) -> Iterator[Report]:
    """The report, after which the sources have to be whole: of a mapped file that is not, the system makes a failure to
    write, or the end of the process. One that another file took the place of is whole to who has it open.
    """
    files = {file: file.stat() for source in opened for file in source.files()}

    def check() -> None:
        for file, before in files.items():
            now = file.stat() if file.exists() else before
            if now.st_ino == before.st_ino and now.st_size < before.st_size:
                raise ValueError(f"{file} was cut short while it was read: fetch it again")

    def watch(path: Path, done: int, total: int) -> None:
        report(path, done, total)
        check()

    try:
        yield watch
    except OSError:
        check()
        raise


def _names_no_stage(source: Source) -> bool:
    """Whether a source's tower stands under the names of both stages."""
    return all(name in source.networks for name in TOWERS) and source.networks[TOWERS[0]] is source.networks[TOWERS[1]]


def _stages_of(tower: PlannedPart, parts: Mapping[str, PlannedPart], several: bool, path: Path) -> list[str]:
    """The names that a tower which names no stage gets: of those that read states of its width."""
    readers = {name: text_width(part.params) for name, part in parts.items()}
    needed = {TOWERS[0]: readers.get("prior"), TOWERS[1]: readers.get("decoder") or readers.get("token_decoder")}
    usual = dict(zip(TOWERS, (1280, 1024), strict=True)) if several else {}
    width = tower.params.width
    found = [name for name in TOWERS if name not in parts and (needed[name] or usual.get(name, width)) == width]
    if not found:
        raise ValueError(f"{path} is a text tower {width} wide that no stage given here is left to read: leave it out")
    return found
