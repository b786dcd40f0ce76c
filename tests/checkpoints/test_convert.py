"""Tests `convert`: any layout becomes a bundle or single files, exactly if the dtype is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import Payload, original
from helpers.networks import NETWORKS, PRIOR
from helpers.tiny_model import METADATA
from safetensors.torch import load_file, save_file
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, demo_path, describe, read_metadata, read_part
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.quant import FP8, is_matrix
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.checkpoints.writer import write_tensors
from wuerstchen_core.cli.main import main
from wuerstchen_core.models.prior import V1, Prior, PriorParams

V2 = PARTS_OF["v2"]


def states(source: Path) -> dict[str, dict[str, Tensor]]:
    return {name: read_part(source, name).state_dict for name in V2}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, x in one.items():
        assert x.dtype == other[key].dtype and x.equal(other[key]), key


# layouts


def test_round_trip_through_single_files_is_exact(bundle: Path, tmp_path: Path) -> None:
    files = convert([bundle], tmp_path / "single")
    assert [file.stem for file in files] == ["prior", "decoder", "vqgan", "image_encoder", "text_encoder"]
    assert convert(files, tmp_path / "again.safetensors") == [tmp_path / "again.safetensors"]
    assert (tmp_path / "again.safetensors").read_bytes() == bundle.read_bytes()
    for name in V2:
        file = tmp_path / "single" / f"{'text_encoder' if 'text' in name else name}.safetensors"
        assert read_part(file, name).params == read_part(bundle, name).params  # including params that no tensor shows
        assert_equal(read_part(file, name).state_dict, read_part(bundle, name).state_dict)
        assert read_metadata(file)["vocabulary"] == METADATA["vocabulary"]


def test_a_folder_of_single_files_is_a_model(bundle: Path, tmp_path: Path) -> None:
    convert([bundle], tmp_path)
    description = describe(tmp_path)
    assert (description.kind, description.version, description.missing) == ("folder of single files", "v2", ())
    assert description.vocabulary == len(METADATA["vocabulary"]["words"])
    one, other = (WuerstchenPipeline.load(source, device="cpu") for source in (bundle, tmp_path))
    assert one.generate("a red apple")[0].tobytes() == other.generate("a red apple")[0].tobytes()


def change_metadata(file: Path, **changes: Any) -> None:
    """Changes values in a file's metadata; None removes one."""
    metadata = {key: value for key, value in (read_metadata(file) | changes).items() if value is not None}
    tensors = {key: x.clone() for key, x in load_file(file).items()}
    save_file(tensors, file, metadata={"wuerstchen": json.dumps(metadata)})


@pytest.mark.parametrize("sources", ["folder", "files"])
def test_metadata_of_single_files_are_merged(bundle: Path, tmp_path: Path, sources: str) -> None:
    files = convert([bundle], tmp_path)
    prior, decoder, vqgan, *_ = files
    change_metadata(prior, vocabulary=None, sampling=None)
    change_metadata(decoder, sampling={"decoder_steps": 7}, licence="CC0")
    change_metadata(vqgan, licence=None, sampling={"decoder_steps": 9})

    def merged() -> dict[str, Any]:
        source = (
            tmp_path if sources == "folder" else convert(files, tmp_path / "output" / "x.safetensors", force=True)[0]
        )
        return open_source(source).metadata

    parts = {file.stem: read_metadata(file)["parts"][file.stem] for file in files}
    expected = {"sampling": {"decoder_steps": 7}, "licence": "MIT / CC0", "vocabulary": METADATA["vocabulary"]}
    assert merged() == {"format": 1, "version": "v2", "parts": parts, **expected}
    change_metadata(decoder, version="v1")
    with pytest.raises(ValueError, match=r"prior\.safetensors.*v2.*decoder\.safetensors.*v1"):
        merged()


def test_single_files_have_bare_keys(bundle: Path, tmp_path: Path) -> None:
    convert([bundle], tmp_path)
    assert "vquantizer.codebook.weight" in load_file(tmp_path / "vqgan.safetensors")
    assert "transformer.resblocks.0.attn.in_proj_weight" in load_file(tmp_path / "text_encoder.safetensors")


def test_original_files_become_a_model_with_equal_images(bundle: Path, tmp_path: Path) -> None:
    parts = states(bundle)
    torch.save({"ema_state_dict": original(parts["prior"])}, tmp_path / "c.pt")
    torch.save({"state_dict": original(parts["decoder"]), "iter": 5}, tmp_path / "b.pt")
    save_file(parts["vqgan"], tmp_path / "a.safetensors")
    tower = next(file for file in convert([bundle], tmp_path / "single") if file.stem == "text_encoder")
    files = [tmp_path / "b.pt", tower, tmp_path / "c.pt", tmp_path / "a.safetensors"]
    [output] = convert(files, tmp_path / "model.safetensors")
    assert describe(output).missing == ("image_encoder",)
    one, other = (
        WuerstchenPipeline.load(file, device="cpu").generate("a red apple", seed=3) for file in (bundle, output)
    )
    assert one[0].tobytes() == other[0].tobytes()


def tower_state(width: int) -> dict[str, Tensor]:
    from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams

    return TextEncoder(TextEncoderParams(width=width, heads=width // 64, layers=1, vocab_size=9)).state_dict()


def test_text_towers_are_assigned_by_width(tmp_path: Path) -> None:
    save_file(Prior(replace(PRIOR, c_cond=128)).state_dict(), tmp_path / "prior.safetensors")
    for width in (64, 128, 192):
        save_file(tower_state(width), tmp_path / f"{width}.safetensors")
    sources = [tmp_path / "64.safetensors", tmp_path / "prior.safetensors", tmp_path / "128.safetensors"]
    with pytest.raises(ValueError, match=r"64\.safetensors.*64"):
        convert([sources[1], tmp_path / "128.safetensors", tmp_path / "64.safetensors"], tmp_path / "x.safetensors")
    save_file(NETWORKS["decoder"].build().state_dict(), tmp_path / "decoder.safetensors")
    [output] = convert(sources[1:], tmp_path / "prior_and_tower.safetensors")
    assert read_part(output, "prior_text_encoder").params.width == 128
    with pytest.raises(ValueError, match=r"prior\.safetensors.*output\.safetensors"):
        output = output.rename(tmp_path / "output.safetensors")
        convert([sources[1], output], tmp_path / "x.safetensors")


def test_parts_of_two_releases_are_rejected(tmp_path: Path) -> None:
    for name in ("token_decoder", "decoder"):
        save_file(NETWORKS[name].build().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="token_decoder.*v1.*decoder.*v2"):
        convert([tmp_path / "token_decoder.safetensors", tmp_path / "decoder.safetensors"], tmp_path / "x")


@pytest.mark.parametrize(
    ("stage_b", "version", "scale"), [("token_decoder", "auto", 1), (None, "v1", 1), (None, "v2", 42)]
)
def test_the_release_of_an_ambiguous_prior_is_stored(
    tmp_path: Path, stage_b: str | None, version: str, scale: float
) -> None:
    save_file(Prior(PriorParams(c=64, c_cond=1024, depth=1, nhead=1)).state_dict(), tmp_path / "prior.safetensors")
    sources = [tmp_path / "prior.safetensors"]
    if stage_b:
        save_file(NETWORKS[stage_b].build().state_dict(), tmp_path / "other.safetensors")
        sources.append(tmp_path / "other.safetensors")
    [output] = convert(sources, tmp_path / "output.safetensors", version=version)
    assert read_part(output, "prior").params.feature_scale == scale
    assert read_metadata(output)["version"] == ("v1" if scale == V1["feature_scale"] else "v2")


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        ("payload", "Python objects"),
        ("cut", "damaged"),
        ("cascade", "Stable Cascade"),
        ("sd", "Stable Diffusion"),
        ("text", "HTML"),
        ("empty folder", "diffusers folder"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_files_that_are_no_part_of_a_model_are_rejected_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, fact: str, command: str
) -> None:
    file = tmp_path / "input.safetensors"
    if kind == "payload":
        torch.save({"state_dict": {"x": torch.zeros(1)}, "extra": Payload(tmp_path / "output")}, file)
    elif kind == "cut":
        file.write_bytes(bundle.read_bytes()[:-1000])
    elif kind == "text":
        file.write_text("<!doctype html>")
    elif kind == "empty folder":
        file.mkdir()
    else:
        key = {"cascade": "clip_txt_mapper.weight", "sd": "model.diffusion_model.input_blocks.0.0.weight"}[kind]
        save_file({key: torch.zeros(1)}, file)
    sources = [str(bundle), str(file), str(tmp_path / "x.safetensors")] if command == "convert" else [str(file)]
    assert main([command, *sources]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and fact in err and len(err) < 300 + len(str(file))
    assert list(tmp_path.iterdir()) == [file]  # neither a target nor the folder that the pickle would create


# dtypes


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_one_rounding(bundle: Path, tmp_path: Path, dtype: str) -> None:
    [output] = convert([bundle], tmp_path / "half.safetensors", dtype=dtype)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, state in states(bundle).items():
        rounded = {key: x.to(half) if x.is_floating_point() else x for key, x in state.items()}
        assert_equal(read_part(output, name).state_dict, rounded)
    assert {part.dtype for part in describe(output).parts} == {dtype}


def test_fp8_is_scaled_and_only_for_large_matrices(bundle: Path, tmp_path: Path) -> None:
    [output] = convert([bundle], tmp_path / "small.safetensors", dtype="fp8")
    stored = load_file(output)
    for name, state in states(bundle).items():
        found = read_part(output, name).state_dict
        prefix = "text_encoder" if "text" in name else name
        assert found.keys() == state.keys()
        for key, x in state.items():
            stem = f"{prefix}.{key.removesuffix('weight')}"
            scale = stored.get(f"{stem}weight_scale")
            assert (stored[f"{prefix}.{key}"].dtype == FP8) == (scale is not None) == is_matrix(key, x), key
            if scale is None:
                assert found[key].equal(x.bfloat16() if x.is_floating_point() else x), key
                continue
            assert json.loads(bytes(stored[f"{stem}comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
            assert scale.dtype == torch.float32 and scale.shape == () and scale.log2().frac() == 0
            assert 232 < x.abs().max() / scale <= 464, key
            # Half of e4m3's last mantissa bit, or of its smallest number (2^-9).
            error = (found[key].float() - x).abs()
            assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all(), key
    assert not any("codebook.weight_scale" in key or "scaled_fp8" in key for key in stored)
    kinds = {part.name: part.dtype for part in describe(output).parts}
    assert kinds.pop("image_encoder") == "bf16" and {*kinds.values()} == {"bf16 and fp8 (scaled)"}
    pipe = WuerstchenPipeline.load(output, device="cpu")
    assert pipe.generate("a red apple", seed=1)[0].size == (128, 64)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_bits_are_kept_and_restored_alike(bundle: Path, tmp_path: Path, dtype: str) -> None:
    [small] = convert([bundle], tmp_path / "small.safetensors", dtype=dtype)
    files = convert([small], tmp_path / "single")
    [again] = convert(files, tmp_path / "again.safetensors")
    [twice] = convert(files, tmp_path / "twice.safetensors", dtype=dtype)
    assert again.read_bytes() == small.read_bytes() == twice.read_bytes()
    for file in files:
        [part] = describe(file).parts
        assert part.dtype == ("bf16" if part.name == "image_encoder" else f"bf16 and {dtype} (scaled)")
    [wide] = convert([small], tmp_path / "wide.safetensors", dtype="bf16")
    for name in V2:
        assert_equal(read_part(wide, name).state_dict, read_part(small, name).state_dict)


def test_the_shipped_model_keeps_its_weights(tmp_path: Path) -> None:
    """The bundle stores only the trained rows of its token embedding; the copy has all of them."""
    [output] = convert([demo_path()], tmp_path / "copy.safetensors")
    for name in V2:
        assert_equal(read_part(output, name).state_dict, read_part(demo_path(), name).state_dict)
    table = read_part(demo_path(), "prior_text_encoder").state_dict["token_embedding.weight"]
    assert output.stat().st_size < demo_path().stat().st_size + table.numel() * 2 + 1000  # in bf16


def test_dtype_by_part(bundle: Path, tmp_path: Path) -> None:
    [output] = convert([bundle], tmp_path / "x.safetensors", dtype="bf16,vqgan=fp32, text_encoder=fp16")
    found = {part.name: part.dtype for part in describe(output).parts}
    assert found == {
        "prior": "bf16", "decoder": "bf16", "vqgan": "fp32", "image_encoder": "bf16", "text_encoder": "fp16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "fact"),
    [
        ("int4", "int4"),
        ("unet=bf16", "unet"),
        ("", "dtype ''"),
    ],
)
def test_unknown_dtypes_and_parts_are_named(bundle: Path, tmp_path: Path, dtype: str, fact: str) -> None:
    with pytest.raises(ValueError) as raised:
        convert([bundle], tmp_path / "x.safetensors", dtype=dtype)
    assert fact in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 7e4), ("fp8", float("nan")), ("int8", float("inf"))])
def test_numbers_outside_the_range_are_rejected(tmp_path: Path, dtype: str, value: float) -> None:
    state = NETWORKS["prior"].perturbed().state_dict()
    state["blocks.0.channelwise.0.weight"][3, 3] = value
    save_file(state, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors.*blocks\.0\.channelwise\.0\.weight holds (7e\+04|nan|inf)"):
        convert([tmp_path / "prior.safetensors"], tmp_path / "x.safetensors", dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["prior.safetensors"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_part_that_cannot_be_written_takes_the_others_along(bundle: Path, tmp_path: Path, existing: bool) -> None:
    prior, vqgan = (dict(read_part(bundle, name).state_dict) for name in ("prior", "vqgan"))
    key = next(key for key, x in vqgan.items() if x.is_floating_point())
    vqgan[key] = torch.full_like(vqgan[key], 1e6)
    for name, state in (("prior", prior), ("vqgan", vqgan)):
        save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / f"{name}.safetensors")
    target = tmp_path / "converted"
    if existing:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="65504"):
        convert([tmp_path / "prior.safetensors", tmp_path / "vqgan.safetensors"], target, dtype="fp16")
    assert [path.name for path in target.glob("*")] == ["notes.txt"] * existing
    assert target.exists() == existing


@pytest.mark.parametrize("dtype", ["keep", "int8"])
def test_weights_that_are_not_finite_are_named(bundle: Path, tmp_path: Path, dtype: str) -> None:
    state = load_file(bundle)
    key = next(key for key, x in state.items() if key.startswith("prior.") and x.ndim == 2 and x.numel() > 4096)
    state[key][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors", read_file_metadata(bundle))
    with pytest.raises(ValueError, match=f"{key.removeprefix('prior.')} holds nan, in the prior of"):
        convert([tmp_path / "nan.safetensors"], tmp_path / "out.safetensors", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_tensors_of_any_strides_are_written(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {"one": x[0, ::2][:1], "many": x[:, 1::2], "turned": x.T, "repeated": x[:1].expand(3, 6), "none": x[:0]}
    write_tensors(tmp_path / "it.safetensors", tensors, {})
    assert_equal(load_file(tmp_path / "it.safetensors"), tensors)
