"""Kills what writes files at random moments and starts it again: `python -m fuzz.kills`.

A case is wrong if the files then are not those of an undisturbed run, if a draft or lock is left, or if two of them
at once in one folder lose or mix files. Trainings are killed by `training/test_killed.py`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz.weights import main
from helpers.picture_folders import examples, write_folder
from helpers.tiny_model import write_tiny_bundle

from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.cli.main import main as run_command
from wuerstchen_core.training.data.build_cache import make_cache

CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fuzz.kills"])
CONFIG = """
run = "{folder}/run"
inputs = {{ prior = "{model}", encoder = "{model}", text = "{model}", vqgan = "{model}" }}
data = {{ source = "{pictures}", size = 64, multiple = 64, workers = 0 }}
cache = {{ output = "{folder}/out", what = ["latents", "text"], shard = 3, batch = 2 }}
"""


@cache
def inputs() -> Path:
    """Returns a folder with a tiny model, pictures and prompts."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    write_tiny_bundle(folder / "tiny.safetensors")
    write_folder(folder / "pictures", examples(range(12)))
    (folder / "prompts.txt").write_text("".join(f"a red apple {i}\n" for i in range(6)))
    return folder


def _convert(inputs: Path, folder: Path) -> None:
    convert([inputs / "tiny.safetensors"], folder / "out", dtype="bf16", force=True)


def _generate(inputs: Path, folder: Path) -> None:
    model, output = inputs / "tiny.safetensors", folder / "out.png"
    run_command(["generate", "a", "--model", str(model), "--output", str(output), "--device", "cpu"])


def _bulk(inputs: Path, folder: Path, *options: str) -> None:
    model, prompts = inputs / "tiny.safetensors", inputs / "prompts.txt"
    run_command([
        "generate", "--prompts", str(prompts), "--model", str(model), "--output", str(folder / "out"), "--device",
        "cpu", *options,
    ])  # fmt: skip


def _bulk_shards(inputs: Path, folder: Path) -> None:
    _bulk(inputs, folder, "--shards", "2")


def _cache(inputs: Path, folder: Path) -> None:
    text = CONFIG.format(folder=folder, model=inputs / "tiny.safetensors", pictures=inputs / "pictures")
    (folder / "config.toml").write_text(text)
    make_cache(folder / "config.toml", [])


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "convert": _convert, "generate": _generate, "bulk": _bulk, "bulk in shards": _bulk_shards, "cache": _cache,
}  # fmt: skip


def _work(name: str, inputs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    try:
        WRITERS[name](inputs, folder)
    except ValueError:  # the folder is locked
        sys.exit(2)


def _start(name: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=_work, args=(name, inputs(), folder))
    process.start()
    return process


def _files(folder: Path) -> dict[str, str]:
    """Returns the hashes of the files of the output."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("config")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@cache
def _undisturbed(name: str) -> tuple[dict[str, str], float]:
    """Returns the files of a run that is not killed, and its seconds."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        start = time.monotonic()
        _start(name, Path(path) / "in").join()
        return _files(Path(path) / "in"), time.monotonic() - start


def run_case(seed: int) -> str:
    """Runs one case; returns "accepted", or what is wrong with it."""
    rng = random.Random(seed)
    name = rng.choice(list(WRITERS))
    expected, seconds = _undisturbed(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        folder = Path(path) / "in"
        together = rng.random() < 0.3
        for _ in range(rng.choice((1, 2))):
            processes = [_start(name, folder) for _ in range(1 + together)]
            if not together:
                time.sleep(rng.random() * seconds)
                processes[0].kill()
            for process in processes:
                process.join()
            if any(process.exitcode not in (0, 2, -signal.SIGKILL) for process in processes):
                return f"{name}: exit codes {[process.exitcode for process in processes]}"
        _start(name, folder).join()
        found = _files(folder)
    different = [file for file in {**expected, **found} if expected.get(file) != found.get(file)]
    what = "two at once" if together else "killed"
    return f"{name}, {what}: {different}" if different else "accepted"


if __name__ == "__main__":
    main(__doc__, run_case)
