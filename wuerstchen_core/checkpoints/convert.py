"""Converts weights into one bundle, one file per part or a diffusers pipeline, and LoRA files for ComfyUI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..common.devices import DTYPES
from ..common.lock import file_lock, folder_lock, is_empty
from ..common.text import check_choice
from .bundle import AnyPart, DtypeOf, merge_towers, save_bundle
from .components import PARTS, TEXT_ENCODER, TOWERS, Part, check_part_name, kind_of, tower_widths
from .damage import names_source
from .diffusers_pipeline import INDEX, write_pipeline
from .infer_params import CLIP_NAMES
from .lazy import LazyTensor
from .lora_files import convert_lora
from .lora_folders import is_lora
from .open import open_source, source_path
from .quant import FP8, INT8
from .release import check_parts, only_release
from .source import Source, merge_metadata

CHOICES = {"keep": None, **DTYPES, "fp8": FP8, "int8": INT8}
ENDING = ".safetensors"
COMFYUI, DIFFUSERS = LAYOUTS = ("comfyui", "diffusers")

Report: TypeAlias = Callable[[Path, int, int], None]  # called with the file, the bytes written and the total
AnyPath: TypeAlias = str | os.PathLike[str]
LazyPart: TypeAlias = Part[LazyTensor]


def convert(
    sources: Sequence[AnyPath],
    target: AnyPath,
    *,
    dtype: str = "keep",
    version: str = "auto",
    to: str = COMFYUI,
    force: bool = False,
    progress: Report | None = None,
) -> list[Path]:
    """Writes all parts of `sources` as one bundle if `target` ends in .safetensors, else as one file each in a folder.

    With `to="diffusers"` it writes the folder of a diffusers pipeline instead (`write_pipeline`).

    One LoRA file of any naming becomes one that ComfyUI's own LoRA loaders read, with the same tensors.
    `dtype` is one of `CHOICES` or, by part, such as "bf16,vqgan=fp32"; "keep" keeps each tensor's. `version` is as in
    `open_source`. Only one tensor at a time is held in memory. Returns the files.
    Raises ValueError if the sources are not one model, a weight is not finite, a file exists without `force` or another
    process is writing it, and OSError if writing fails.
    """
    check_choice("layout", to, LAYOUTS)
    dtypes, path = parse_dtypes(dtype), Path(target)
    if to == COMFYUI and len(sources) == 1 and is_lora(source := source_path(sources[0])):
        if path.suffix != ENDING or dtype != "keep":
            raise ValueError(f"{source} is a LoRA: convert it to a file that ends in {ENDING}, without a dtype")
        with file_lock(path):
            _check_target(path, force)
            convert_lora(source, path)
        return [path]
    opened = _open(sources, version)
    parts = {name: _finite(part) for name, part in _gather(opened).items()}
    if to == DIFFUSERS:
        return _write_diffusers(path, parts, merge_metadata(opened), dtypes, force, progress)
    stored = partial(_stored_dtype, dtypes)
    return write_model(path, parts, merge_metadata(opened), stored, force=force, progress=progress)


def write_model(
    path: Path,
    parts: Mapping[str, AnyPart],
    metadata: Mapping[str, Any],
    dtype: DtypeOf | None = None,
    *,
    force: bool = False,
    progress: Report | None = None,
) -> list[Path]:
    """Writes a model as one bundle if `path` ends in .safetensors, else as one file per part in a folder.

    Returns the files. Raises as `convert`.
    """
    parts = merge_towers(parts)
    metadata = {key: x for key, x in metadata.items() if key not in ("version", "format", "parts")}
    if path.suffix and path.suffix != ENDING and not path.is_dir():
        raise ValueError(f"{path} is neither a bundle nor a folder: use a name that ends in {ENDING}, or no ending")
    bare = path.suffix != ENDING
    files = {path / f"{name}{ENDING}": {name: part} for name, part in parts.items()} if bare else {path: parts}
    with folder_lock(path) if bare else file_lock(path), ExitStack() as undo:
        for file in files:
            _check_target(file, force)
        if bare and is_empty(path):  # a part that fails takes the files before it along, and a new folder
            undo.callback(shutil.rmtree, path, ignore_errors=True)
        for file, content in files.items():
            if not file.exists():
                undo.callback(file.unlink, missing_ok=True)
            report = None if progress is None else partial(progress, file)
            save_bundle(file, content, metadata, dtype, report, bare=bare)
        undo.pop_all()
    return list(files)


def _write_diffusers(
    folder: Path,
    parts: Mapping[str, AnyPart],
    metadata: Mapping[str, Any],
    dtypes: Mapping[str, str],
    force: bool,
    progress: Report | None,
) -> list[Path]:
    """Writes the folder of a diffusers pipeline, and removes it if that fails. Returns the files of weights."""
    if folder.suffix == ENDING or folder.is_file():
        raise ValueError(f"{folder} is a file: name a folder for the diffusers pipeline")
    if wrong := [name for name in dtypes.values() if name in ("fp8", "int8")]:
        raise ValueError(f"diffusers reads no {wrong[0]}: choose keep, {', '.join(DTYPES)}")
    with folder_lock(folder), ExitStack() as undo:
        _check_target(folder / INDEX, force)
        if is_empty(folder):
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        written = write_pipeline(folder, parts, metadata, lambda name: CHOICES[_dtype_of(dtypes, name)], progress)
        undo.pop_all()
    return written


def _check_target(file: Path, force: bool) -> None:
    if file.is_dir():
        raise ValueError(f"{file} is a folder: choose another name")
    if file.exists() and not force:
        raise ValueError(f"{file} already exists: choose another name, or overwrite it with --force")


def parse_dtypes(text: str) -> dict[str, str]:
    """Parses "bf16,vqgan=fp32" into names of dtypes by part; the one for all other parts is under ""."""
    found = {"": "keep"}
    for word in text.split(","):
        name, _, dtype = word.strip().rpartition("=")
        check_choice("dtype", dtype, CHOICES)
        if name:
            check_part_name(name)
        found[name] = dtype
    return found


def _dtype_of(dtypes: Mapping[str, str], name: str) -> str:
    """Returns the name of the dtype for a part."""
    return dtypes.get(name) or dtypes.get(kind_of(name)) or dtypes[""]


def _stored_dtype(dtypes: Mapping[str, str], name: str, key: str, x: LazyTensor) -> torch.dtype | None:
    """Returns the dtype to store a tensor in; None for its own."""
    chosen = _dtype_of(dtypes, name)
    if chosen == "keep" and x.quantised is None and x.stored in (FP8, INT8):  # it was dequantized for reading
        return x.stored
    return CHOICES[chosen]


def _open(sources: Sequence[AnyPath], version: str) -> list[Source]:
    """Opens the sources; the release of one part determines that of a prior in another source."""
    if not sources:
        raise ValueError("nothing to convert: name at least one file or folder")
    opened = [open_source(source, version=version) for source in sources]
    release = only_release(release for source in opened for release in source.releases())
    return [replace(source, version=release) if release and version == "auto" else source for source in opened]


def _gather(opened: Sequence[Source]) -> dict[str, LazyPart]:
    """Returns the parts of all sources in the order of `PARTS`."""
    parts: dict[str, LazyPart] = {}
    shared: list[LazyPart] = []  # towers that name no stage
    for name, part in (item for source in opened for item in source.lazy_parts().items()):
        if name == TEXT_ENCODER:
            shared.append(part)
        elif name in parts:
            raise ValueError(f"both {parts[name].path} and {part.path} hold a {name}: use one of them")
        else:
            parts[name] = part
    for tower in shared:
        parts |= {name: replace(tower, name=name) for name in _stages_of(tower, parts, several=len(shared) > 1)}
    check_parts(parts)
    return {name: parts[name] for name in PARTS if name in parts}


def _finite(part: LazyPart) -> LazyPart:
    """Returns a part whose tensors raise ValueError when they are loaded if a number in them is not finite."""

    def load(key: str, x: LazyTensor) -> Tensor:
        out = _load(part, x)
        numbers = out if out.itemsize > 1 else out.float()
        if not numbers.isfinite().all():
            wrong = float(numbers[~numbers.isfinite()][0])
            raise ValueError(
                f"{key} holds {wrong}, in the {part.name} of {part.path}: use a file from before the training "
                "diverged, or download it again"
            )
        return out

    def checked(key: str, x: LazyTensor) -> LazyTensor:
        if not x.dtype.is_floating_point:
            return x
        stored = x.quantised and replace(x.quantised, numbers=checked(key, x.quantised.numbers))
        return replace(x, load=partial(load, key, x), quantised=stored)

    return replace(part, state_dict={key: checked(key, x) for key, x in part.state_dict.items()})


@names_source
def _load(part: LazyPart, x: LazyTensor) -> Tensor:
    return x.load()


def _stages_of(tower: LazyPart, parts: Mapping[str, LazyPart], several: bool) -> list[str]:
    """Returns the part names of a tower that names no stage: those of the stages that read its width."""
    width = tower.params.width
    released = dict(zip(TOWERS, CLIP_NAMES, strict=True)) if several else {}
    needed = dict.fromkeys(TOWERS, width) | released | tower_widths(parts)
    found = [name for name in TOWERS if name not in parts and needed[name] == width]
    if not found:
        raise ValueError(f"{tower.path}: no stage here reads a text tower of width {width}: leave it out")
    return found
