"""Trained LoRAs, read by diffusers and by this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_training import ALPHA, CHANGED, CONFIGURED, RANK, TOKENS, write_config
from helpers.networks import NETWORKS, PRIOR, TEXT
from helpers.tiny_stages import ema_of
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import load_prior, load_text_encoder
from wuerstchen_core.checkpoints.adapters import delta
from wuerstchen_core.checkpoints.key_maps import text_to_transformers
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.adapters import attach
from wuerstchen_core.training.stages.text_tower import attach_text_encoder

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
pytest.importorskip("peft", reason="LoRAs are trained with peft")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """The folder of a run."""
    config = write_config(tmp_path_factory.mktemp("lora"), bundle)
    return run("lora", config, [f"run='{config.parent}'"]).parent


@pytest.fixture(scope="module")
def learned(trained: Path, bundle: Path) -> Prior:
    """The prior and its text encoder with the trained adapters, computed by peft."""
    prior = load_prior(bundle)
    attach_text_encoder(prior, load_text_encoder(bundle))
    attach(prior, CONFIGURED)
    prior.load_state_dict(ema_of(trained))
    return prior.eval().requires_grad_(False)


def test_a_read_lora_includes_the_factor_alpha_over_rank(trained: Path) -> None:
    lora, state = read_lora(trained / "lora.safetensors"), ema_of(trained)
    read = {f"diffusion_model.{path}": adapter for path, adapter in lora.network.items()}
    read |= {f"text_encoder.text_model.{path}": adapter for path, adapter in lora.text.items()}
    assert read.keys() == set(CHANGED.values()) and not lora.unknown
    for path, name in CHANGED.items():
        up, down = (state[f"{path}.lora_{half}.default.weight"] for half in "BA")
        assert_near(delta(read[name].tensors), up @ down * (ALPHA / RANK), 1e-6)


def as_transformers(bundle: Path) -> Any:
    """Returns the text encoder as transformers' class."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": TEXT.width, "intermediate_size": 4 * TEXT.width, "num_hidden_layers": TEXT.layers}
    config = CLIPTextConfig(
        **sizes, vocab_size=TEXT.vocab_size, num_attention_heads=TEXT.heads, hidden_act="gelu", eos_token_id=49407
    )
    state = text_to_transformers(load_text_encoder(bundle).state_dict())
    tower = CLIPTextModel(config).eval()
    (getattr(tower, "text_model", tower)).load_state_dict(state)
    return tower


def test_diffusers_pipeline_gives_the_same_outputs(trained: Path, learned: Prior, bundle: Path) -> None:
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    theirs = diffusers.WuerstchenPrior(
        c=PRIOR.c, c_cond=PRIOR.c_cond, depth=PRIOR.depth, nhead=PRIOR.nhead, c_r=PRIOR.c_r, dropout=0.0
    )
    theirs.load_state_dict(load_prior(bundle).state_dict())
    tower, (x, t, text), (ids, mask) = as_transformers(bundle), NETWORKS["prior"].inputs(), TOKENS

    def results() -> tuple[Tensor, Tensor]:
        return theirs(x, t, text), tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    with torch.no_grad():
        plain = (theirs.eval()(x, t, text), load_text_encoder(bundle)(ids, mask))
        assert_near(results()[1], plain[1], 1e-5)
        pipeline = diffusers.WuerstchenPriorPipeline(tokenizer=None, text_encoder=tower, prior=theirs, scheduler=None)
        pipeline.load_lora_weights(trained)
        changed = results()
    for found, expected, before in zip(changed, outputs(learned), plain, strict=True):
        assert_near(found, expected, 1e-5)
        assert (found - before).abs().max() > 0.01


def outputs(prior: Prior) -> tuple[Tensor, Tensor]:
    """Returns noise and text states."""
    return prior(*NETWORKS["prior"].inputs()), prior.get_submodule("text_encoder")(*TOKENS)


def test_the_pipeline_merges_what_peft_computes(trained: Path, learned: Prior, bundle: Path) -> None:
    file, inputs = trained / "lora.safetensors", NETWORKS["prior"].inputs()

    def outputs_with(**options: Any) -> tuple[Tensor, Tensor]:
        pipeline = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32", **options)
        assert pipeline.prior and pipeline.prior_text_encoder and pipeline.decoder_text_encoder
        assert torch.equal(pipeline.decoder_text_encoder(*TOKENS), load_text_encoder(bundle)(*TOKENS))
        return pipeline.prior(*inputs), pipeline.prior_text_encoder(*TOKENS)

    plain, half, full = outputs_with(), outputs_with(lora={str(file): 0.5}), outputs_with(lora=file)
    for i, expected in enumerate(outputs(learned)):
        assert_near(full[i], expected, 1e-5)
        assert torch.equal(outputs_with(lora={file: 0.0})[i], plain[i])
        assert (half[i] - plain[i]).abs().max() > 1e-3 and (half[i] - full[i]).abs().max() > 1e-3
