"""Tests bundles that store only the trained rows of a token embedding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import NETWORKS

from tools.demo.build import drop_token_rows, trained_tokens
from wuerstchen_core.checkpoints import Part, describe, load_text_encoder, save_bundle
from wuerstchen_core.checkpoints.bundle import restore_token_rows
from wuerstchen_core.checkpoints.lazy import lazy_state
from wuerstchen_core.checkpoints.quant import FP8
from wuerstchen_core.demo.vocabulary import LAYOUTS, caption, scenes
from wuerstchen_core.models.text_encoder import tokenize

ROWS = [5, 0, 511, 49406, 49407]


@pytest.fixture(scope="module")
def tower() -> Part:
    network = NETWORKS["text_encoder"].perturbed()
    return Part("text_encoder", network.params, network.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, FP8])
def test_stored_rows_are_restored_and_the_others_are_zeros(
    tower: Part, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    whole, thin = tmp_path / "whole.safetensors", tmp_path / "thin.safetensors"
    save_bundle(whole, {"text_encoder": tower}, {}, dtype=dtype)
    save_bundle(thin, {"text_encoder": drop_token_rows(tower, ROWS)}, {}, dtype=dtype)
    assert thin.stat().st_size < 0.2 * whole.stat().st_size
    before, after = (load_text_encoder(file).token_embedding.weight for file in (whole, thin))
    assert after.shape == before.shape and after.dtype == before.dtype
    if dtype != FP8:  # a smaller embedding may get a finer scale
        assert torch.equal(after[ROWS], before[ROWS])
    torch.testing.assert_close(after[ROWS].float(), before[ROWS].float(), rtol=0.07, atol=1e-4)
    rest = torch.ones(len(after), dtype=torch.bool)
    rest[ROWS] = False
    assert before[ROWS].any() and not after[rest].any()
    assert describe(thin).parts[0].parameters == describe(whole).parts[0].parameters


@pytest.mark.parametrize("sizes", [None, {}, {"vocab_size": "many"}])
def test_a_missing_vocabulary_size_is_rejected(tower: Part, sizes: dict[str, Any] | None) -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        restore_token_rows(lazy_state(drop_token_rows(tower, ROWS).state_dict), sizes)


@pytest.mark.parametrize("rows", [[5, 0], [5, 0, 511, 49406, 49408], [5, 0, 511, 49406, -1]])
def test_invalid_rows_are_rejected(tower: Part, rows: list[int]) -> None:
    state = {**drop_token_rows(tower, ROWS).state_dict, "token_embedding.rows": torch.tensor(rows)}
    with pytest.raises(ValueError, match="token_embedding"):
        restore_token_rows(lazy_state(state), {"vocab_size": 49408})


def test_the_demos_store_all_tokens_of_captions() -> None:
    words = random.Random(0)
    some = words.sample(scenes(LAYOUTS), 5000)
    ids, _ = tokenize([caption(scene, words) for scene in some] + ["Hm? 12!"])
    assert set(ids.flatten().tolist()) - set(tokenize(["Hm"])[0].flatten().tolist()) <= trained_tokens()
