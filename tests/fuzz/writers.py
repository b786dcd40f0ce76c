"""The commands that `kills` kills: all that write files, on a tiny model, and a hub to download from."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from fuzz.weights import kept_folder
from helpers.picture_folders import examples, picture, write_folder
from helpers.tiny_model import write_tiny_bundle

from wuerstchen_core.checkpoints.published import SETS, PublishedFile
from wuerstchen_core.checkpoints.writer import tensor_bytes
from wuerstchen_core.cli.main import main
from wuerstchen_core.training import compare, export, run  # noqa: F401 # imported once, before processes are forked

CONTENT = {f"{name}/x.safetensors": name.encode() * 300_000 for name in ("prior", "vqgan")}
LORA = """
run = "out"
inputs = {{ prior = "{model}", encoder = "{model}", text = "{model}", decoder = "{model}", vqgan = "{model}" }}
data = {{ source = "{pictures}", buckets = [[64, 64]], workers = 0 }}
validation = {{ fraction = 0.2, every = 4 }}
lora = {{ rank = 2, targets = ["to_q"], dropout = 0.2 }}
sample = {{ prompts = ["a red apple"], every = 4, prior_steps = 2, decoder_steps = 2 }}
train = {{ steps = 4, batch = 2, lr = 1e-3, ema = 0.5, log_every = 1, save_every = 2, keep_every = 2, sheet_every = 4 }}
"""
PRIOR = LORA.replace("lora =", "start = '{model}' #").replace("sample =", "#")
CACHE = """
run = "run"
inputs = {{ prior = "{model}", encoder = "{model}", text = "{model}", vqgan = "{model}" }}
data = {{ source = "{pictures}", size = 64, multiple = 64, workers = 0 }}
cache = {{ output = "out", what = ["latents", "text"], shard = 3, batch = 2 }}
"""

FILE_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Writer:
    """A command line with names of `inputs` in braces. It runs in an empty folder, or with the folder `start` in it."""

    command: str
    start: str = ""
    numbered: bool = False  # True if the names of its files depend on those that exist
    replaces: str = ""  # the folder that it empties


WRITERS: Mapping[str, Writer] = {
    "convert to a bundle": Writer("convert {model} out/model.safetensors --dtype bf16 --force"),
    "convert": Writer("convert {model} out --dtype bf16 --force"),
    "convert to fp16": Writer("convert {model} out --dtype fp16 --force"),
    "convert to diffusers": Writer("convert {stage_c} out --to diffusers"),
    "generate": Writer("generate apple --model {model} --output x.png --device cpu"),
    "generate several": Writer("generate apple --count 3 --model {model} --device cpu", numbered=True),
    "variations": Writer("variations {picture} --model {model} --output x.png --device cpu"),
    "bulk": Writer("generate --prompts {prompts} --model {model} --output out --device cpu"),
    "bulk in shards": Writer("generate --prompts {prompts} --model {model} --output out --device cpu --shards 2"),
    "cache": Writer("train cache --config {cache}"),
    "train a LoRA": Writer("train lora --config {lora}"),
    "train a prior": Writer("train prior --config {prior}"),
    "train longer": Writer("train lora --config {lora} --set train.steps=8", "trained"),
    "train new": Writer("train new out --recipe scratch"),
    "train export": Writer("train export out/lora", "trained", replaces="out/lora/export"),
    "train compare": Writer("train compare out/lora", "trained"),
    "download": Writer("download tiny --to out"),
}


@cache
def inputs() -> Path:
    """Returns a folder with a tiny model, pictures, prompts and configurations."""
    folder = kept_folder()
    model = write_tiny_bundle(folder / "model")
    write_tiny_bundle(folder / "stage_c", without=("decoder", "vqgan", "image_encoder"))
    pictures = write_folder(folder / "pictures", examples(range(12)))
    (folder / "picture").write_bytes(picture(9))
    (folder / "prompts").write_text("".join(f"a red apple {i}\n" for i in range(6)))
    for name, text in (("lora", LORA), ("prior", PRIOR), ("cache", CACHE)):
        (folder / name).write_text(text.format(model=model, pictures=pictures))
    return folder


class Hub(BaseHTTPRequestHandler):
    """Serves CONTENT in pieces, as the Hugging Face hub does."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool = False) -> None:
        content = CONTENT.get(self.path.partition("/resolve/main/")[2])
        if content is None:
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:] if with_body else b"")

    def log_message(self, *_: Any) -> None:
        pass


@cache
def hub() -> str:
    """Returns the address of a running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def use_hub(address: str) -> None:
    """Makes `download tiny` in this process read from a hub."""
    from huggingface_hub import constants

    constants.ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    SETS["tiny"] = tuple(
        PublishedFile("some/model", path, f"{part}.safetensors", part, len(content))
        for path, content in CONTENT.items()
        for part in [path.partition("/")[0]]
    )


def work(command: str, folder: Path, address: str, events: Path, stop: tuple[int, int] | None, largest: int) -> None:
    """Runs a command in a folder. `stop` has a signal and the number of the operation before which it is sent.

    No file gets larger than `largest` bytes, as if the disk were full then.
    """
    os.chdir(folder)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    use_hub(address)
    count = 0

    def count_events(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in FILE_EVENTS:
            count += 1
            if stop is not None and count == stop[1]:
                os.kill(os.getpid(), stop[0])

    sys.addaudithook(count_events)
    code = main(shlex.split(command))
    events.write_text(str(count))
    sys.exit(code)


def numbers_hash(value: Any) -> str:
    """Returns a hash of nested tables and lists of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        value = [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]
    elif isinstance(value, dict):
        value = [[repr(key), numbers_hash(x)] for key, x in value.items()]
    elif isinstance(value, list | tuple):
        value = [numbers_hash(x) for x in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def contents(path: Path) -> str:
    """Returns a hash of a file, without times and paths in it; "" if it has only these."""
    if path.name in ("starts.jsonl", "run.html"):
        return ""
    if path.name == "log.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        data = json.dumps([{key: x for key, x in row.items() if key != "seconds"} for row in rows]).encode()
    elif path.suffix == ".pt":
        return numbers_hash(torch.load(path, weights_only=True))
    else:
        data = path.read_bytes()
    return hashlib.sha256(data).hexdigest()
