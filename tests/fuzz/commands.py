"""Runs random command lines: `PYTHONPATH=.. python -m fuzz.commands --cases 100`, in tests/.

A case is wrong if anything is raised, if an error is not one printable line, if a file that the command does not name
as its output changes, if a draft is left behind, or if it takes too long.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fuzz.weights import Wrong, kept_folder, main, time_limit
from helpers.lora_forms import FORMS, attention_of_prior, random_factors
from helpers.networks import NETWORKS
from helpers.picture_folders import examples, write_folder
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.cli.main import _parser
from wuerstchen_core.cli.main import main as run_command
from wuerstchen_core.cli.options import PART_OPTIONS
from wuerstchen_core.training.tables import STAGES

COMMANDS = (
    "generate", "reconstruct", "variations", "inpaint", "outpaint", "interpolate", "inspect", "convert", "download",
    "train", "train", "frobnicate",
)  # fmt: skip
DISTILLATIONS = ("distill", "distill-lora", "decoder-distill", "decoder-distill-lora")
CONFIGURED = ("lora", "decoder-lora", "embedding", "control", *DISTILLATIONS)
TRAININGS = (*CONFIGURED, "cache", "new", "export", "compare")
USUAL = {  # values that mostly are given, by the name of an argument or option
    "image": "cat.png", "mask": "mask.png", "prompt": "a red apple", "a": "a red apple", "b": "a blue car",
    "file": "tiny.safetensors", "sources": "tiny.safetensors", "target": "new.safetensors",
    "--lora": "lora.safetensors", "--prompts": "prompts.txt", "--like": "made.png", "--pictures": "pictures",
    "--control": ("net.safetensors", "mask.png:0.5"),
    **dict.fromkeys((f"--{name.replace('_', '-')}" for name in PART_OPTIONS), "tiny.safetensors"),
}  # fmt: skip
GIVEN = {"--model": "tiny.safetensors", "--output": "new.png", "--device": "cpu"}  # nearly always
NUMBERS = ("0", "1", "2", "3", "64", "128", "100", "-1", "1.5", "nan", "inf", "1e38", "1e400", "9" * 30, "", "x", "٣")
TEXTS = ("", "a red apple", "\x1b[31m", "\n", "\udcff", "a" * 5000, "(a:1e999)", "embedding:x", "../x", "-", "--", "é")
FILES = (
    "tiny.safetensors", "lora.safetensors", "cat.png", "mask.png", "prompts.txt", "lora.toml", "broken.safetensors",
    "broken.png", "empty", "folder", "missing", "missing/x.png", "\udcff.png", "new.png", "new", "new.jpg", "", ".",
    "lora.safetensors:0.5", "lora.safetensors:nan", "new.safetensors", "tiny.safetensors/x", "net.safetensors",
    "cat.png:2", "cat.png:inf",
)  # fmt: skip
SETS = ("train.steps=0", "train.steps=x", "a=", "=", "run='new'", "train.lr=nan", "data.size=1e9", "[", "\udcff=1")
LEFT_OUT = ("--compile", "--help", "-h", "--version", "--push")  # slow, nothing but text, or on the network
CONFIG = """
run = "run"
data = { source = "pictures", size = 64, multiple = 64, workers = 0 }
train = { steps = 1, batch = 2, lr = 1e-3, warmup = 1, ema = 0.5, sheet_every = 100 }
"""
TABLES = {
    "lora": "rank = 2",
    "distill": "guidance = 2.0\nsteps = 1\nteacher_steps = 1",
    "embedding": 'name = "thing"\ninit = "apple"',
    "control": 'hints = "outline"\nwidths = [8, 8, 8, 16]\nrepeats = [1, 1, 1, 1]',
    "sample": 'prompts = ["a red apple"]',
}
INPUTS = ("prior", "encoder", "text", "decoder", "vqgan")


@cache
def _files() -> Path:
    """Returns a folder with a tiny model and other files."""
    folder = kept_folder()
    write_tiny_bundle(folder / "tiny.safetensors")
    save_file(FORMS["comfyui"].write(random_factors(attention_of_prior()), {}), folder / "lora.safetensors")
    save_bundle(folder / "net.safetensors", {"control_net": NETWORKS["control_net"].perturbed()}, {})
    Image.linear_gradient("L").resize((128, 64)).convert("RGB").save(folder / "cat.png")
    Image.linear_gradient("L").resize((128, 64)).point(lambda x: 255 * (x > 99)).save(folder / "mask.png")
    (folder / "prompts.txt").write_text('a red apple\n{"prompt": "b", "count": 2}\n{"prompt": 3}\n')
    inputs = "".join(f'{name} = "tiny.safetensors"\n' for name in INPUTS)
    for stage in CONFIGURED:
        tables = "".join(f"[{name}]\n{text}\n" for name, text in TABLES.items() if name in STAGES[stage].tables)
        (folder / f"{stage}.toml").write_text(f"{CONFIG}[inputs]\n{inputs}{tables}")
    write_folder(folder / "pictures", examples(range(3)))
    (folder / "comfyui" / "models").mkdir(parents=True)
    (folder / "broken.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[:5000])
    (folder / "broken.png").write_bytes((folder / "cat.png").read_bytes()[:100])
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    made = ["--model", "tiny.safetensors", "--device", "cpu", "--output", "made.png"]
    assert _run(["generate", "a", *made], folder)[0] == 0
    return folder


@cache
def _files_with_run() -> Path:
    """Returns a folder with the same files, and a training run."""
    folder = kept_folder()
    shutil.copytree(_files(), folder, dirs_exist_ok=True)
    assert _run(["train", "lora", "--config", "lora.toml"], folder)[0] == 0
    return folder


@cache
def _actions(command: str) -> list[argparse.Action]:
    [commands] = [x.choices for x in _parser()._actions if isinstance(x, argparse._SubParsersAction)]
    return list(commands[command]._actions) if command in commands else []


def arguments(rng: random.Random) -> list[str]:
    """Returns a random command line."""
    command = rng.choice(COMMANDS)
    out, given, usual = [command], GIVEN, USUAL
    if command == "train":
        stage = rng.choice(TRAININGS)
        usual = USUAL | {"stage": stage, "path": "new" if stage == "new" else "run/lora", "--set": "train.steps=2"}
        given = (
            {}
            if stage in ("new", "export", "compare")
            else {"--config": f"{stage if stage in CONFIGURED else 'lora'}.toml"}
        )
    elif command == "download":
        given = rng.choice(({"--to": "new"}, {"--comfyui": "comfyui"}))
    for action in _actions(command):
        name = action.option_strings[-1] if action.option_strings else ""
        likely = name in given or not name
        if action.dest == "path":
            likely = not given
        if name in LEFT_OUT or rng.random() > (0.95 if likely else 0.06):
            continue
        count = action.nargs if isinstance(action.nargs, int) else int(action.nargs != 0)
        mostly = (usual | given).get(name or action.dest)
        mostly = mostly if isinstance(mostly, tuple) else (mostly,) * count
        values = [_value(rng, action, value) for value in mostly]
        out += [name, *values] if name else values
    if rng.random() < 0.05:
        out.insert(rng.randrange(len(out) + 1), rng.choice(TEXTS))
    return out


def _value(rng: random.Random, action: argparse.Action, usual: str | None) -> str:
    if usual and rng.random() < 0.85:
        return usual
    if action.type in (int, float) and rng.random() < 0.5:
        return rng.choice(("1", "2", "3", "64", "128"))
    if action.choices is not None and rng.random() < 0.8:
        return rng.choice([str(x) for x in action.choices])
    if action.type in (int, float) and rng.random() < 0.9:
        return rng.choice(NUMBERS)
    return rng.choice(rng.choice((NUMBERS, TEXTS, FILES, FILES, FILES, SETS)))


def _hashes(folder: Path) -> dict[Path, str]:
    return {x: hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.rglob("*") if x.is_file()}


def run_case(seed: int) -> str:
    """Runs one case; returns "accepted", "refused", or what is wrong with it."""
    rng = random.Random(seed)
    words = arguments(rng)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        folder = Path(path) / "in"
        shutil.copytree(_files_with_run() if "run/lora" in words else _files(), folder)
        hashes = _hashes(folder)
        try:
            code, err = _run(words, folder)
            if code not in (0, 2, 130) or (code == 2 and (not err.endswith("\n") or not err.strip())):
                raise Wrong(f"exit code {code}, {err[-300:]!r}")
            if not all(line.isprintable() for line in re.split("[\r\n]", err)):  # a progress bar has both
                raise Wrong(f"not printable: {err[-300:]!r}")
            named = {word for i, word in enumerate(words) if i and words[i - 1] in ("--output", "--force", "-o")}
            named |= {"log.jsonl"} if "export" in words else set()  # of the run, which lists the weights that are kept
            after = _hashes(folder)
            changed = [x.name for x, content in hashes.items() if after.get(x) != content and x.name not in named]
            left = [x.name for x in after if x.name.endswith(".part") or ".lock" in x.name]
            if (changed and words[0] != "convert") or left:
                raise Wrong(f"changed {changed}, left {left}")
        except Wrong as error:
            return f"{json.dumps(words)}: {error}"
    return "accepted" if code == 0 else "refused"


class _Offline:
    """The hub without a connection."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("offline")


def _run(words: list[str], folder: Path) -> tuple[Any, str]:
    """Runs a command in a folder and returns its exit code and errors."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with (
            time_limit(),
            patch("wuerstchen_core.checkpoints.download._hub", _Offline),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            return run_command(words), err.getvalue()
    except SystemExit as stop:
        return stop.code or 0, err.getvalue()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        raise Wrong(f"{type(error).__name__} {str(error):.200} ({place})") from error
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main(__doc__, run_case)
