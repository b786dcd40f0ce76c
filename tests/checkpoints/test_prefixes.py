"""Networks are found behind any prefix and in any container; averaged weights precede others."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import original, random_state
from helpers.networks import PRIOR, VQ
from safetensors.torch import save_file
from torch import Tensor, nn

from wuerstchen_core.checkpoints import describe, load_prior, load_vqgan, read_part
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.key_maps import text_to_transformers
from wuerstchen_core.checkpoints.prefixes import find_networks, unwrapped
from wuerstchen_core.checkpoints.source import ForeignFile
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams
from wuerstchen_core.models.vqgan import VQGAN

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def raw() -> State:
    return random_state(Prior(PRIOR))


@pytest.fixture(scope="module")
def averaged() -> State:
    return random_state(Prior(PRIOR), seed=1)


def behind(prefix: str, state: State) -> State:
    return {prefix + key: x for key, x in state.items()}


def is_prior(file: Path, state: State) -> bool:
    found = read_part(file, "prior").state_dict
    return found.keys() == state.keys() and all(x.equal(state[key]) for key, x in found.items())


PREFIXES = (
    "module.", "_orig_mod.", "stage_c.", "stage_b.", "model.", "model.diffusion_model.", "diffusion_model.", "net.",
    "module._orig_mod.", "_orig_mod.module.", "model.module.stage_c._orig_mod.", "_forward_module.generator.", "ema.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(raw: State, tmp_path: Path, prefix: str) -> None:
    save_file(behind(prefix, raw), tmp_path / "bare.safetensors")
    torch.save({"state_dict": behind(prefix, original(raw)), "epoch": 1}, tmp_path / "nested.pt")
    for file in (tmp_path / "bare.safetensors", tmp_path / "nested.pt"):
        assert is_prior(file, raw)
        assert [part.name for part in describe(file).parts] == ["prior"]


def test_real_wrappers_of_torch(raw: State, tmp_path: Path) -> None:
    prior = Prior(PRIOR)
    prior.load_state_dict(raw)
    compiled = [torch.compile(block) for block in prior.blocks]
    prior.blocks = nn.ModuleList(compiled)
    averaging = torch.optim.swa_utils.AveragedModel(nn.DataParallel(torch.compile(prior)))
    torch.save(averaging.state_dict(), tmp_path / "wrapped.pt")
    assert {
        "n_averaged",
        "module.module._orig_mod.blocks.0._orig_mod.depthwise.weight",
    } <= averaging.state_dict().keys()
    assert is_prior(tmp_path / "wrapped.pt", raw)


def lightning(state: State, **more: Any) -> dict[str, Any]:
    """Returns what Lightning's Trainer saves."""
    return {
        "epoch": 2, "global_step": 100, "pytorch-lightning_version": "2.5.0", "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"last_epoch": 2}], "hparams_name": "args", "hyper_parameters": {"lr": 1e-4}, **more,
    }  # fmt: skip


def test_a_lightning_checkpoint_of_several_networks(raw: State, tmp_path: Path) -> None:
    vqgan = random_state(VQGAN(VQ))
    tower = random_state(TextEncoder(TextEncoderParams(width=64, heads=1, layers=1, vocab_size=9)))
    text = {f"text_model.{key}": x for key, x in text_to_transformers(tower).items()}
    state = {**behind("model.", raw), **behind("vae.", vqgan), **behind("text_encoder.", text)}
    torch.save(lightning({**state, "loss.perceptual.net.0.weight": torch.zeros(2, 2)}), tmp_path / "last.ckpt")
    assert is_prior(tmp_path / "last.ckpt", raw)
    load_vqgan(tmp_path / "last.ckpt")
    assert [part.name for part in describe(tmp_path / "last.ckpt").parts] == ["prior", "vqgan", "text_encoder"]


COUNTERS = {"decay": torch.tensor(0.99), "num_updates": torch.tensor(5)}


def lit_ema(state: State) -> State:
    """Returns the buffers of latent diffusion's LitEma over a module `model` with the network `diffusion_model`."""
    names = {f"model_ema.diffusion_model{key.replace('.', '')}": x for key, x in state.items()}
    return {**names, **behind("model_ema.", COUNTERS)}


EMA = {
    "ema_state_dict": lambda raw, ema: {"state_dict": raw, "ema_state_dict": ema},
    "state_dict_ema": lambda raw, ema: {"state_dict_ema": ema, "state_dict": raw},
    "params_ema": lambda raw, ema: {"params": raw, "params_ema": ema},
    "nested": lambda raw, ema: {"models": {"raw": raw, "ema": {"shadow": ema}}, "optimizer": {"ema": raw}},
    "prefixes": lambda raw, ema: {**behind("online_model.", raw), **behind("ema_model.", ema), "step": torch.ones(())},
    "LitEma": lambda raw, ema: lightning({**behind("model.diffusion_model.", raw), **lit_ema(ema)}),
    "LitEma with dots": lambda raw, ema: {**behind("model.", raw), **behind("model_ema.", {**ema, **COUNTERS})},
    "callback": lambda raw, ema: lightning(raw, callbacks={"EMA": {"ema_weights": ema}}),
    "not non_ema": lambda raw, ema: {"non_ema": raw, "model_ema": ema},
    "Lightning's averaging": lambda raw, ema: lightning(ema, current_model_state=raw),
    "arguments": lambda raw, ema: {"args": Namespace(lr=1e-4), "model": raw, "ema_model": ema},
}


@pytest.mark.parametrize("form", EMA)
def test_averaged_weights_precede_others(raw: State, averaged: State, tmp_path: Path, form: str) -> None:
    torch.save(EMA[form](raw, averaged), tmp_path / "save.pt")
    assert is_prior(tmp_path / "save.pt", averaged)
    convert([tmp_path / "save.pt"], tmp_path / "converted.safetensors")
    assert is_prior(tmp_path / "converted.safetensors", averaged)


def test_a_choice_between_equals_is_logged(
    raw: State, averaged: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**behind("student.", raw), **behind("teacher.", averaged)}, tmp_path / "two.safetensors")
    with caplog.at_level(logging.WARNING):
        assert is_prior(tmp_path / "two.safetensors", raw)
    assert "student" in caplog.text and "teacher" in caplog.text
    caplog.clear()
    save_file(raw, tmp_path / "one.safetensors")
    load_prior(tmp_path / "one.safetensors")
    assert not caplog.text


def test_two_towers_get_their_stages_by_name_or_width(tmp_path: Path) -> None:
    towers = {
        width: random_state(TextEncoder(TextEncoderParams(width=width, heads=width // 64, layers=1, vocab_size=9)))
        for width in (64, 128)
    }
    for prior, decoder, expected in (
        ("prior_text_encoder.", "text_encoder.", (64, 128)),
        ("clip_g.", "clip_h.", (64, 128)),
        ("one.", "other.", (128, 64)),  # the prior's is the wider one
    ):
        save_file({**behind(prior, towers[64]), **behind(decoder, towers[128])}, tmp_path / "towers.safetensors")
        parts = [read_part(tmp_path / "towers.safetensors", f"{stage}_text_encoder") for stage in ("prior", "decoder")]
        assert tuple(part.params.width for part in parts) == expected, prior


def test_other_models_are_named_behind_prefixes(tmp_path: Path) -> None:
    for key, name in (("clip_txt_mapper.weight", "Cascade"), ("double_blocks.0.img_attn.qkv.weight", "Flux")):
        torch.save(lightning({f"model._orig_mod.{key}": torch.zeros(1)}), tmp_path / "other.ckpt")
        with pytest.raises(ForeignFile, match=name):
            describe(tmp_path / "other.ckpt")


def test_wrappers_are_only_whole_names() -> None:
    assert list(unwrapped({"a_orig_mod.b": 0, "_orig_mod.a._orig_mod.b": 0})) == ["a_orig_mod.b", "a.b"]
    assert find_networks("", {"my_cond_mapper.0.weight": 0}) == []


def test_averages_without_names_are_refused(raw: State, tmp_path: Path) -> None:
    """As diffusers' EMAModel.state_dict() and torch_ema's have them."""
    torch.save({"decay": 0.99, "shadow_params": list(raw.values())}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"ema\.pt.*shadow_params"):
        describe(tmp_path / "ema.pt")
