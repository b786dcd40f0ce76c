"""Reads textual inversion embeddings: vectors that stand in a prompt where `embedding:NAME` is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import check_file
from ..common.text import listed, printable
from .components import Loader, State, tower_name
from .damage import names_source
from .lazy import load_state
from .torch_files import read_torch
from .weight_files import check_plain, is_safetensors, read_weight_file

ENDINGS = (".safetensors", ".pt", ".bin")  # in ComfyUI's order
EMBEDDING_LOADER = Loader("embeddings", "a prompt, as embedding:{name}")
BUNDLED = "bundle_emb."  # keys of embeddings in LoRA files: bundle_emb.NAME.clip_g, bundle_emb.NAME.string_to_param.*

_PARAM = "string_to_param"  # of files in the format of AUTOMATIC1111
_TOWER_KEYS = ("clip_g", "clip_h", "clip_l", "t5xxl", "emb_params", _PARAM)
_PLACEHOLDER = "<"  # how diffusers' tokens begin
_MOST_TENSORS = 16  # of a file with one embedding


@dataclass(frozen=True)
class Embedding:
    """Vectors [n, width] by ComfyUI's name of their text tower, or another key if the file names none."""

    tensors: dict[str, Tensor]

    def vectors(self, clip: str, width: int) -> Tensor | None:
        """Returns the vectors [n, width] for a text tower, chosen as in ComfyUI; None if they have another width.

        These are the ones under the tower's name, or else the file's first.
        """
        x = self.tensors.get(_PARAM, self.tensors.get(clip, next(iter(self.tensors.values()))))
        return x if x.shape[1] == width else None

    def widths(self) -> str:
        """Returns the names and widths of the vectors in words."""
        return listed(
            [f"{x.shape[1]}{f' ({key})' if key in _TOWER_KEYS[:-1] else ''}" for key, x in self.tensors.items()]
        )


@dataclass(frozen=True)
class EmbeddingInfo:
    """A description of an embedding file: the numbers and widths of its vectors by key."""

    source: str
    vectors: dict[str, tuple[int, int]]
    folder: str
    usage: str

    def lines(self) -> list[str]:
        """Returns the description as lines of text, with control characters escaped."""
        towers = {
            key: f"{count} vectors of width {width}, for {tower_name(width)}"
            for key, (count, width) in self.vectors.items()
        }
        out = [
            f"{self.source}: textual inversion embedding",
            *(f"  {key}: {text}" for key, text in towers.items()),
            f"  in ComfyUI: models/{self.folder}; write {self.usage} in a prompt",
        ]
        return list(map(printable, out))


@names_source
def read_embedding(path: str | os.PathLike[str]) -> Embedding:
    """Reads an embedding file of ComfyUI, AUTOMATIC1111, diffusers or OneTrainer, or those that a LoRA bundles.

    Raises ValueError if it is no such file.
    """
    path = Path(path)
    check_file(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give an embedding file ({', '.join(ENDINGS)})")
    state = _read_state(path)
    if bundled := bundled_embeddings(state):
        return _joined(bundled)
    if not state or len(state) > _MOST_TENSORS or not all(_has_vectors(key, x) for key, x in state.items()):
        raise ValueError(
            f"{path} is not a textual inversion embedding ({len(state)} tensors: {listed(list(state))}): expected "
            f"vectors under clip_g, clip_h, string_to_param or a token's name"
        )
    if len(state) > 1 and not state.keys() & set(_TOWER_KEYS):
        raise ValueError(f"{path} holds several embeddings ({listed(list(state))}): save each in a file of its own")
    if unusable := [key for key, x in state.items() if not x.float().isfinite().all()]:
        raise ValueError(f"{path} has values that are not finite ({listed(unusable)}): use an earlier save")
    return Embedding({key: x.reshape(-1, x.shape[-1]).float() for key, x in state.items()})


def is_embedding(path: Path) -> bool:
    """True for a file with an embedding and nothing else."""
    with suppress(ValueError, OSError):
        if path.suffix in ENDINGS:
            state = _read_state(path)
            named = all(key in _TOWER_KEYS or key.startswith((BUNDLED, _PLACEHOLDER)) for key in state)
            flat = all(_has_vectors(key, x) for key, x in state.items())
            return bool(state) and flat and (named or len(state) == 1)
    return False


def _has_vectors(key: str, x: Tensor) -> bool:
    """True for vectors under a key that is not the path of a weight in a network."""
    is_named = "." not in key or key.startswith((BUNDLED, _PLACEHOLDER))
    return is_named and x.ndim in (1, 2) and x.numel() > 0 and x.is_floating_point()


def describe_embedding(path: Path) -> EmbeddingInfo:
    """Describes an embedding file. Raises ValueError as `read_embedding`."""
    vectors = {key: (len(x), x.shape[1]) for key, x in read_embedding(path).tensors.items()}
    note = " (without spaces: rename the file)" if len(path.stem.split()) > 1 else ""
    return EmbeddingInfo(str(path), vectors, "embeddings", f"embedding:{path.stem}{note}")


def bundled_embeddings(state: State) -> dict[str, Embedding]:
    """Returns the embeddings in a LoRA's tensors by name, without the angle brackets of a placeholder."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in state.items():
        if key.startswith(BUNDLED):
            name, _, tower = key.removeprefix(BUNDLED).rpartition(".")
            name, tower = (name, tower) if name else (tower, "emb_params")
            if name.endswith(f".{_PARAM}"):
                name, tower = name.removesuffix(f".{_PARAM}"), _PARAM
            found.setdefault(name.strip("<>"), {})[tower] = x.reshape(-1, x.shape[-1]).float()
    return {name: Embedding(tensors) for name, tensors in found.items()}


def _joined(embeddings: Mapping[str, Embedding]) -> Embedding:
    """Returns the vectors of several embeddings as one, as ComfyUI reads such a file."""
    keys = dict.fromkeys(key for one in embeddings.values() for key in one.tensors)
    parts = {key: [one.tensors[key] for one in embeddings.values() if key in one.tensors] for key in keys}
    return Embedding({key: torch.cat(tensors) for key, tensors in parts.items()})


def _read_state(path: Path) -> State:
    """Returns a file's tensors; those of AUTOMATIC1111's format under one key."""
    if is_safetensors(path):
        return load_state(read_weight_file(path).states[""])
    content = read_torch(path)
    content = content if isinstance(content, dict) else {}
    if isinstance(params := content.get(_PARAM), Mapping | torch.nn.ParameterDict):
        content = {_PARAM: next(iter(params.values()), None)} if len(params) == 1 else dict(params.items())
    state = {key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor)}
    for key, x in state.items():
        check_plain(path, key, x)
    return state


def find_embeddings(source: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the embedding files of a folder and its subfolders, or one file, by name as in ComfyUI.

    A name is the path in the folder, with or without the ending. Raises ValueError if there is none.
    """
    path = Path(source)
    if not path.is_dir():
        return {path.stem: path, path.name: path}
    files = [x for ending in ENDINGS for x in sorted(path.rglob(f"*{ending}")) if x.is_file()]
    if not files:
        raise ValueError(f"{path} has no embeddings: expected files that end in {', '.join(ENDINGS)}")
    found: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(path)
        for key in (name.with_suffix("").as_posix(), name.as_posix(), file.stem, file.name):
            found.setdefault(key, file)
    return found
