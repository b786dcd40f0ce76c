"""The loaders of single files: every layout, from any of the user's folders, equals the core."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import Generate, find
from errors import check_error
from helpers.layouts import (
    Payload,
    clip_of_open_clip,
    clip_of_transformers,
    comfyui,
    encoder_state,
    original,
    vqgan_of_diffusers,
)
from helpers.networks import DECODER, NETWORKS, PRIOR
from inside_loaders import (
    BY_WIDTH,
    DISTILLED,
    DISTILLED_BUNDLE,
    DTYPES,
    ENCODER,
    FILES,
    LARGE,
    LATENTS,
    MISTAKES,
    PICTURE,
    PROMPTS,
    TOWERS,
    VAES,
    inputs,
    seeded,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.comfyui.client import Inside, Install, Server, run_inside
from wuerstchen_core.checkpoints import Part, build_part, load_text_encoder, read_part, save_bundle
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoderParams, semantic_view
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams, tokenize

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
WIDTH = 64  # of both text encoders
WHOLE = "loaders.safetensors"
FEW_STEPS = {"schedule": "turbo", "prior_steps": 2, "prior_guidance": 1.0, "decoder_steps": 1}
DISTILLATION = {"distillation": {"steps": 2}, "sampling": FEW_STEPS}
MARKER = "made_by_a_pickle"  # a file that a malicious pickle would write


def write_truncated(path: Path, write: Callable[[Path], Any]) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_models(folder: Path, networks: dict[str, nn.Module]) -> None:
    prior, decoder = (networks[stage].state_dict() for stage in ("prior", "decoder"))
    torch.save({"ema_state_dict": original(prior), "iter": 3}, folder / "prior_original.pt")
    save_file(prior, folder / "prior_diffusers.safetensors")
    save_file(comfyui(prior), folder / "prior_comfyui.safetensors")
    save_bundle(folder / "prior_bundle.safetensors", {"prior": networks["prior"]}, {"sampling": FEW_STEPS})
    for part in ("prior", "decoder"):
        save_bundle(folder / f"distilled_{part}.safetensors", {part: networks[part]}, DISTILLATION)
    torch.save({"state_dict": original(decoder), "effnet_state_dict": encoder_state()}, folder / "decoder_original.pt")
    torch.save(decoder, folder / "decoder_diffusers.bin")
    shapes = Prior(PriorParams(c=704, nhead=11, depth=8), device="meta").state_dict()
    save_file({key: torch.zeros(x.shape) for key, x in shapes.items()}, folder / LARGE)

    torch.save({"state_dict": networks["vqgan"].state_dict()}, folder / "stage_a.pt")
    save_file(clip_of_transformers(WIDTH, 1, vocab_size=20), folder / "tower.safetensors")
    torch.save(encoder_state(), folder / "encoder.pt")
    encoder_v1 = encoder_state(ImageEncoderParams(EFFICIENTNET_V2_L))
    v1 = {"state_dict": {"byt5_mapper.weight": torch.zeros(1)}, "effnet_state_dict": encoder_v1}
    torch.save(v1, folder / "v1_stage_b.pt")
    for name, key in {
        "cascade": "model.diffusion_model.clip_txt_pooled_mapper.weight",
        "sd": "model.diffusion_model.input_blocks.0.0.weight",
        "lora": "prior.blocks.2.attention.to_q.lora_A.weight",
        "unknown": "some.key",
    }.items():
        save_file({key: torch.zeros(1)}, folder / f"{name}.safetensors")
    save_bundle(folder / "whole.safetensors", {stage: networks[stage] for stage in ("prior", "decoder")}, {})
    save_file({key: x for key, x in prior.items() if key != "out.1.bias"}, folder / "half.safetensors")
    write_truncated(folder / "cut.safetensors", lambda path: save_file(prior, path))
    write_truncated(folder / "cut.pt", lambda path: torch.save(original(prior), path))
    torch.save({"state_dict": original(prior), "extra": Payload(folder / MARKER)}, folder / "payload.pt")


def write_towers(folder: Path, networks: dict[str, nn.Module]) -> None:
    clip_g = clip_of_transformers(WIDTH, 2) | {"logit_scale": torch.ones(())}
    save_file(clip_g, folder / "prior_tower.safetensors")
    torch.save(clip_of_open_clip(WIDTH, 2), folder / "decoder_tower.bin")
    tower = read_part(folder / "decoder_tower.bin", "decoder_text_encoder")
    save_bundle(folder / "tower_bundle.safetensors", {"decoder_text_encoder": tower}, {})
    for name, width in zip(BY_WIDTH, (1280, 1024), strict=True):
        params = TextEncoderParams(width=width, heads=width // 64, layers=1, vocab_size=20, mlp_ratio=64 / width)
        save_file(TextEncoder(params, dtype=torch.bfloat16).state_dict(), folder / name)

    for name, width, layer in (("sd2", 1024, 22), ("clip_l", 768, 11)):
        state = {"token_embedding.weight": (20, width), f"transformer.resblocks.{layer}.ln_1.bias": (width,)}
        save_file({key: torch.zeros(shape) for key, shape in state.items()}, folder / f"{name}.safetensors")
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}, folder / "t5.safetensors")
    save_file(networks["decoder"].state_dict(), folder / "decoder.safetensors")
    small = [TextEncoder(TextEncoderParams(width=WIDTH, heads=1, layers=i, vocab_size=20)) for i in (1, 2)]
    towers = dict(zip(("prior_text_encoder", "decoder_text_encoder"), small, strict=True))
    save_bundle(folder / "two_towers.safetensors", towers, {})


def write_vaes(folder: Path, networks: dict[str, nn.Module]) -> None:
    vqgan = networks["vqgan"].state_dict()
    training = {"discriminator": {"weight": torch.zeros(1)}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}}
    torch.save({"state_dict": vqgan, **training}, folder / "stage_a_original.pt")
    save_file(vqgan, folder / "stage_a_cascade.safetensors")
    save_file(vqgan_of_diffusers(vqgan), folder / "stage_a_diffusers.safetensors")
    save_bundle(folder / ENCODER, {"image_encoder": networks["image_encoder"]}, {})

    parts = {name: networks[name] for name in ("vqgan", "image_encoder")}
    save_bundle(folder / "v1_parts.safetensors", parts, {"version": "v1"})
    save_file({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}, folder / "sd_vae.safetensors")
    save_file(networks["prior"].state_dict(), folder / "prior.safetensors")
    plain = {key: x for key, x in encoder_state().items() if key not in ("mapper.1.weight", "mapper.1.bias")}
    torch.save(plain, folder / "effnet_cascade.pt")


@pytest.fixture(scope="session")
def networks(models: Path) -> dict[str, nn.Module]:
    """The networks of the files in the models folder, which also has a bundle of all of them."""
    builds: dict[str, Callable[[], nn.Module]] = {
        "prior": lambda: Prior(replace(PRIOR, c_cond=WIDTH)),
        "decoder": lambda: Decoder(replace(DECODER, clip_embd=WIDTH)),
        "vqgan": NETWORKS["vqgan"].build,
        "image_encoder": NETWORKS["image_encoder"].build,
    }
    networks = {name: replace(NETWORKS[name], build=build).perturbed() for name, build in builds.items()}
    nn.init.constant_(networks["vqgan"].out_block[0].bias, 0.5)  # grey images, not clipped to black
    torch.manual_seed(0)
    write_models(models / "diffusion_models", networks)
    write_towers(models / "text_encoders", networks)
    write_vaes(models / "vae", networks)
    towers = {
        f"{stage}_text_encoder": read_part(models / "text_encoders" / file, f"{stage}_text_encoder")
        for stage, file in zip(("prior", "decoder"), TOWERS[:2], strict=True)
    }
    save_bundle(models / "checkpoints" / WHOLE, {**networks, **towers}, {})
    save_bundle(models / "checkpoints" / DISTILLED_BUNDLE, {**networks, **towers}, DISTILLATION)
    return networks


@pytest.fixture(scope="module")
def inside(
    install: Install, models: Path, networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Inside:
    """The results of inside_loaders.py in this ComfyUI, which finds the models through extra_model_paths.yaml."""
    folder = tmp_path_factory.mktemp("loaders")
    saved, folders = folder / "saved", folder / "extra_model_paths.yaml"
    saved.mkdir()
    paths = {"unet": f"diffusion_models\n{saved}", "clip": "text_encoders", "vae": "vae"}  # older names of the folders
    paths["checkpoints"] = f"checkpoints\n{saved}"
    folders.write_text(json.dumps({"mine": {"base_path": str(models), **paths}}), encoding="utf-8")
    return run_inside(install, "inside_loaders.py", folder, folders, saved)


@torch.inference_mode()
def expected(networks: dict[str, nn.Module], kind: str, dtype: str = "fp32") -> Tensor:
    """Returns the core's prediction with weights rounded to a dtype."""
    state = {key: x.to(DTYPES[dtype]).float() for key, x in networks[kind].state_dict().items()}
    network = build_part(Part(kind, networks[kind].params, state))
    x, t, text, *prior_latents = inputs(kind, network.params)
    return network(x, t, *prior_latents, text)


@pytest.mark.parametrize("file", FILES)
def test_each_layout_of_a_model_equals_the_core(inside: Inside, networks: dict[str, nn.Module], file: str) -> None:
    torch.testing.assert_close(inside[0][file], expected(networks, FILES[file]), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", ["prior_diffusers.safetensors", "decoder_diffusers.bin"])
def test_weights_are_stored_in_the_chosen_dtype(
    inside: Inside, networks: dict[str, nn.Module], file: str, dtype: str
) -> None:
    tensors, facts = inside
    cast = "None" if dtype == "fp32" else "torch.float32"  # the default on a CPU
    assert facts["dtypes"][f"{file} {dtype}"] == [str(DTYPES[dtype]), cast]
    same = expected(networks, FILES[file], dtype)
    torch.testing.assert_close(tensors[f"{file} {dtype}"], same, **TOLERANCE)
    torch.testing.assert_close(tensors[f"{file} {dtype} saved"], same, **TOLERANCE)


def test_text_encoders_equal_the_core(inside: Inside, models: Path) -> None:
    for file in TOWERS:
        tower = load_text_encoder(models / "text_encoders" / file, which="decoder" if "bundle" in file else "prior")
        with torch.inference_mode():
            states = tower(*tokenize(PROMPTS))
        for i in range(len(PROMPTS)):
            torch.testing.assert_close(inside[0][f"{file} {i}"][0], states[i], rtol=0, atol=1e-5)


def test_text_encoders_have_the_names_of_lora_and_embedding_files(inside: Inside) -> None:
    assert inside[1]["towers"] == dict(zip(TOWERS, "ggh", strict=True)) | BY_WIDTH


def test_stage_a_and_image_encoder_equal_the_core(inside: Inside, networks: dict[str, nn.Module], models: Path) -> None:
    with torch.inference_mode():
        picture = networks["vqgan"].decode(seeded(*LATENTS)).clamp(0, 1).movedim(1, -1)
        features = networks["image_encoder"](semantic_view(seeded(*PICTURE).sigmoid().movedim(-1, 1)))
    for file in VAES:
        torch.testing.assert_close(inside[0][file], picture, **TOLERANCE)
    assert picture.std() > 0.05
    torch.testing.assert_close(inside[0][ENCODER], features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mistake", MISTAKES, ids=" ".join)
def test_a_wrong_file_is_explained_in_one_line(inside: Inside, mistake: tuple[str, str]) -> None:
    check_error(inside[1]["mistakes"].get(" ".join(mistake), ""), *MISTAKES[mistake])


def test_no_code_in_a_file_runs(inside: Inside, models: Path) -> None:
    assert "model payload.pt" in inside[1]["mistakes"]
    assert not (models / "diffusion_models" / MARKER).exists()


@pytest.mark.parametrize("file", DISTILLED)
def test_a_distilled_file_names_the_widgets_to_set(inside: Inside, file: str) -> None:
    text = "\n".join(inside[1]["distilled"][file])
    assert all(fact in text for fact in DISTILLED[file]) and len(inside[1]["distilled"][file]) == bool(DISTILLED[file])
    assert "Decoder" in text or "prior" not in file or "decoder" not in text


def test_comfyuis_folder_table_is_unchanged(inside: Inside, models: Path) -> None:
    path = models / "diffusion_models" / "prior_original.pt"
    status = path.stat()
    assert inside[1]["table unchanged"]
    assert inside[1]["fingerprint"] == [[str(path), status.st_mtime_ns, status.st_size], None]


def test_loading_holds_one_copy_of_the_weights(inside: Inside) -> None:
    peak, size = inside[1]["peak"]
    assert size > 180 * 2**20
    assert 0.8 * size < peak < 1.1 * size


def test_comfyui_can_copy_a_loaded_model(inside: Inside, networks: dict[str, nn.Module]) -> None:
    tensors, facts = inside
    if "copied" not in facts:
        pytest.skip("this ComfyUI makes no such copies")
    assert facts["copied"]
    torch.testing.assert_close(tensors["prior_original.pt copied"], expected(networks, "prior"), **TOLERANCE)


def test_single_loaders_give_the_bundles_image(
    networks: dict[str, nn.Module], graph: dict[str, Any], generate: Generate
) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    find(graph, "WuerstchenBundleLoader")["bundle"] = WHOLE
    [bundled] = generate(graph).pictures
    [bundle] = [key for key, node in graph.items() if node["class_type"] == "WuerstchenBundleLoader"]
    del graph[bundle]
    single = [
        ("WuerstchenModelLoader", {"model_name": "prior_original.pt", "weight_dtype": "default"}),
        ("WuerstchenModelLoader", {"model_name": "decoder_original.pt", "weight_dtype": "default"}),
        ("WuerstchenCLIPLoader", {"clip_name": "prior_tower.safetensors"}),
        ("WuerstchenCLIPLoader", {"clip_name": "decoder_tower.bin"}),
        ("WuerstchenVAELoader", {"vae_name": "stage_a_original.pt"}),
    ]
    graph |= {f"load {i}": {"class_type": kind, "inputs": inputs} for i, (kind, inputs) in enumerate(single)}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == bundle:
                node["inputs"][name] = [f"load {value[1]}", 0]
    [picture] = generate(graph).pictures
    pixels = np.asarray(picture)
    assert np.array_equal(pixels, np.asarray(bundled)) and pixels.std() > 5


def test_new_files_are_offered_at_once_and_missing_files_named(
    server: Server, networks: dict[str, nn.Module], models: Path
) -> None:
    """Pressing R on the canvas reads the nodes' choices again."""
    new = models / "diffusion_models" / "sub" / "new.safetensors"

    def choices() -> list[str]:
        info = server.get("/object_info/WuerstchenModelLoader")["WuerstchenModelLoader"]
        kind, options = info["input"]["required"]["model_name"]
        return kind if isinstance(kind, list) else options["options"]

    name = str(Path("sub") / new.name)
    assert name not in choices()
    new.parent.mkdir()
    try:
        save_file(networks["prior"].state_dict(), new)
        assert name in choices()
    finally:
        new.unlink(missing_ok=True)
        new.parent.rmdir()
    assert name not in choices()
    prompt = {
        "1": {"class_type": "WuerstchenModelLoader", "inputs": {"model_name": name, "weight_dtype": "default"}},
        "2": {"class_type": "WuerstchenScheduler", "inputs": {"model": ["1", 0], "schedule": "linear", "steps": 2}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    outcome = server.run(prompt)
    # Newer ComfyUI versions reject it before the run, older ones leave it to the node.
    assert outcome.status in ("invalid", "execution_error") and name in outcome.error


def test_a_saved_checkpoint_is_loaded_whole(inside: Inside) -> None:
    """CheckpointSave writes a MODEL, its CLIP and a VAE into one file; the loaders offer its parts."""
    tensors, facts = inside
    name = "whole_00001_.safetensors"
    assert facts["offered"] == [[f"prior of {name}"], [f"text tower (prior) of {name}"], [f"Stage A of {name}"]]
    for saved, source in (
        ("checkpoint model", "prior_diffusers.safetensors"),
        ("checkpoint clip", "prior_tower.safetensors 0"),
        ("checkpoint vae", "stage_a_original.pt"),
    ):
        torch.testing.assert_close(tensors[saved], tensors[source], **TOLERANCE)
    assert name in facts["whole"] and "one by one" in facts["whole"]
