"""CLIP's tokenizer, as the released models were trained with it: transformers' CLIPTokenizer on open_clip's BPE table.

Unlike open_clip's own `encode`, it neither straightens quotes nor decodes HTML entities.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

START, END = 49406, 49407  # <|startoftext|>, <|endoftext|>, which is also the padding

_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


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


@cache
def _table() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds to import

    return SimpleTokenizer()


def _piece_ids(piece: str) -> list[int]:
    """Returns the ids of one piece of a text: a word, a digit or a run of other characters."""
    table = _table()
    symbols = "".join(table.byte_encoder[byte] for byte in piece.encode())
    return [table.encoder[token] for token in table.bpe(symbols).split(" ")]
