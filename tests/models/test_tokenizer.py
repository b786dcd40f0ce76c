"""Texts become the same token ids everywhere: those of transformers' CLIPTokenizer."""

from __future__ import annotations

import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from helpers.texts import PROMPTS, texts
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.main import main
from wuerstchen_core.models.text_encoder import TextEncoder, tokenize, tokenize_whole
from wuerstchen_core.models.tokenizer import END, START, VOCABULARY, _piece_ids, _tables, encode
from wuerstchen_core.training.data.caption_tokens import CaptionTokenizer
from wuerstchen_core.training.stages.networks import encode_text


def test_the_ids_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    from open_clip.tokenizer import SimpleTokenizer

    table = SimpleTokenizer()
    vocabulary = {**table.encoder, "<|startoftext|>": START, "<|endoftext|>": END}
    start = transformers.AddedToken("<|startoftext|>", normalized=True, special=True)
    expected = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(table.bpe_ranks), bos_token=start)
    for text in texts():
        assert [START, *encode(text), END] == expected(text)["input_ids"], text


def test_pieces_have_the_ids_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    table, rng = SimpleTokenizer(), random.Random(0)
    random_words = ("".join(rng.choices("aabcdeeehilmnoprsttuyéßж中😀!?.-", k=rng.randint(1, 25))) for _ in range(2000))
    for piece in (*random_words, "a" * 200, "haha" * 50, "<start_of_text", *map(chr, range(33, 2000))):
        symbols = "".join(table.byte_encoder[byte] for byte in piece.encode())
        assert _piece_ids(piece) == tuple(table.encoder[token] for token in table.bpe(symbols).split(" ")), piece


def test_the_vocabulary_is_read_from_a_zip_without_importing_open_clip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected, (folder,) = _tables(), find_spec("open_clip").submodule_search_locations
    with ZipFile(tmp_path / "packages.zip", "w") as file:
        file.writestr("open_clip/__init__.py", "raise AssertionError('open_clip was imported')")
        file.write(Path(folder) / VOCABULARY, f"open_clip/{VOCABULARY}")
    monkeypatch.syspath_prepend(tmp_path / "packages.zip")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    assert find_spec("open_clip").origin.startswith(str(tmp_path))
    _tables.cache_clear()
    assert _tables() == expected


def test_texts_stay_as_they_are_written() -> None:
    assert encode("a cat’s “blue” hat") == [320, 2368, 728, 503, 338, 728, 506, 1746, 728, 507, 3801]
    assert encode("salt &amp; pepper") == [6611, 261, 6259, 282, 8253]
    assert encode("CAFE\u0301\n\t café") == encode("café café")
    assert encode("A red  apple") == encode("a\nRED apple ") == [320, 736, 3055]


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", None, 3, b"a cat"])
def test_other_things_than_text_are_rejected(text: Any) -> None:
    with pytest.raises(ValueError, match="text"):
        encode(text)


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151])
def test_long_texts_are_split_after_75_tokens(count: int) -> None:
    text = "a " * count
    ids, mask = tokenize_whole(text)
    assert ids.shape == mask.shape == (max(1, -(-count // 75)), 77)
    assert (ids == encode("a")[0]).sum() == count and int(mask.sum()) == count + 2 * len(ids)
    assert torch.equal(tokenize([text])[0][0], ids[0]) and torch.equal(tokenize([text])[1][0], mask[0])


def test_the_mask_ends_at_the_first_end() -> None:
    ids, mask = tokenize(["a cat", "a <|endoftext|> cat"])
    assert mask.sum(1).tolist() == [4, 3]
    assert ids[1, :5].tolist() == [START, 320, END, 2368, END]


class _Encoded(Exception):
    """Raised in place of running a text encoder."""


def test_python_command_line_and_training_encode_the_same_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forward(self: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
        received.append((ids.cpu(), mask.cpu()))
        raise _Encoded

    received: list[tuple[Tensor, Tensor]] = []
    pipe = WuerstchenPipeline.load("demo")
    monkeypatch.setattr(TextEncoder, "forward", forward)
    for text in PROMPTS[:12]:
        calls = (
            lambda text=text: pipe.generate(text),
            lambda text=text: main(["generate", "--output", str(tmp_path / "a.png"), "--", text]),
            lambda text=text: encode_text(pipe.require("prior_text_encoder"), CaptionTokenizer()([text])),
        )
        received.clear()
        for call in calls:
            with pytest.raises(_Encoded):
                call()
        assert len(received) == len(calls)
        assert all(all(map(torch.equal, ids_and_mask, tokenize_whole(text))) for ids_and_mask in received)
