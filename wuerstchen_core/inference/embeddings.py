"""Prompts with `embedding:NAME`: textual inversion vectors among the tokens, and weights in parentheses, as in ComfyUI.

Parentheses count as weights only in prompts with an embedding.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.embeddings import ENDINGS, Embedding, find_embeddings, read_embedding
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.key_maps import COMFYUI_CLIPS
from ..common.text import listed
from ..common.values import to_list
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import END, START, encode
from .arguments import named_arguments
from .components import Components

logger = logging.getLogger(__name__)

AnyPath = str | PathLike[str]
Embeddings = AnyPath | Sequence[AnyPath] | Mapping[str, AnyPath]
Token = int | Tensor  # an id, or a vector [width]
Group = list[tuple[Token, float]]  # tokens that belong together, with their weights

MARK = "embedding:"
_MARKS = re.compile(rf"(?<=\s){MARK}(?=\s*\S)")
NAMES = re.compile(rf"(?:(?<=[\s()])|^){MARK}\s*[^\s()]+")
_ESCAPED = {r"\(": "\ue000", r"\)": "\ue001"}  # characters that no text has
_GROUP = 8  # longer groups are split at the end of a chunk, shorter ones start a new chunk


@named_arguments
def load_embeddings(model: Components, sources: Embeddings) -> list[str]:
    """Reads textual inversion embeddings for prompts with `embedding:NAME`, and returns their names.

    `sources` are files, a folder, or files by name. A name is the file's, with or without its ending. Embeddings stay
    loaded; one of the same name is replaced. Raises ValueError for files that are no embeddings; in a folder, these are
    skipped with a warning.
    """
    named = sources if isinstance(sources, Mapping) else {}
    given = to_list("embeddings", named.values() or sources, str | PathLike)
    found = {name: read_embedding(file) for name, file in named.items()}
    for source in () if named else given:
        files, skipped = find_embeddings(source), []
        read: dict[Path, Embedding] = {}
        for file in dict.fromkeys(files.values()):
            try:
                read[file] = read_embedding(file)
            except ValueError:
                if not Path(source).is_dir():
                    raise
                skipped.append(file.name)
        if skipped:
            logger.warning(f"{source}: skipped {len(skipped)} files that are no embeddings ({listed(skipped)})")
        found |= {name: read[file] for name, file in files.items() if file in read}
    model.embeddings |= found
    model.files.setdefault("embeddings", []).extend(
        {"file": Path(source).name, "weights": fingerprint(source)} for source in given
    )
    return list(found)


def has_embedding(text: str) -> bool:
    """True if a prompt has `embedding:NAME`."""
    return NAMES.search(text) is not None


def check_embeddings(model: Components, texts: Sequence[str]) -> None:
    """Logs which text encoder an embedding does not fit. Raises ValueError for one that fits neither or is unknown."""
    towers = {name: x.params.width for name in COMFYUI_CLIPS if (x := getattr(model, f"{name}_text_encoder"))}
    widths = ", ".join(f"{name} {width}" for name, width in towers.items())
    pieces = [
        piece for text in texts if has_embedding(text) for piece, _, is_embedding in _pieces(text) if is_embedding
    ]
    for embedding, name, _ in (_find(model.embeddings, piece) for piece in pieces):
        lacking = [x for x, width in towers.items() if embedding.vectors(COMFYUI_CLIPS[x], width) is None]
        if len(lacking) == len(towers):
            raise ValueError(
                f"embedding:{name} has vectors of width {embedding.widths()}, but this model's text encoders read "
                f"{widths}: use an embedding made for this model"
            )
        if lacking and f"{MARK}{name}" not in model.reported_words:
            model.reported_words.add(f"{MARK}{name}")
            logger.warning(
                f"embedding:{name} does not fit the {lacking[0]}'s text encoder, which ignores it ({widths})"
            )


def encode_with_embeddings(encoder: TextEncoder, embeddings: Mapping[str, Embedding], tower: str, text: str) -> Tensor:
    """Returns the states [1, 77 n, c] of a prompt with embeddings by the text encoder of the "prior" or "decoder"."""
    width, size = encoder.params.width, encoder.params.context_length
    chunks = token_chunks(text, embeddings, COMFYUI_CLIPS[tower], width, size)
    rows = [[(START, 1.0), *chunk] + [(END, 1.0)] * (size - 1 - len(chunk)) for chunk in chunks]
    ids = torch.tensor([[token if isinstance(token, int) else 0 for token, _ in row] for row in rows])
    ends = (ids == END).int().argmax(dim=1)  # the first one; padding follows
    table = encoder.token_embedding.weight
    x = encoder.token_embedding(ids.to(table.device))
    mask = torch.arange(size) <= ends[:, None]
    for i, row in enumerate(rows):
        for j, (token, _) in enumerate(row):
            if isinstance(token, Tensor):
                x[i, j], mask[i, j] = token.to(x), True
    states = encoder.encode_vectors(x, mask.to(table.device))
    weights = torch.tensor([[weight for _, weight in row] for row in rows]).to(states)[..., None]
    if bool((weights != 1).any()):
        empty = encoder.encode([""])
        states = torch.where(weights == 1, states, empty + (states - empty) * weights)
    return states.flatten(0, 1)[None]


def token_chunks(
    text: str, embeddings: Mapping[str, Embedding], clip: str, width: int, context_length: int = 77
) -> list[Group]:
    """Returns the tokens of a prompt with embeddings, in chunks without start and end, and their weights.

    `clip` and `width` choose the vectors of embeddings.
    """
    return _chunks(list(_groups(text, embeddings, clip, width)), context_length - 2)


def _groups(text: str, embeddings: Mapping[str, Embedding], clip: str, width: int) -> Iterator[Group]:
    """Yields the tokens of a prompt in groups: those of a text between embeddings, or the vectors of an embedding."""
    for piece, weight, is_embedding in _pieces(text):
        if is_embedding:
            embedding, name, piece = _find(embeddings, piece)
            if (vectors := embedding.vectors(clip, width)) is not None:
                yield [(vector, weight) for vector in vectors]
        if piece:
            yield [(token, weight) for token in encode(piece)]


def _pieces(text: str) -> Iterator[tuple[str, float, bool]]:
    """Yields the pieces of a prompt, their weights, and True for pieces that start with the name of an embedding."""
    for escaped, mark in _ESCAPED.items():
        text = text.replace(escaped, mark)
    for part, weight in _weighted(text, 1.0):
        for escaped, mark in _ESCAPED.items():
            part = part.replace(mark, escaped[1])
        first, *others = _MARKS.split(part)
        named = first.removeprefix(MARK)
        yield (named, weight, True) if named != first and named.strip() else (first, weight, False)
        yield from ((other, weight, True) for other in others)


def _find(embeddings: Mapping[str, Embedding], piece: str) -> tuple[Embedding, str, str]:
    """Returns the embedding that a piece starts with, its name and the rest. Raises ValueError if it is unknown."""
    word, *words = piece.split()
    name = re.split(r"[<\[]", word, maxsplit=1)[0]
    for candidate in (name, name.rstrip(",")):
        if candidate in embeddings:
            return embeddings[candidate], candidate, " ".join([word[len(candidate) :], *words]).strip()
    names = [x for x in embeddings if not x.endswith(ENDINGS)]
    known = f"loaded are {listed(names, most=6)}" if names else "none is loaded"
    raise ValueError(f"embedding:{name} is unknown, {known}: give its file or folder as embeddings or --embedding")


def _weighted(text: str, weight: float) -> Iterator[tuple[str, float]]:
    """Yields the parts of a text with their weights: (text) counts 1.1 times, (text:NUMBER) the number."""
    for part in _parentheses(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            yield part, weight
            continue
        inner, inner_weight = part[1:-1], weight * 1.1
        head, _, number = inner.rpartition(":")
        if head and (stated := _number(number)) is not None:
            inner, inner_weight = head, stated
        yield from _weighted(inner, inner_weight)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise ValueError(f"the weight {text} in a prompt must be a number such as 1.2")
    return number


def _parentheses(text: str) -> list[str]:
    """Splits a text into parts in outermost parentheses and those between them."""
    parts, start, depth = [], 0, 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0:
                parts.append(text[start:i])
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : i + 1])
                start = i + 1
    return [part for part in (*parts, text[start:]) if part]


def _chunks(groups: Sequence[Group], size: int) -> list[Group]:
    """Returns the tokens in chunks of up to `size`."""
    chunks: list[Group] = [[]]
    for group in groups:
        is_long = len(group) >= _GROUP
        while len(group) > size - len(chunks[-1]):
            room = size - len(chunks[-1]) if is_long else 0
            chunks[-1] += group[:room]
            group = group[room:]
            chunks.append([])
        chunks[-1] += group
    return chunks
