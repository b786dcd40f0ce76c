"""The command line: files, output, and errors, which are one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import failure, run
from helpers.tiny_model import METADATA, tiny_parts, write_tiny_bundle
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.fingerprint import fingerprint
from wuerstchen_core.cli import save
from wuerstchen_core.inference.metadata import RECORD
from wuerstchen_core.models import tokenizer

PROMPT = "A red apple, on blue!"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# generate


def test_generate(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", PROMPT, "--model", bundle, "--seed", "7", "--device", "cpu", "--negative", "small") == 0
    out, err = capsys.readouterr()
    assert out == "a-red-apple-on-blue.png\n" and err == ""
    with Image.open(here / out.strip()) as image:
        metadata = json.loads(image.text[RECORD])
        pixels = np.asarray(image).astype(int)
    assert metadata == {
        "prompt": PROMPT, "negative": "small", "seed": 7, "model": "tiny.safetensors", "width": 128, "height": 64,
        "schedule": "linear", "prior_steps": 3, "prior_guidance": 2.0, "decoder_steps": 2, "decoder_guidance": 1.0,
        "sampler": "ddpm", "weights": fingerprint(bundle), "dtype": "fp32",
    }  # fmt: skip
    [expected] = WuerstchenPipeline.load(bundle, device="cpu").generate(PROMPT, negative="small", seed=7)
    assert np.abs(pixels - np.asarray(expected)).max() <= 1  # rounding


def test_every_option_reaches_the_pipeline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs: dict[str, Any] = {}
    monkeypatch.setattr(
        WuerstchenPipeline,
        "generate",
        lambda self, **options: kwargs.update(options) or [Image.new("RGB", (64, 64))],
    )
    command = (
        "--width 64 --height 128 --schedule linear --sampler ddim --prior-steps 5 --prior-guidance 3.5 "
        "--decoder-steps 4 --decoder-guidance 1.5 --decoder-guidance-end 2 --temperature 1 0.5 --token-mode argmax "
        "--reuse 2 --seed 3 --negative fog --dtype bf16 --device cpu"
    )
    bundle = write_tiny_bundle(here / "v1.safetensors", release="v1")  # v2 has no token options
    assert run("generate", PROMPT, "--model", bundle, *command.split()) == 0
    del kwargs["callback"]
    assert kwargs == {
        "prompt": PROMPT, "negative": "fog", "seed": 3, "width": 64, "height": 128, "schedule": "linear",
        "prior_steps": 5, "prior_guidance": 3.5, "decoder_steps": 4, "decoder_guidance": 1.5,
        "decoder_guidance_end": 2.0, "temperature": (1.0, 0.5), "token_mode": "argmax", "sampler": "ddim",
        "decoder_reuse": 2, "control": [],
    }  # fmt: skip


def test_the_fast_schedule(bundle: Path, here: Path) -> None:
    assert run("generate", PROMPT, "--model", bundle, "--schedule", "fast", "--output", "fast.png") == 0
    with Image.open("fast.png") as image:
        metadata, pixels = json.loads(image.text[RECORD]), np.asarray(image).astype(int)
    assert metadata["sampler"] == "ddim"
    assert (metadata["schedule"], metadata["prior_steps"], metadata["decoder_steps"]) == ("fast", 6, 4)
    seen: list[str] = []
    pipeline, watch = WuerstchenPipeline.load(bundle), lambda stage, *_: seen.append(stage)
    [expected] = pipeline.generate(PROMPT, schedule="fast", callback=watch)
    assert (seen.count("prior"), seen.count("decoder")) == (6, 4)
    assert np.abs(pixels - np.asarray(expected)).max() <= 1  # rounding


def test_files_replace_parts_of_the_model(bundle: Path, here: Path) -> None:
    files = {}
    for name, network in tiny_parts().items():
        files[name] = here / f"{name}.safetensors"
        with torch.no_grad():
            next(network.parameters()).add_(0.5)
        sampling = {"sampling": {**METADATA["sampling"], "prior_steps": 2}} if name == "prior" else {}
        save_bundle(files[name], {name: network}, sampling)
    files["text_encoder"] = files.pop("prior_text_encoder")
    del files["decoder_text_encoder"]
    options = [text for name, file in files.items() for text in (f"--{name.replace('_', '-')}", file)]
    assert run("generate", PROMPT, "--model", bundle, "--device", "cpu", *options, "--output", "parts.png") == 0
    [expected] = WuerstchenPipeline.load(bundle, device="cpu", **files).generate(PROMPT)
    with Image.open("parts.png") as image:
        metadata = json.loads(image.text[RECORD])
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1  # rounding
    assert metadata["prior_steps"] == 2
    assert metadata["parts"]["prior"] == {"file": "prior.safetensors", "weights": fingerprint(files["prior"])}
    assert str(here) not in json.dumps(metadata)


def test_only_the_file_named_by_output_is_overwritten(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", PROMPT, "--model", bundle)
    assert run(*command) == run(*command) == 0
    assert capsys.readouterr().out.split() == ["a-red-apple-on-blue.png", "a-red-apple-on-blue-2.png"]
    (here / "mine.png").write_bytes(b"old")
    assert run(*command, "--output", "mine.png") == 0
    (here / "mine-1.png").write_bytes(b"old")
    capsys.readouterr()
    assert run(*command, "--output", "mine.png", "--count", "2") == 0
    assert capsys.readouterr().out.split() == ["mine-2.png", "mine-3.png"]
    assert (here / "mine-1.png").read_bytes() == b"old"
    assert Image.open(here / "mine.png").size == (128, 64)
    assert sorted(path.name for path in here.iterdir()) == [
        "a-red-apple-on-blue-2.png", "a-red-apple-on-blue.png", "mine-1.png", "mine-2.png", "mine-3.png", "mine.png",
    ]  # fmt: skip


def test_count_output_and_json(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    command = ("generate", PROMPT, "--model", bundle, "--count", "2", "--seed", "4", "--json")
    assert run(*command, "--output", "out/p.jpg") == 0
    report = json.loads(capsys.readouterr().out)
    assert [image["path"] for image in report["images"]] == [str(Path("out/p-1.jpg")), str(Path("out/p-2.jpg"))]
    assert [image["seed"] for image in report["images"]] == [4, 5]
    assert report["prompt"] == PROMPT and report["load_seconds"] > 0 and report["device"]
    for image in report["images"]:
        assert set(image["seconds"]) == {"text", "prior", "decoder", "picture"}
        assert all(seconds >= 0 for seconds in image["seconds"].values()) and image["seconds"]["prior"] > 0
        assert Image.open(image["path"]).format == "JPEG"
    assert run(*command, "--output", "out") == 0
    assert json.loads(capsys.readouterr().out)["images"][1]["path"] == str(Path("out/a-red-apple-on-blue-2.png"))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("../../etc/passwd", "etc-passwd"), ("", "picture"), ("?!", "picture"), ("Über Äpfel", "über-äpfel")],
)
def test_slug(prompt: str, name: str) -> None:
    assert save.slug(prompt) == name
    assert len(save.slug("word " * 100)) <= save.SLUG_LENGTH


def test_progress_bars_on_a_terminal(
    bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("generate", PROMPT, "--model", bundle) == 0
    err = capsys.readouterr().err
    assert "] 2/3" in err and "decoder [" in err and err.endswith("\x1b[K")


# failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--width 100", "128x64"),
        ("--width 4096", "2048x64"),
        ("--model nowhere.safetensors", "nowhere.safetensors"),
        ("--model broken.safetensors", "broken.safetensors"),
        ("--model cut.safetensors", "cut.safetensors"),
        ("--model empty", "empty"),
        ("--device abacus", "'abacus'"),
        ("--dtype int4", "'int4'"),
        ("--seed -1", "seed -1"),
        ("--seed x", "'x'"),
        ("--count 0", "count"),
        ("--prior-steps 0", "0 "),
        ("--schedule original --prior-steps 7", "30 steps, not 7"),
        ("--token-mode argmax", "token"),
        ("--temperature 1 0.5 --token-mode argmax", "temperature"),
        ("--output nowhere/x.png", "folder nowhere"),
        ("--output x.txt", ".png"),
        ("--output x", ".png"),
        ("--unknown", "--unknown"),
    ],
)
def test_a_failure_is_one_line(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    (here / "broken.safetensors").write_text("version https://git-lfs.example/spec/v1\n")
    (here / "cut.safetensors").write_bytes(bundle.read_bytes()[:-1000])
    (here / "empty").mkdir()
    before = sorted(here.iterdir())
    model = () if "--model" in options else ("--model", bundle)
    assert message in failure(capsys, "generate", PROMPT, *model, *options.split())
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dream", "x.png"], "'dream'"),
        (["generate"], "PROMPT"),
        (["inspect", "nowhere"], "nowhere"),
        (["train", "everything", "--config", "x.toml"], "'everything'"),
        (["train", "prior"], "--config"),
        (["train", "prior", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "export", "x", "--step", "-1"], "'-1'"),
    ],
)
def test_other_failures(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in failure(capsys, *arguments)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(" {4}[a-z]", line)]
    assert listed == [
        "generate", "reconstruct", "variations", "inpaint", "outpaint", "interpolate", "inspect", "convert", "download",
        "train",
    ]  # fmt: skip


def test_bench_moved_to_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert "python -m tools.bench" in failure(capsys, "bench", "--quick")


def raising(error: BaseException) -> Any:
    def raises(*arguments: Any, **options: Any) -> None:
        raise error

    return raises


def test_interrupted(
    bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WuerstchenPipeline, "decode", raising(KeyboardInterrupt()))
    assert run("generate", PROMPT, "--model", bundle) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not list(here.iterdir())


def test_interrupted_while_writing(
    bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(self: Image.Image, path: Path, **options: Any) -> None:
        path.write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    assert run("generate", PROMPT, "--model", bundle, "--output", "x.png") == 130
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0."),
        MemoryError(),
    ],
)
def test_out_of_memory(
    bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(WuerstchenPipeline, "generate", raising(error))
    assert "--width" in failure(capsys, "generate", PROMPT, "--model", bundle)
    trainer = pytest.importorskip("wuerstchen_core.training.run")
    monkeypatch.setattr(trainer, "run", raising(error))
    assert "train.batch" in failure(capsys, "train", "prior", "--config", "c.toml")


def test_a_bug_keeps_its_traceback(bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WuerstchenPipeline, "generate", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        run("generate", PROMPT, "--model", bundle)


@pytest.mark.parametrize(
    ("module", "arguments", "extra", "file"),
    [
        ("accelerate", ("train", "prior", "--config", "x.toml"), '"wuerstchen[train]"', "requirements-train.txt"),
        ("open_clip", ("generate", PROMPT), "pip install wuerstchen", "requirements.txt"),
    ],
)
def test_a_missing_package_is_named_with_ways_to_install_it(
    bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    module: str, arguments: tuple[str, ...], extra: str, file: str,
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.startswith("wuerstchen_core.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("wuerstchen_core.training", raising=False)  # so that the package itself comes back afterwards
    monkeypatch.setitem(sys.modules, module, None)  # makes Python's import fail
    for cached in (tokenizer._piece_ids, tokenizer._tables):
        cached.cache_clear()
    model = ("--model", bundle) if arguments[0] == "generate" else ()
    line = failure(capsys, *arguments, *model)
    assert all(fact in line for fact in (module, extra, file))


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("/bin/wuerstchen", "wuerstchen"),
        ("wuerstchen.exe", "wuerstchen"),
        ("/x/__main__.py", "python -m wuerstchen_core"),
    ],
)
def test_usage_and_errors_name_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    assert run("inspect", "--help") == 0 and f"usage: {name} inspect" in capsys.readouterr().out
    assert f"`{name} inspect --help`" in failure(capsys, "inspect")


# train and inspect


def test_train_calls_the_trainer(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    trainer = pytest.importorskip("wuerstchen_core.training.run")
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(trainer, "run", lambda *arguments: calls.append(arguments))
    assert run("train", "prior", "--config", "c.toml", "--set", "train.steps=3", "--set", "run='x'") == 0
    assert calls == [("prior", Path("c.toml"), ["train.steps=3", "run='x'"])]


def test_inspect(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", bundle) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{bundle}: ") and any(line.strip().startswith("prior (Stage C):") for line in lines)
    assert run("inspect", bundle, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in report["parts"]][:2] == ["prior", "decoder"] and report["vocabulary"] == 6


def test_inspect_lists_the_words(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "demo", "--words") == 0
    text = capsys.readouterr().out
    assert [line.split(" (")[0] for line in text.splitlines() if line[0] != " "] == [
        "things", "backgrounds", "sizes", "positions", "shapes", "synonyms and other words",
    ]  # fmt: skip
    assert "red apple" in text and "top left" in text and max(map(len, text.splitlines())) <= 100
    assert run("inspect", bundle, "--words", "--json") == 0
    assert json.loads(capsys.readouterr().out)["backgrounds"] == ["blue"]
    free = write_tiny_bundle(here / "free.safetensors", {})
    assert run("inspect", free, "--words") == 0
    out = capsys.readouterr().out
    assert str(free) in out and out.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tmp_path / os.fsdecode(b"\xff.safetensors")
    shutil.copyfile(bundle, name)
    for command in (
        ("inspect", name),
        ("convert", bundle, name, "--force"),
        ("train", "new", name.with_name("\udcff")),
    ):
        message = failure(capsys, *command)
        assert "\\udcff" in message and "UTF-8" in message and "damaged" not in message
