"""`inspect`, `convert` and the loaders agree about every layout, whole or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import comfyui, original, random_state, vqgan_of_diffusers
from helpers.networks import DECODER, PRIOR, TOKEN_DECODER, VQ
from helpers.tiny_model import tiny_parts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import build_part, describe, read_part, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.key_maps import text_to_transformers
from wuerstchen_core.checkpoints.quant import FP8, INT8, quantize
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.cli.main import main
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams
from wuerstchen_core.models.token_decoder import TokenDecoder
from wuerstchen_core.models.vqgan import VQGAN

State = dict[str, Tensor]
Write = Callable[[Path, State], Path]  # writes a state dict into a folder and returns the source


@cache
def model() -> dict[str, nn.Module]:
    return tiny_parts()


@cache
def whole(kind: str) -> State:
    networks = {
        "prior": lambda: Prior(PRIOR),
        "prior of the tower": lambda: Prior(replace(PRIOR, c_cond=64)),
        "decoder": lambda: Decoder(DECODER),
        "token_decoder": lambda: TokenDecoder(TOKEN_DECODER),
        "vqgan": lambda: VQGAN(VQ),
        "text": lambda: TextEncoder(TextEncoderParams(width=64, heads=1, layers=1, vocab_size=9)),
    }
    return random_state(networks[kind]())


def tower() -> State:
    return {f"text_model.{key}": x for key, x in text_to_transformers(whole("text")).items()}


def behind(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: x for key, x in state.items()}


def safetensors(folder: Path, state: State) -> Path:
    save_file({key: x.clone() for key, x in state.items()}, folder / "file.safetensors")
    return folder / "file.safetensors"


def pytorch(*keys: str) -> Write:
    def write(folder: Path, state: State) -> Path:
        content: Any = {"epoch": 3, "state_dict": dict(state), "optimizer_states": [{"state": {0: {"exp_avg": {}}}}]}
        if keys:
            content = {**content, "state_dict": {"old": torch.zeros(1)}}
            for key in reversed(keys):
                state = {key: state}  # type: ignore[dict-item]
            content |= state
        torch.save(content, folder / "file.ckpt")
        return folder / "file.ckpt"

    return write


def diffusers(folder: Path, state: State) -> Path:
    (folder / "model/prior").mkdir(parents=True)
    save_file({key: x.clone() for key, x in state.items()}, folder / "model/prior/diffusion_pytorch_model.safetensors")
    (folder / "model/prior/config.json").write_text(json.dumps({"nhead": PRIOR.nhead}))
    (folder / "model/model_index.json").write_text('{"_class_name": "WuerstchenPriorPipeline"}')
    return folder / "model"


def sharded(folder: Path, state: State) -> Path:
    keys, names = list(state), ("one.safetensors", "two.safetensors")
    places = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key].clone() for key in keys if places[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def checkpoint_save(folder: Path, state: State) -> Path:
    clip = {f"cond_stage_model.clip_g.transformer.{key}": x for key, x in tower().items()}
    stage_a = {f"first_stage_model.{key}": x for key, x in whole("vqgan").items()}
    return safetensors(folder, {**comfyui(state), **clip, **stage_a})


def bundle(dtype: torch.dtype | None, name: str) -> Write:
    def write(folder: Path, state: State) -> Path:
        file = folder / "bundle.safetensors"
        save_bundle(file, model(), {"licence": "MIT"}, dtype)
        stored = {key: x for key, x in load_file(file).items() if not key.startswith(f"{name}.")}

        save_file(
            {**stored, **{f"{name}.{key}": x.clone() for key, x in state.items()}}, file, read_file_metadata(file)
        )
        return file

    return write


@cache
def part_of_bundle(dtype: torch.dtype | None, name: str) -> State:
    entries: dict[str, Any] = {}
    for key, x in model()[name].state_dict().items():
        entries |= quantize(key, x, dtype)
    return {key: x.load() for key, x in entries.items()}


def quantised(state: State) -> State:
    """Returns a state dict with one layer in ComfyUI's int8 format."""
    config = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}).encode()
    return {
        **state,
        "blocks.2.attention.to_q.weight": torch.ones(64, 64, dtype=torch.int8),
        "blocks.2.attention.to_q.weight_scale": torch.ones(64, 1),
        "blocks.2.attention.to_q.comfy_quant": torch.tensor(list(config), dtype=torch.uint8),
    }


@dataclass(frozen=True)
class Layout:
    part: str
    state: Callable[[], State]
    write: Write = safetensors
    parts: int = 1


LAYOUTS = {
    "bare": Layout("prior", lambda: whole("prior")),
    "original v2 prior": Layout("prior", lambda: original(whole("prior")), pytorch("ema_state_dict")),
    "original v2 decoder": Layout("decoder", lambda: original(whole("decoder")), pytorch()),
    "original v1": Layout("token_decoder", lambda: whole("token_decoder"), pytorch()),
    "stage a": Layout("vqgan", lambda: vqgan_of_diffusers(whole("vqgan"))),
    "text of transformers": Layout("decoder_text_encoder", tower),
    "diffusers": Layout("prior", lambda: whole("prior"), diffusers),
    "shards": Layout("prior", lambda: whole("prior"), sharded),
    "ComfyUI": Layout("prior", lambda: comfyui(whole("prior"))),
    "CheckpointSave": Layout("prior", lambda: whole("prior of the tower"), checkpoint_save, 3),
    "prefixes": Layout("prior", lambda: behind("model.module._orig_mod.")(whole("prior")), pytorch("a", "b")),
    "bundle": Layout("vqgan", lambda: part_of_bundle(None, "vqgan"), bundle(None, "vqgan"), 5),
    "image encoder": Layout(
        "image_encoder", lambda: part_of_bundle(None, "image_encoder"), bundle(None, "image_encoder"), 5
    ),
    "fp8 bundle": Layout("decoder", lambda: part_of_bundle(FP8, "decoder"), bundle(FP8, "decoder"), 5),
    "int8 bundle": Layout("decoder", lambda: part_of_bundle(INT8, "decoder"), bundle(INT8, "decoder"), 5),
    "int8": Layout("prior", lambda: quantised(whole("prior"))),
}


def drop(state: State, key: str) -> None:
    del state[key]


def add(state: State, key: str) -> None:
    state[f"{key}_more"] = torch.zeros(3)


def lengthen(state: State, key: str) -> None:
    x = state[key]
    state[key] = torch.zeros(len(x) + 1, *x.shape[1:]).to(x.dtype)


def round_down(state: State, key: str) -> None:
    state[key] = torch.ones(state[key].shape, dtype=torch.int32)


def flatten(state: State, key: str) -> None:
    state[key] = state[key].reshape(-1, 1, 1, 1, 1).contiguous()


def scalar(state: State, key: str) -> None:
    state[key] = state[key].reshape(-1)[0].clone()


def verdicts(source: Path, part: str, output: Path) -> dict[str, bool]:
    """Returns True for what accepts a source. Anything but ValueError fails the test."""

    def accepts(run: Callable[[], Any]) -> bool:
        try:
            return run() is not False
        except ValueError as error:
            assert "\n" not in str(error)
            return False

    return {
        "inspect": accepts(lambda: not describe(source).problems),
        "convert": accepts(lambda: convert([source], output)),
        "load": accepts(lambda: build_part(read_part(source, part))),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_files_are_accepted(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    source = layout.write(tmp_path, layout.state())
    assert verdicts(source, layout.part, tmp_path / "output.safetensors") == dict.fromkeys(
        ("inspect", "convert", "load"), True
    )
    assert len(describe(source).parts) == layout.parts


@pytest.mark.parametrize("damage", [drop, add, lengthen, round_down, flatten, scalar])
@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[State, str], None]
) -> None:
    layout = LAYOUTS[name]
    state = dict(layout.state())
    matrices = [key for key, x in state.items() if x.ndim > 1 and key.endswith("weight") and x.shape[0] > 3]
    key = matrices[-2] if damage in (drop, lengthen, scalar) else matrices[len(matrices) // 2]
    damage(state, key)
    source = layout.write(tmp_path, state)
    assert not any(verdicts(source, layout.part, tmp_path / "output.safetensors").values()), key
    assert not list(tmp_path.glob("*output*"))
    if damage is drop:
        assert main(["inspect", str(source)]) == 2
        out, err = capsys.readouterr()
        assert "complete\n" not in out and err.count("\n") == 1


def test_parts_that_do_not_fit_one_another_are_no_complete_model(tmp_path: Path) -> None:
    parts = model()
    wide = TextEncoder(TextEncoderParams(width=64, heads=1, layers=1))
    save_bundle(tmp_path / "b.safetensors", {**parts, "decoder_text_encoder": wide}, {})
    description = describe(tmp_path / "b.safetensors")
    assert description.missing == () and "decoder text encoder" in description.problems["model"]
    assert description.lines()[-1] != "  complete"


def test_the_other_parts_of_a_damaged_bundle_still_load(tmp_path: Path) -> None:
    layout = LAYOUTS["bundle"]
    state = dict(layout.state())
    drop(state, "out_block.0.bias")
    source = layout.write(tmp_path, state)
    description = describe(source)
    assert list(description.problems) == ["vqgan"] and "out_block.0.bias" in description.problems["vqgan"]
    assert [part.name for part in description.parts] == ["prior", "decoder", "image_encoder", "text_encoder"]
    build_part(read_part(source, "prior"))


@pytest.mark.parametrize(
    "damage",
    [
        {"sampling": {"width": 100, "height": 128}}, {"sampling": {"prior_steps": "many"}},
        {"vocabulary": {"words": 3}}, {"version": "v3"},
        {"parts": {"prior": {"depth": 10**12}}}, {"parts": {"prior": {"c": -1}}},
    ],
)  # fmt: skip
def test_damaged_metadata_are_refused_as_by_the_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any]
) -> None:
    file = tmp_path / "bundle.safetensors"
    save_bundle(file, model(), {})
    content = json.loads(read_file_metadata(file)["wuerstchen"])
    prior = damage.get("parts", {}).get("prior")
    changes = {"parts": {**content["parts"], "prior": {**content["parts"]["prior"], **prior}}} if prior else damage
    save_file(load_file(file), file, {"wuerstchen": json.dumps(content | changes)})
    with pytest.raises(ValueError, match="\\w"):
        WuerstchenPipeline.load(file, device="cpu")
    assert main(["inspect", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "complete\n" not in out and err.count("\n") == 1


@pytest.mark.parametrize("key", ["blocks.{}.depthwise.weight", "down_blocks.{}.0.depthwise.weight"])
def test_large_numbers_in_keys_are_refused_at_once(tmp_path: Path, key: str) -> None:
    state = {**whole("prior" if key.startswith("blocks") else "decoder"), key.format(10**9): torch.zeros(1)}
    with pytest.raises(ValueError, match="999999|1000000000"):
        describe(safetensors(tmp_path, state))
