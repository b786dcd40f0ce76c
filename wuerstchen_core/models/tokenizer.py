"""CLIP's tokenizer, as the released models were trained with it: transformers' CLIPTokenizer on open_clip's BPE table.

Unlike open_clip's own `encode`, it neither straightens quotes nor decodes HTML entities.
"""

from __future__ import annotations

import gzip
import unicodedata
from functools import cache, lru_cache
from importlib.util import find_spec
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

START, END = 49406, 49407  # <|startoftext|>, <|endoftext|>, which is also the padding

_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # open_clip's file; its first line is a heading
_END_OF_WORD = "</w>"


def encode(text: str) -> list[int]:
    """Returns the token ids of a text, without START before and END behind them.

    Raises ValueError unless the text is a str that UTF-8 can represent.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a text: a prompt or caption is a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not Unicode text at character {error.start}: save or pass it as UTF-8") from None
    ids: list[int] = []
    for i, part in enumerate(text.split("<|endoftext|>")):
        ids += [END] * (i > 0)
        for j, words in enumerate(_normalized(part).split("<|startoftext|>")):
            ids += [START] * (j > 0)
            ids += [token for piece in _pieces().findall(words) for token in _piece_ids(piece)]
    return ids


def _normalized(text: str) -> str:
    """Returns a text composed (NFC) and in lower case, character by character: a final sigma stays as it is."""
    return "".join(character.lower() for character in unicodedata.normalize("NFC", text))


@cache
def _pieces() -> Any:
    import regex  # required by open_clip

    return regex.compile(_PIECES)


@lru_cache(maxsize=2**16)
def _piece_ids(piece: str) -> tuple[int, ...]:
    """Returns the ids of one piece of a text: a word, a digit or a run of other characters."""
    ranks, ids = _tables()
    symbols = [_byte_symbols()[byte] for byte in piece.encode()]
    symbols[-1] += _END_OF_WORD
    while known := [pair for pair in pairwise(symbols) if " ".join(pair) in ranks]:
        first, second = min(known, key=lambda pair: ranks[" ".join(pair)])
        merged: list[str] = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == (first, second):
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged
    return tuple(ids[symbol] for symbol in symbols)


@cache
def _byte_symbols() -> dict[int, str]:
    """Returns the character of each byte in the table: its own if that is visible, else one of those from 256 on."""
    visible = [byte for byte in range(256) if byte != ord(" ") and chr(byte).isprintable()]
    hidden = [byte for byte in range(256) if byte not in visible]
    return dict(zip([*visible, *hidden], [*map(chr, visible), *map(chr, range(256, 256 + len(hidden)))], strict=True))


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Returns the id of each token, and the merges, such as "a b", in order, for transformers' CLIPTokenizer."""
    ranks, ids = _tables()
    return {**ids, "<|startoftext|>": START, "<|endoftext|>": END}, list(ranks)


@cache
def _tables() -> tuple[dict[str, int], dict[str, int]]:
    """Returns the rank of each merge, such as "a b", and the id of each token."""
    spec: Any = find_spec("open_clip")  # importing it would take seconds
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    file = BytesIO(spec.loader.get_data(str(Path(spec.origin).with_name(VOCABULARY))))
    symbols = list(_byte_symbols().values())
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [line.rstrip("\n") for line in islice(lines, 1, START - 2 * len(symbols) + 1)]
    tokens = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols), *(pair.replace(" ", "") for pair in merges)]
    return {pair: rank for rank, pair in enumerate(merges)}, {token: id for id, token in enumerate(tokens)}
