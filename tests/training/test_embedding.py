"""Textual inversion in a tiny size, and its file in prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_training import INPUTS, write_config
from helpers.networks import NETWORKS
from helpers.tiny_model import tiny_parts
from helpers.tiny_stages import checkpoint
from safetensors import safe_open

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.embeddings import read_embedding
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.models.text_encoder import tokenize_whole
from wuerstchen_core.models.tokenizer import encode
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.report import generate_arguments
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.embedding import (
    VECTORS,
    DecoderEmbeddingStage,
    EmbeddingConfig,
    EmbeddingStage,
    EmbeddingTokenizer,
)
from wuerstchen_core.training.stages.networks import encode_text

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

CONFIG = """
run = "overridden"
[data]
canvas = 64
things = 2
[embedding]
name = "my-fox"
init = "red apple"
vectors = 3
[noise]
text_drop = 0.0
stratified = true
[train]
steps = 4
batch = 8
lr = 0.3
warmup = 1
ema = 0.5
log_every = 5
save_every = 4
sheet_every = 1000
"""
PROMPTS = ("embedding:my-fox", "a embedding:my-fox on a blue background, embedding:my-fox")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("embedding"), bundle, CONFIG)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    return run("embedding", config, [f"run='{config.parent}'"])


def test_vectors_learn_a_word_of_the_captions(config: Path, tmp_path: Path) -> None:
    """The shipped model learns vectors for "pink" from two drawings; losses are those of the same batches."""
    changes = [f"inputs.{name}='demo'" for name in INPUTS] + ["noise.weight='v'", "data.background='pink'"]
    changes += ["embedding={name='my-fox', token='pink', init='small blue', vectors=2}", f"run='{tmp_path}'"]
    file = run("embedding", config, [*changes, "train.lr=0.02", "train.steps=30"])
    stage = EmbeddingStage(read_config(config, changes))
    batches = [stage.batch(step, StepRandom(7, step, 16, range(16))) for step in range(4)]
    losses = []
    for vectors in (stage.net.state_dict()[VECTORS].clone(), read_embedding(file).tensors["clip_g"]):
        stage.net.load_state_dict({VECTORS: vectors})
        with torch.no_grad():
            losses.append(sum(stage.loss(stage.net.eval(), *batch).item() for batch in batches))
    assert losses[1] < 0.5 * losses[0], losses  # observed 0.2


def test_only_the_vectors_are_trained(trained: Path) -> None:
    saved = checkpoint(trained.parent)
    assert list(saved["net"]) == list(saved["average"]) == [VECTORS]
    assert trained.name == "my-fox.safetensors"
    assert torch.equal(read_embedding(trained).tensors["clip_g"], saved["average"][VECTORS])
    with safe_open(trained, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "wuerstchen-v2-prior/textual-inversion"
    assert json.loads(header["trained_words"]) == ["embedding:my-fox"] and header["modelspec.title"] == "my-fox"


def test_a_prompt_has_the_states_that_were_trained(trained: Path, config: Path, bundle: Path, tmp_path: Path) -> None:
    """Those of the trained network equal those of the pipeline, and differ from those of the first words."""
    stage = EmbeddingStage(read_config(config, [f"run='{tmp_path}'"]))
    model: Any = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    model.load_embeddings(trained)
    before = encode_text(stage.net.text_encoder, [stage.dataset.tokenizer.tokens(text) for text in PROMPTS])
    stage.net.load_state_dict(checkpoint(trained.parent)["average"])
    after = encode_text(stage.net.text_encoder, [stage.dataset.tokenizer.tokens(text) for text in PROMPTS])
    for prompt, one, other in zip(PROMPTS, before, after, strict=True):
        states, _ = model.encode_prompt(prompt)
        assert_near(states[0], other, 1e-5)
        assert (one - other).abs().max() > 0.1


def test_new_vectors_are_those_of_the_first_words(config: Path, tmp_path: Path) -> None:
    stage = EmbeddingStage(read_config(config, [f"run='{tmp_path}'"]))
    table = stage.net.get_parameter("text_encoder.token_embedding.weight")
    ids = encode("red apple")
    assert torch.equal(stage.net.get_parameter(VECTORS), table[[ids[0], ids[1], ids[0]]])
    plain = tokenize_whole("red apple red")
    [states] = encode_text(stage.net.text_encoder, [stage.dataset.tokenizer.tokens("embedding:my-fox")])
    assert_near(states, encode_text(stage.net.text_encoder, [plain])[0], 1e-6)


def test_captions_get_the_vectors() -> None:
    tokenizer = EmbeddingTokenizer(EmbeddingConfig("fox", "red", 2, token="<fox>"), 1000, cut=False)
    words = {name: encode(name) for name in ("a", "red", "on blue")}
    expected = {
        "": [],
        "a red": [1000, 1001, *words["a"], *words["red"]],
        "a <fox> on blue": [*words["a"], 1000, 1001, *words["on blue"]],
        "<fox>": [1000, 1001],
    }
    for caption, ids in expected.items():
        found, mask = tokenizer.tokens(caption)
        assert found.shape == mask.shape == (1, 77) and mask.sum() == len(ids) + 2
        assert found[0, 1 : len(ids) + 1].tolist() == ids
    for caption in ("a embedding:cat", "embedding: red", "a (red:inf)", "(embedding:cat:2)"):
        found, mask = tokenizer.tokens(caption)
        plain = encode(caption) if "inf" in caption else encode(caption.strip("()").removesuffix(":2"))
        assert found[0, 1 : mask.sum() - 1].tolist() == [1000, 1001, *plain]
    words_only = EmbeddingTokenizer(EmbeddingConfig("cat", "red", 1, token="cat"), 1000, cut=False)
    assert words_only.prompt("a cat's category").split() == ["a", "embedding:cat", "'s", "category"]
    assert words_only.prompt("a category") == "embedding:cat a category"


def test_both_text_encoders_in_one_file(trained: Path, config: Path, tmp_path: Path) -> None:
    """The decoder's goes on from the prior's file, whose vectors stay."""
    tower = NETWORKS["text_encoder"].perturbed()
    save_bundle(towers := tmp_path / "towers.safetensors", {**tiny_parts(), "decoder_text_encoder": tower}, {})
    changes = [f"inputs.text='{towers}'", "train.steps=2", "train.save_every=2", "train.sheet_every=2"]
    both = run("decoder-embedding", config, [f"run='{tmp_path}'", f"embedding.start='{trained}'", *changes])
    tensors, first = read_embedding(both).tensors, read_embedding(trained).tensors
    assert set(tensors) == {"clip_g", "clip_h"} and torch.equal(tensors["clip_g"], first["clip_g"])
    assert (both.parent / "sheet-000002.png").exists()
    stage = DecoderEmbeddingStage(read_config(config, [f"run='{tmp_path / 'other'}'", *changes]))
    stage.net.load_state_dict(checkpoint(both.parent)["average"])
    model: Any = WuerstchenPipeline.load(towers, device="cpu", dtype="fp32")
    model.load_embeddings(both)
    [expected] = encode_text(stage.net.text_encoder, [stage.dataset.tokenizer.tokens(PROMPTS[1])])
    prior, decoder = model.encode_prompt(PROMPTS[1])
    assert_near(decoder[0], expected, 1e-5)
    assert not torch.equal(prior, decoder)


def test_the_command_that_uses_it(trained: Path, config: Path, tmp_path: Path) -> None:
    stage = EmbeddingStage(table := read_config(config, [f"run='{tmp_path}'"]))
    arguments = generate_arguments(stage, table, trained, "a red apple")
    assert arguments[:2] == ["generate", "embedding:my-fox"] and arguments[-2:] == ["--embedding", str(trained)]


def test_images_of_prompts_while_it_trains(config: Path, tmp_path: Path) -> None:
    sample = "sample={prompts=['embedding:my-fox'], width=64, height=64, prior_steps=1, decoder_steps=1}"
    changes = ["train.steps=1", "train.sheet_every=1", "train.lr=1.0", sample]
    folder = run("embedding", config, [f"run='{tmp_path}'", *changes]).parent
    assert {path.name for path in folder.glob("*.png")} >= {
        "samples-000000.png", "samples-000001.png", "sheet-000001.png", "my-fox.png",
    }  # fmt: skip


MISTAKES = {
    "no name": ({"init": "fox"}, "name"),
    "a path": ({"name": "a/b", "init": "fox"}, "name .*a/b"),
    "no words": ({"name": "fox"}, "init or start"),
    "no vectors": ({"name": "fox", "init": "fox", "vectors": 0}, "vectors .* 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    table, facts = MISTAKES[name]
    with pytest.raises(ValueError, match=rf"\[embedding\] .*{facts}"):
        from_table(EmbeddingConfig, table, "embedding")


def test_another_number_of_vectors_is_refused(trained: Path, config: Path, tmp_path: Path) -> None:
    changes = [f"run='{tmp_path}'", f"embedding.start='{trained}'", "embedding.vectors=2"]
    with pytest.raises(ValueError, match=r"my-fox\.safetensors has 3 vectors, and vectors is 2"):
        EmbeddingStage(read_config(config, changes))
