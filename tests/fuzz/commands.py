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
import shutil
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.weights import Wrong, main, time_limit
from helpers.lora_forms import FORMS, attention_of_prior, random_factors
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file

from wuerstchen_core.cli.main import _parser
from wuerstchen_core.cli.main import main as run_command

COMMANDS = ("generate", "variations", "inpaint", "outpaint", "interpolate", "inspect", "convert", "train", "frobnicate")
NUMBERS = ("0", "1", "2", "3", "64", "128", "100", "-1", "1.5", "nan", "inf", "1e38", "1e400", "9" * 30, "", "x", "٣")
TEXTS = ("", "a red apple", "\x1b[31m", "\n", "\udcff", "a" * 5000, "(a:1e999)", "embedding:x", "../x", "-", "--", "é")
FILES = (
    "tiny.safetensors", "lora.safetensors", "cat.png", "mask.png", "prompts.txt", "config.toml", "broken.safetensors",
    "broken.png", "empty", "folder", "missing", "missing/x.png", "\udcff.png", "new.png", "new", "new.jpg", "", ".",
    "lora.safetensors:0.5", "lora.safetensors:nan", "new.safetensors", "tiny.safetensors/x",
)  # fmt: skip
SETS = ("train.steps=0", "train.steps=x", "a=", "=", "run='new'", "train.lr=nan", "data.size=1e9", "[", "\udcff=1")
LEFT_OUT = ("--compile", "--help", "-h", "--version")  # slow, or nothing but text


@cache
def _files() -> Path:
    """Returns a folder with a tiny model and other files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    write_tiny_bundle(folder / "tiny.safetensors")
    save_file(FORMS["comfyui"].write(random_factors(attention_of_prior()), {}), folder / "lora.safetensors")
    Image.linear_gradient("L").resize((128, 64)).convert("RGB").save(folder / "cat.png")
    Image.linear_gradient("L").resize((128, 64)).point(lambda x: 255 * (x > 99)).save(folder / "mask.png")
    (folder / "prompts.txt").write_text('a red apple\n{"prompt": "b", "count": 2}\n{"prompt": 3}\n')
    (folder / "config.toml").write_text('run = "new"\n[train]\nsteps = 1\n')
    (folder / "broken.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[:5000])
    (folder / "broken.png").write_bytes((folder / "cat.png").read_bytes()[:100])
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    return folder


@cache
def _actions(command: str) -> list[argparse.Action]:
    [commands] = [x.choices for x in _parser()._actions if isinstance(x, argparse._SubParsersAction)]
    return list(commands[command]._actions) if command in commands else []


def arguments(rng: random.Random) -> list[str]:
    """Returns a random command line."""
    command = rng.choice(COMMANDS)
    out = [command]
    positional = {"image": "cat.png", "picture": "cat.png", "mask": "mask.png", "prompt": "a red apple"}
    fast = {"--model": "tiny.safetensors", "--output": "new.png", "--device": "cpu"}
    for action in _actions(command):
        name = action.option_strings[-1] if action.option_strings else ""
        if name in LEFT_OUT or rng.random() > (0.95 if name in fast or not name else 0.06):
            continue
        count = action.nargs if isinstance(action.nargs, int) else int(action.nargs != 0)
        usual = fast.get(name) if name else positional.get(action.dest, "tiny.safetensors")
        values = [_value(rng, action, usual) for _ in range(count)]
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
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        folder = Path(path) / "in"
        shutil.copytree(_files(), folder)
        hashes = _hashes(folder)
        os.chdir(folder)
        try:
            code, err = _run(words)
            if code not in (0, 2, 130) or (code == 2 and (not err.endswith("\n") or not err.strip())):
                raise Wrong(f"exit code {code}, {err[-300:]!r}")
            if not all(line.isprintable() for line in err.split("\n")):
                raise Wrong(f"not printable: {err[-300:]!r}")
            named = {word for i, word in enumerate(words) if i and words[i - 1] in ("--output", "--force", "-o")}
            after = _hashes(folder)
            changed = [x.name for x, content in hashes.items() if after.get(x) != content and x.name not in named]
            left = [x.name for x in after if x.name.endswith(".part") or x.name.startswith(".lock")]
            if (changed and words[0] != "convert") or left:
                raise Wrong(f"changed {changed}, left {left}")
        except Wrong as error:
            return f"{json.dumps(words)}: {error}"
        finally:
            os.chdir(before)
    return "accepted" if code == 0 else "refused"


def _run(words: list[str]) -> tuple[Any, str]:
    """Runs a command and returns its exit code and errors."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return run_command(words), err.getvalue()
    except SystemExit as stop:
        return stop.code or 0, err.getvalue()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        raise Wrong(f"{type(error).__name__} {str(error):.200} ({place})") from error


if __name__ == "__main__":
    main(__doc__, run_case)
