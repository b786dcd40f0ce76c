"""`convert`: any layout into a bundle or single files, exact where the dtype is kept, and whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import clip_of_transformers, original
from networks import NETWORKS, PRIOR
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import METADATA
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline, cli
from wuerstchen_core.checkpoints import PARTS_OF, demo_path, describe, read_metadata, read_part, write
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.precision import FP8, is_large
from wuerstchen_core.checkpoints.read import open_source
from wuerstchen_core.models.prior import V1, Prior, PriorParams

ROOT = Path(__file__).parent.parent
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
        assert read_part(file, name).params == read_part(bundle, name).params  # sizes that no tensor shows, too
        assert_equal(read_part(file, name).state_dict, read_part(bundle, name).state_dict)
        assert read_metadata(file)["vocabulary"] == METADATA["vocabulary"]


def test_a_folder_of_single_files_is_a_model(bundle: Path, tmp_path: Path) -> None:
    convert([bundle], tmp_path)
    description = describe(tmp_path)
    assert (description.kind, description.version, description.missing) == ("folder of single files", "v2", ())
    assert description.vocabulary == len(METADATA["vocabulary"]["words"])
    one, other = (WuerstchenPipeline.load(source, device="cpu") for source in (bundle, tmp_path))
    assert one.generate("a red apple")[0].tobytes() == other.generate("a red apple")[0].tobytes()


def retell(file: Path, **said: Any) -> None:
    """Let a file's metadata say something else; None takes it away."""
    metadata = {key: value for key, value in (read_metadata(file) | said).items() if value is not None}
    tensors = {key: x.clone() for key, x in load_file(file).items()}
    save_file(tensors, file, metadata={"wuerstchen": json.dumps(metadata)})


@pytest.mark.parametrize("given", ["folder", "files"])
def test_single_files_say_together_what_the_model_is(bundle: Path, tmp_path: Path, given: str) -> None:
    files = convert([bundle], tmp_path)
    prior, decoder, vqgan, *_ = files
    retell(prior, vocabulary=None, sampling=None)
    retell(decoder, sampling={"decoder_steps": 7}, licence="CC0")
    retell(vqgan, licence=None, sampling={"decoder_steps": 9})

    def said() -> dict[str, Any]:
        source = tmp_path if given == "folder" else convert(files, tmp_path / "made" / "x.safetensors", force=True)[0]
        return open_source(source).metadata

    parts = {file.stem: read_metadata(file)["parts"][file.stem] for file in files}
    told = {"sampling": {"decoder_steps": 7}, "licence": "MIT / CC0", "vocabulary": METADATA["vocabulary"]}
    assert said() == {"format": 1, "version": "v2", "parts": parts, **told}
    retell(decoder, version="v1")
    with pytest.raises(ValueError, match=r"prior.safetensors is of v2 and .*decoder.safetensors of v1: give those of"):
        said()


def test_single_files_have_the_bare_keys_that_other_programs_know(bundle: Path, tmp_path: Path) -> None:
    convert([bundle], tmp_path)
    assert "vquantizer.codebook.weight" in load_file(tmp_path / "vqgan.safetensors")
    assert "transformer.resblocks.0.attn.in_proj_weight" in load_file(tmp_path / "text_encoder.safetensors")


def test_original_files_become_a_model_that_paints_the_same(bundle: Path, tmp_path: Path) -> None:
    parts = states(bundle)
    torch.save({"ema_state_dict": original(parts["prior"])}, tmp_path / "c.pt")
    torch.save({"state_dict": original(parts["decoder"]), "iter": 5}, tmp_path / "b.pt")
    save_file(parts["vqgan"], tmp_path / "a.safetensors")
    tower = next(file for file in convert([bundle], tmp_path / "single") if file.stem == "text_encoder")
    files = [tmp_path / "b.pt", tower, tmp_path / "c.pt", tmp_path / "a.safetensors"]
    [made] = convert(files, tmp_path / "model.safetensors")
    assert describe(made).missing == ("image_encoder",)
    one, other = (
        WuerstchenPipeline.load(file, device="cpu").generate("a red apple", seed=3) for file in (bundle, made)
    )
    assert one[0].tobytes() == other[0].tobytes()


def towers(width: int) -> dict[str, Tensor]:
    from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams

    return TextEncoder(TextEncoderParams(width=width, heads=width // 64, layers=1, vocab_size=9)).state_dict()


def test_towers_go_to_the_stage_that_reads_their_width(tmp_path: Path) -> None:
    save_file(Prior(replace(PRIOR, c_cond=128)).state_dict(), tmp_path / "prior.safetensors")
    for width in (64, 128, 192):
        save_file(towers(width), tmp_path / f"{width}.safetensors")
    given = [tmp_path / "64.safetensors", tmp_path / "prior.safetensors", tmp_path / "128.safetensors"]
    with pytest.raises(ValueError, match="64 wide that no stage given here is left to read: leave it out"):
        convert([given[1], tmp_path / "128.safetensors", tmp_path / "64.safetensors"], tmp_path / "x.safetensors")
    save_file(NETWORKS["decoder"].build().state_dict(), tmp_path / "decoder.safetensors")
    [made] = convert(given[1:], tmp_path / "prior_and_tower.safetensors")
    assert read_part(made, "prior_text_encoder").params.width == 128
    with pytest.raises(ValueError, match=r"both .*prior.safetensors and .*made.safetensors hold a prior: give one"):
        made = made.rename(tmp_path / "made.safetensors")
        convert([given[1], made], tmp_path / "x.safetensors")


def test_parts_of_two_releases_are_not_mixed(tmp_path: Path) -> None:
    for name in ("token_decoder", "decoder"):
        save_file(NETWORKS[name].build().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="token_decoder is of v1 and decoder of v2: give those of one release"):
        convert([tmp_path / "token_decoder.safetensors", tmp_path / "decoder.safetensors"], tmp_path / "x")


@pytest.mark.parametrize(
    ("beside", "version", "scale"), [("token_decoder", "auto", 1), (None, "v1", 1), (None, "v2", 42)]
)
def test_the_release_of_an_open_prior_is_kept(tmp_path: Path, beside: str | None, version: str, scale: float) -> None:
    save_file(Prior(PriorParams(c=64, c_cond=1024, depth=1, nhead=1)).state_dict(), tmp_path / "prior.safetensors")
    sources = [tmp_path / "prior.safetensors"]
    if beside:
        save_file(NETWORKS[beside].build().state_dict(), tmp_path / "other.safetensors")
        sources.append(tmp_path / "other.safetensors")
    [made] = convert(sources, tmp_path / "made.safetensors", version=version)
    assert read_part(made, "prior").params.feature_scale == scale
    assert read_metadata(made)["version"] == ("v1" if scale == V1["feature_scale"] else "v2")


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("payload", "Python objects besides weights and is not opened"),
        ("cut", "is cut short or damaged"),
        ("cascade", "it holds a Stable Cascade model, whose latents are not Würstchen's"),
        ("sd", "it holds a Stable Diffusion model"),
        ("text", "holds no weights"),
        ("empty folder", "is no diffusers folder"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_what_is_no_part_of_a_model_is_named_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str, command: str
) -> None:
    file = tmp_path / "given.safetensors"
    if kind == "payload":
        torch.save({"state_dict": {"x": torch.zeros(1)}, "extra": Payload(tmp_path / "made")}, file)
    elif kind == "cut":
        file.write_bytes(bundle.read_bytes()[:-1000])
    elif kind == "text":
        file.write_text("<!doctype html>")
    elif kind == "empty folder":
        file.mkdir()
    else:
        key = {"cascade": "clip_txt_mapper.weight", "sd": "model.diffusion_model.input_blocks.0.0.weight"}[kind]
        save_file({key: torch.zeros(1)}, file)
    given = [str(bundle), str(file), str(tmp_path / "x.safetensors")] if command == "convert" else [str(file)]
    assert cli.main([command, *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and len(err) < 300 + len(str(file))
    assert list(tmp_path.iterdir()) == [file]  # no target, and nothing that the pickle would have made


# dtypes


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_one_rounding(bundle: Path, tmp_path: Path, dtype: str) -> None:
    [made] = convert([bundle], tmp_path / "half.safetensors", dtype=dtype)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, state in states(bundle).items():
        rounded = {key: x.to(half) if x.is_floating_point() else x for key, x in state.items()}
        assert_equal(read_part(made, name).state_dict, rounded)
    assert {part.dtype for part in describe(made).parts} == {dtype}


def test_fp8_is_scaled_and_only_for_large_tensors(bundle: Path, tmp_path: Path) -> None:
    [made] = convert([bundle], tmp_path / "small.safetensors", dtype="fp8")
    stored = load_file(made)
    for name, state in states(bundle).items():
        found = read_part(made, name).state_dict
        prefix = "text_encoder" if "text" in name else name
        assert found.keys() == state.keys()
        for key, x in state.items():
            scale = stored.get(f"{prefix}.{key.removesuffix('weight')}scale_weight")
            assert (stored[f"{prefix}.{key}"].dtype == FP8) == (scale is not None) == is_large(key, x), key
            if scale is None:
                assert found[key].equal(x.bfloat16() if x.is_floating_point() else x), key
                continue
            assert scale.dtype == torch.float32 and scale.log2().frac() == 0
            assert 232 < x.abs().max() / scale <= 464, key
            # Half of the last of e4m3's three binary places, or of its smallest number (2^-9).
            error = (found[key].float() - x).abs()
            assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all(), key
    assert not any(key.endswith("codebook.scale_weight") for key in stored)
    assert {part.dtype for part in describe(made).parts} == {"bf16 and fp8 (scaled)"}
    pipe = WuerstchenPipeline.load(made, device="cpu")
    assert pipe.generate("a red apple", seed=1)[0].size == (128, 64)


def test_fp8_is_kept_and_exact_on_the_way_back(bundle: Path, tmp_path: Path) -> None:
    [small] = convert([bundle], tmp_path / "small.safetensors", dtype="fp8")
    files = convert([small], tmp_path / "single")
    [again] = convert(files, tmp_path / "again.safetensors")
    assert again.read_bytes() == small.read_bytes()
    for file in files:
        [part] = describe(file).parts
        assert part.dtype == "bf16 and fp8 (scaled)"
    [wide] = convert([small], tmp_path / "wide.safetensors", dtype="bf16")
    for name in V2:
        assert_equal(read_part(wide, name).state_dict, read_part(small, name).state_dict)


def test_the_shipped_model_keeps_its_numbers(tmp_path: Path) -> None:
    """Whose embeddings are in fp8 without a scale."""
    [made] = convert([demo_path()], tmp_path / "copy.safetensors")
    for name in V2:
        assert_equal(read_part(made, name).state_dict, read_part(demo_path(), name).state_dict)
    assert made.stat().st_size < demo_path().stat().st_size + 1000


def test_dtype_by_part(bundle: Path, tmp_path: Path) -> None:
    [made] = convert([bundle], tmp_path / "x.safetensors", dtype="bf16,vqgan=fp32, text_encoder=fp16")
    found = {part.name: part.dtype for part in describe(made).parts}
    assert found == {
        "prior": "bf16", "decoder": "bf16", "vqgan": "fp32", "image_encoder": "bf16", "text_encoder": "fp16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("int4", "dtype 'int4' is unknown: choose keep, fp32, fp16, bf16, fp8, as in bf16,vqgan=fp32"),
        ("unet=bf16", "'unet' is no part of a model: the parts are prior, "),
        ("", "dtype '' is unknown"),
    ],
)
def test_unknown_dtypes_and_parts_are_named(bundle: Path, tmp_path: Path, dtype: str, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        convert([bundle], tmp_path / "x.safetensors", dtype=dtype)
    assert said in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 7e4), ("fp8", float("nan"))])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    state = NETWORKS["prior"].perturbed().state_dict()
    state["blocks.0.channelwise.0.weight"][3, 3] = value
    save_file(state, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.channelwise.0.weight holds (7e\+04|nan)"):
        convert([tmp_path / "prior.safetensors"], tmp_path / "x.safetensors", dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["prior.safetensors"]


# the disk


def test_nothing_is_written_over_without_force(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.safetensors"
    target.write_bytes(b"mine")
    (tmp_path / "vqgan.safetensors").write_bytes(b"mine")
    for goal in (target, tmp_path):
        with pytest.raises(ValueError, match="exists already: choose another name, or write over it with --force"):
            convert([bundle], goal)
    assert target.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2
    convert([bundle], target, force=True)
    assert target.read_bytes() == bundle.read_bytes()
    convert([target], target, force=True, dtype="bf16")  # onto the file that is being read
    assert describe(target).parts[0].dtype == "bf16"


def test_targets_that_are_no_target(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder: give another name"):
        convert([bundle], tmp_path / "folder.safetensors")
    with pytest.raises(ValueError, match="let it end in .safetensors, or in nothing"):
        convert([bundle], tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="nothing was given"):
        convert([], tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("replace", PermissionError(errno.EACCES, "locked"), "it is read-only or in use: close what uses it"),
        ("fsync", OSError(errno.EIO, "Input/output error"), "input/output error: choose another name or disk"),
        ("fsync", OSError(errno.EFAULT, "Bad address"), "what goes into it can no longer be read: look whether"),
    ],
)
def test_what_the_system_refuses_is_one_sentence_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: OSError, said: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise error

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, place, refuse)
    with pytest.raises(OSError, match="x.safetensors was not written, ") as refusal:
        convert([bundle], tmp_path / "x.safetensors", force=True)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk looks like, without one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("reserves", [True, False])
def test_no_room_on_the_disk(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool) -> None:
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with largest_file(100_000), pytest.raises(OSError, match="there is no room for its 0.0. GB: free some"):
        convert([bundle], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [(-5, os.SEEK_END), (9, os.SEEK_SET)], ids=["a weight", "the header"])
def test_a_disk_that_keeps_other_bytes_is_found_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]
) -> None:
    def spoil(file: Any) -> None:
        file.seek(*place)
        file.write(b"?")
        file.flush()

    monkeypatch.setattr(write, "_forget", spoil)
    with pytest.raises(OSError, match="it reads back other than it was written"):
        convert([bundle], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seen", ["between two tensors", "as a failure to write"])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_a_source_that_is_cut_short_meanwhile_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str, dtype: str
) -> None:
    source = tmp_path / "given.safetensors"
    source.write_bytes(bundle.read_bytes())

    def cut(*arguments: Any) -> None:
        os.truncate(source, 1000)
        if seen == "as a failure to write":
            raise OSError(errno.EFAULT, "Bad address")

    if seen == "as a failure to write":
        monkeypatch.setattr(write, "_write_one", cut)
    with pytest.raises(ValueError, match="given.safetensors was cut short while it was read: fetch it again"):
        convert([source], tmp_path / "x.safetensors", dtype=dtype, progress=None if "write" in seen else cut)
    assert list(tmp_path.iterdir()) == [source]


def test_stopped_half_way_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    def stop(path: Path, done: int, total: int) -> None:
        assert path == tmp_path / "x.safetensors" and any(tmp_path.iterdir())
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([bundle], tmp_path / "x.safetensors", progress=stop)
    assert not list(tmp_path.iterdir())


MEASURE = """
import sys
from pathlib import Path
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints import save_bundle
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
small, source, target, dtype = sys.argv[1:]
convert([small], Path(target).with_name("warm.safetensors"), dtype=dtype)  # imports, allocators, threads
before, peak = held(), 0.0
def watch(path, done, total):
    global peak
    peak = max(peak, held() - before)
convert([source], target, dtype=dtype, progress=watch)
print(peak)
"""


tells_memory = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell how much memory a process holds"
)


@tells_memory
@pytest.mark.parametrize(("dtype", "ending"), [("keep", "safetensors"), ("bf16", "pt"), ("fp8", "safetensors")])
def test_memory(bundle: Path, tmp_path: Path, dtype: str, ending: str) -> None:
    """A prior of 136 MB in fp32 is converted within a tenth of the file that is written."""
    state = Prior(PriorParams(c=512, nhead=8, depth=10)).state_dict()
    source = tmp_path / f"prior.{ending}"
    if ending == "pt":
        torch.save({"ema_state_dict": original(state)}, source)
    else:
        save_file(state, source)
    target = tmp_path / "out.safetensors"
    assert source.stat().st_size / 2**20 > 130
    assert_small(bundle, source, target, dtype)


@pytest.fixture(scope="module")
def towers_of_others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower of 151 MB in transformers' layout, and in fp8: whose tensors are made out of those in the files."""
    folder = tmp_path_factory.mktemp("towers")
    save_file(clip_of_transformers(256, 48, vocab_size=2000), folder / "fp32.safetensors")
    convert([folder / "fp32.safetensors"], folder / "fp8.safetensors", dtype="fp8")
    return folder


@tells_memory
@pytest.mark.parametrize(("given", "dtype"), [("fp32", "fp8"), ("fp8", "bf16"), ("fp8", "keep")])
def test_memory_of_what_is_joined_or_widened(
    bundle: Path, towers_of_others: Path, tmp_path: Path, given: str, dtype: str
) -> None:
    assert_small(bundle, towers_of_others / f"{given}.safetensors", tmp_path / "out.safetensors", dtype)


def assert_small(bundle: Path, source: Path, target: Path, dtype: str) -> None:
    """Convert in a process of its own, which may hold a third of what it writes."""
    command = [sys.executable, "-c", MEASURE, str(bundle), str(source), str(target), dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    written = target.stat().st_size / 2**20
    assert float(result.stdout) < 0.35 * written, (result.stdout, written)


# the command


def test_command(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "half.safetensors"
    assert cli.main(["convert", str(bundle), str(target), "--dtype", "bf16,vqgan=fp32"]) == 0
    assert capsys.readouterr() == (f"{target}\n", "")
    assert cli.main(["convert", str(bundle), str(target)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"{target} exists already: choose another name, or write over it with --force\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["convert", str(bundle), str(target), "--force"]) == 0
    err = capsys.readouterr().err
    assert "half.safetensors [###" in err and err.endswith("\x1b[K")


def test_files_are_those_of_safetensors(bundle: Path, tmp_path: Path) -> None:
    """The same bytes that its own writer makes of the same tensors and metadata."""
    with safe_open(bundle, "pt") as file:
        save_file(load_file(bundle), tmp_path / "theirs.safetensors", metadata=file.metadata())
    theirs, ours = (tmp_path / "theirs.safetensors").read_bytes(), bundle.read_bytes()
    assert len(theirs) == len(ours) and sorted(theirs[:8]) == sorted(ours[:8])
    assert theirs[-1_000_000:] == ours[-1_000_000:]
