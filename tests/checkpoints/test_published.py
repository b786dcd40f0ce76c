"""Tests that each published file and each trainer's folder, with all keys at tiny sizes, is recognised by its contents.

`test_key_maps` compares full-size shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import (
    State,
    clip_of_transformers,
    comfyui,
    encoder_state,
    manifest_keys,
    original,
    random_state,
    stage_states,
    vae_save,
    vqgan_of_diffusers,
)
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import describe, load_prior, read_part
from wuerstchen_core.checkpoints.key_maps import text_from_transformers
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.source import ForeignFile
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

VQ = VQGANParams(c_hidden=8, codebook_size=16)
EFFNET_L = ImageEncoderParams(EFFICIENTNET_V2_L)


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {
        **stage_states(),
        "vqgan": random_state(VQGAN(VQ)),
        "encoder_s": encoder_state(),
        "encoder_l": encoder_state(EFFNET_L),
    }


def test_the_states_have_all_keys_of_the_published_files(states: dict[str, State]) -> None:
    assert original(states["first_prior"]).keys() == manifest_keys("orig_v1_stage_c_prior")
    assert original(states["prior"]).keys() == manifest_keys("orig_v2_stage_c_prior")
    assert states["prior"].keys() == manifest_keys("diffusers_prior")
    assert original(states["decoder"]).keys() == manifest_keys("orig_v2_stage_b_diffnext")
    assert states["decoder"].keys() == manifest_keys("diffusers_diffnext")
    assert states["token_decoder"].keys() == manifest_keys("orig_v1_stage_b_paella")
    assert states["vqgan"].keys() == manifest_keys("orig_stage_a_vqmodel")
    assert vqgan_of_diffusers(states["vqgan"]).keys() == manifest_keys("diffusers_paella_vqmodel")
    assert states["encoder_s"].keys() == manifest_keys("orig_v2_effnet_s")
    assert states["encoder_l"].keys() == manifest_keys("orig_v1_effnet_l")


# Content of a training save other than the weights.
TRAINING: dict[str, Any] = {
    "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": []},
    "scheduler_last_step": 3,
    "iter": 3,
    "metrics": {"ema_loss": 0.1},
    "grad_scaler_state_dict": {"scale": 65536.0, "growth_tracker": 0},
    "wandb_run_id": "abc",
}

# Original files: name, state dicts by key, parts that are read from it, release.
ORIGINALS: list[tuple[str, dict[str, str], dict[str, str], str]] = [
    ("vqgan_f4_v1_500k.pt", {"state_dict": "vqgan"}, {"vqgan": "vqgan"}, "v1 and v2 alike"),
    (
        "model_stage_b.pt",
        {"state_dict": "token_decoder", "effnet_state_dict": "encoder_l"},
        {"token_decoder": "token_decoder", "image_encoder": "encoder_l"},
        "v1",
    ),
    ("model_stage_c.pt", {"ema_state_dict": "first_prior"}, {"prior": "first_prior"}, "v1 (or"),
    ("model_stage_c_ema.pt", {"state_dict_ema": "first_prior"}, {"prior": "first_prior"}, "v1 (or"),
    (
        "model_v2_stage_b.pt",
        {"state_dict": "decoder", "effnet_state_dict": "encoder_s"},
        {"decoder": "decoder", "image_encoder": "encoder_s"},
        "v2",
    ),
    ("model_v2_stage_c.pt", {"ema_state_dict": "prior"}, {"prior": "prior"}, "v2"),
    ("model_v2_stage_c_finetune.pt", {"ema_state_dict": "prior"}, {"prior": "prior"}, "v2"),
    ("model_v2_stage_c_finetune_interpolation.pt", {"ema_state_dict": "prior"}, {"prior": "prior"}, "v2"),
    ("model_v3_stage_c.pt", {"ema_state_dict": "prior"}, {"prior": "prior"}, "v2"),
]


def assert_parts(source: Path, parts: dict[str, State]) -> None:
    """Checks that a source has exactly these parts and weights."""
    opened = open_source(source)
    assert set(opened.networks) == set(parts)
    for name, state in parts.items():
        found = read_part(source, name).state_dict
        assert found.keys() == state.keys() and all(found[key].equal(x) for key, x in state.items()), name


@pytest.mark.parametrize("training", [{}, TRAINING], ids=["bare", "training"])
@pytest.mark.parametrize(("name", "contents", "parts", "release"), ORIGINALS, ids=[row[0] for row in ORIGINALS])
def test_original_files(
    states: dict[str, State],
    tmp_path: Path,
    name: str,
    contents: dict[str, str],
    parts: dict[str, str],
    release: str,
    training: dict[str, Any],
) -> None:
    # The token decoder and networks without attention have the original's names.
    layouts = {key: original(states[kind]) if kind in ("prior", "first_prior", "decoder") else states[kind]
               for key, kind in contents.items()}  # fmt: skip
    torch.save(layouts | training, tmp_path / name)
    assert_parts(tmp_path / name, {part: states[kind] for part, kind in parts.items()})
    description = describe(tmp_path / name)
    assert description.version.startswith(release)
    assert [part.name for part in description.parts] == list(parts)


@pytest.mark.parametrize("ending", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("kind", ["prior", "decoder", "vqgan"])
def test_components_of_diffusers(states: dict[str, State], tmp_path: Path, ending: str, kind: str) -> None:
    """warp-ai/wuerstchen-prior-model-{base,finetuned,interpolated} are such folders."""
    state = vqgan_of_diffusers(states[kind]) if kind == "vqgan" else states[kind]
    write_component(tmp_path / kind, state, ending)
    (tmp_path / kind / "config.json").write_text(json.dumps({"_class_name": CLASSES[kind]}))
    assert_parts(tmp_path / kind, {kind: states[kind]})


CLASSES = {"prior": "WuerstchenPrior", "decoder": "WuerstchenDiffNeXt", "vqgan": "PaellaVQModel"}


def write_component(folder: Path, state: State, ending: str, stem: str = "diffusion_pytorch_model") -> None:
    folder.mkdir(parents=True)
    if ending == "bin":
        torch.save(state, folder / f"{stem}.bin")
    elif ending == "safetensors":
        save_file({key: x.contiguous() for key, x in state.items()}, folder / f"{stem}.safetensors")
    else:
        keys = list(state)
        names = {key: f"{stem}-0000{1 + (2 * i >= len(keys))}-of-00002.safetensors" for i, key in enumerate(keys)}
        for name in set(names.values()):
            save_file({key: x for key, x in state.items() if names[key] == name}, folder / name)
        index = {"metadata": {"total_size": 0}, "weight_map": names}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_pipeline(root: Path, class_name: str, components: dict[str, tuple[State, str]], **config: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, (state, stem) in components.items():
        write_component(root / name, state, "safetensors", stem)
        (root / name / "config.json").write_text("{}")
    (root / "model_index.json").write_text(json.dumps({"_class_name": class_name, **config}))
    for name in ("tokenizer", "scheduler"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")


def tower(width: int) -> State:
    """Returns a text tower of transformers with two layers and heads 64 wide."""
    state = clip_of_transformers(width, 2, vocab_size=9)
    return {key: x.contiguous() for key, x in state.items() if "projection" not in key}


def test_pipelines_of_diffusers(states: dict[str, State], tmp_path: Path) -> None:
    text = tower(64)
    vqgan = vqgan_of_diffusers(states["vqgan"])
    write_pipeline(
        tmp_path / "wuerstchen",
        "WuerstchenDecoderPipeline",
        {"decoder": (states["decoder"], "diffusion_pytorch_model"), "vqgan": (vqgan, "diffusion_pytorch_model"),
         "text_encoder": (text, "model")},
        latent_dim_scale=10.67,
    )  # fmt: skip
    description = describe(tmp_path / "wuerstchen")
    assert (description.kind, description.version) == ("diffusers folder", "v2")
    assert [part.name for part in description.parts] == ["decoder", "vqgan", "decoder_text_encoder"]
    assert description.missing == ("prior", "image_encoder", "prior_text_encoder")


@pytest.mark.parametrize("saver", ["diffusers", "OneTrainer", "OneTrainer's backup"])
def test_priors_of_diffusers_and_onetrainer(states: dict[str, State], tmp_path: Path, saver: str) -> None:
    """OneTrainer saves its combined pipeline's `prior_pipe` with diffusers; a backup also has its own files."""
    components = {"prior": (states["first_prior"], "diffusion_pytorch_model"), "text_encoder": (tower(64), "model")}
    write_pipeline(
        tmp_path, "WuerstchenPriorPipeline", components, latent_mean=42.0, latent_std=1.0, resolution_multiple=42.67
    )
    if saver == "OneTrainer":  # trained embeddings
        (tmp_path / "model_embeddings").mkdir()
        save_file({"clip_g": torch.zeros(1, 64)}, tmp_path / "model_embeddings" / "word.safetensors")
    if saver == "OneTrainer's backup":
        for name in ("optimizer", "ema"):
            (tmp_path / name).mkdir()
            torch.save({"state": {}}, tmp_path / name / f"{name}.pt")
        (tmp_path / "meta.json").write_text('{"train_progress": {"epoch": 1}}')
    description = describe(tmp_path)
    assert (description.version, [part.name for part in description.parts]) == ("v2", ["prior", "prior_text_encoder"])
    part = read_part(tmp_path, "prior", version="v1")  # the folder overrides the version
    assert all(part.state_dict[key].equal(x) for key, x in states["first_prior"].items())
    assert (part.params.feature_scale, part.params.feature_shift) == (42, 1)


def test_onetrainers_folder_as_diffusers_itself_writes_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    from diffusers import DDPMWuerstchenScheduler, WuerstchenCombinedPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        hidden_act="gelu", bos_token_id=7, eos_token_id=8,
    )  # fmt: skip
    prior = diffusers.WuerstchenPrior(c_in=16, c=64, c_cond=64, c_r=8, depth=2, nhead=1)
    scheduler = DDPMWuerstchenScheduler()
    pipeline = WuerstchenCombinedPipeline(
        tokenizer=None, text_encoder=None, decoder=None, scheduler=scheduler, vqgan=None, prior_tokenizer=None,
        prior_text_encoder=CLIPTextModel(config), prior_prior=prior, prior_scheduler=scheduler,
    )  # fmt: skip
    pipeline.prior_pipe.to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    network = load_prior(tmp_path)
    assert network.params == PriorParams(c=64, c_cond=64, c_r=8, depth=2, nhead=1)
    assert all(x.equal(prior.state_dict()[key]) for key, x in network.state_dict().items())
    assert read_part(tmp_path, "prior_text_encoder").params.width == 64


def test_efficient_net_encoder_of_warp_ai(states: dict[str, State], tmp_path: Path) -> None:
    torch.save(states["encoder_s"], tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"_class_name": "EfficientNetEncoder", "effnet": "efficientnet_v2_s"}')
    assert_parts(tmp_path, {"image_encoder": states["encoder_s"]})
    assert describe(tmp_path).version == "v2"


@pytest.mark.parametrize("kind", ["first_prior", "decoder", "token_decoder"])
def test_model_save_of_comfyui(states: dict[str, State], tmp_path: Path, kind: str) -> None:
    state = comfyui(states[kind]) | {"model_sampling.sigmas": torch.zeros(3)}
    save_file(state, tmp_path / "saved.safetensors", metadata={"prompt": "{}"})
    assert_parts(tmp_path / "saved.safetensors", {kind.removeprefix("first_"): states[kind]})


def test_checkpoint_save_of_comfyui(states: dict[str, State], tmp_path: Path) -> None:
    """The CLIP's name tells the stage of the text tower."""
    text = tower(64)
    clip = {f"cond_stage_model.clip_h.transformer.{key}": x for key, x in text.items()}
    vae = {f"first_stage_model.{key}": x for key, x in states["vqgan"].items()}
    save_file(comfyui(states["decoder"]) | clip | vae, tmp_path / "saved.safetensors")
    parts = {"decoder": states["decoder"], "vqgan": states["vqgan"]}
    assert_parts(tmp_path / "saved.safetensors", parts | {"decoder_text_encoder": text_from_transformers(text)})


@pytest.mark.parametrize("kind", ["vqgan", "encoder_s"])
def test_vae_save_of_comfyui(states: dict[str, State], tmp_path: Path, kind: str) -> None:
    """VAESave prefixes an image encoder's keys, but not Stage A's."""
    torch.save(vae_save(states[kind]), tmp_path / "saved.pt")
    name = "vqgan" if kind == "vqgan" else "image_encoder"
    assert_parts(tmp_path / "saved.pt", {name: states[kind]})


def test_stable_cascades_stage_a_is_ours(states: dict[str, State], tmp_path: Path) -> None:
    """It has the same keys; ComfyUI's repackaged files are in half precision."""
    half = {key: x.half() if x.is_floating_point() else x for key, x in states["vqgan"].items()}
    save_file(half, tmp_path / "stage_a.safetensors")
    assert_parts(tmp_path / "stage_a.safetensors", {"vqgan": half})


def test_folder_of_stable_diffusion_is_named(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "StableDiffusionPipeline", {"text_encoder": (tower(64), "model")})
    with pytest.raises(ForeignFile, match="StableDiffusionPipeline"):
        open_source(tmp_path)


def test_incomplete_folder(states: dict[str, State], tmp_path: Path) -> None:
    """After an incomplete download the present parts load, and a missing one is named."""
    vqgan = (vqgan_of_diffusers(states["vqgan"]), "diffusion_pytorch_model")
    write_pipeline(tmp_path, "WuerstchenDecoderPipeline", {"vqgan": vqgan})
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text("{}")
    assert_parts(tmp_path, {"vqgan": states["vqgan"]})
    assert describe(tmp_path).missing == (
        "prior",
        "decoder",
        "image_encoder",
        "prior_text_encoder",
        "decoder_text_encoder",
    )
    with pytest.raises(ValueError, match="has no decoder; it holds vqgan$"):
        read_part(tmp_path, "decoder")
