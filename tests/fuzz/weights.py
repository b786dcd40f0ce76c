"""Damages weight files at random and judges what reads them: `PYTHONPATH=.. python -m fuzz.weights` in tests/.

A case is wrong if anything but a one-line ValueError or OSError is raised, if `inspect`, `convert` and the loaders do
not agree, if other tensors are loaded than a plain reader finds, if code in a file runs, if something is left behind,
or if it takes too long.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers.layouts import Payload
from helpers.lora_forms import FORMS, attention_of_prior, attention_of_tower, random_factors
from helpers.weight_layouts import LAYOUTS, State
from safetensors.torch import load_file, save_file
from torch import Tensor

from wuerstchen_core.checkpoints import build_part, describe, read_part
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.embeddings import describe_embedding, read_embedding
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.checkpoints.lora_info import describe_lora
from wuerstchen_core.checkpoints.weight_files import read_file_metadata, read_weight_file

LONGEST = 20  # seconds of processor time for one case
ODD_NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e38, 0.0)
DTYPES = (
    torch.float64, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
)  # fmt: skip
ODD_JSON: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1.5, "", "x", [], [[]], {}, {"": {}}, ["a", 1], "\x1b[31m", "NaN", {"format": 3},
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Files to damage and what reads them."""

    write: Callable[[Path], Path]  # into a folder; returns the source
    part: str | None = None  # None: an adapter or embedding


def _subjects() -> dict[str, Subject]:
    found = {
        name: Subject(lambda folder, layout=layout: layout.write(folder, layout.state()), layout.part)  # type: ignore[misc]
        for name, layout in LAYOUTS.items()
    }
    network, tower = random_factors(attention_of_prior()), random_factors(attention_of_tower(32), 1)
    for name in ("diffusers", "peft", "onetrainer 2025", "kohya", "comfyui"):
        found[f"LoRA of {name}"] = Subject(lambda folder, name=name: _save(folder, FORMS[name].write(network, tower)))  # type: ignore[misc]
    found["LoRA in a PyTorch file"] = Subject(lambda folder: _pickle(folder, FORMS["kohya"].write(network, tower)))
    found["embedding"] = Subject(lambda folder: _save(folder, {"clip_g": torch.ones(2, 32)}))
    found["embedding of A1111"] = Subject(
        lambda folder: _pickle(folder, {"string_to_param": {"*": torch.ones(2, 32)}, "name": "x", "step": 3})
    )
    return found


def _save(folder: Path, state: State) -> Path:
    save_file(state, folder / "file.safetensors")
    return folder / "file.safetensors"


def _pickle(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


SUBJECTS = _subjects()


def damaged_bytes(rng: random.Random, data: bytearray) -> bytearray:
    """Returns the bytes of a file with one change."""
    head = min(len(data), 4096) if rng.random() < 0.7 else len(data)
    at, length = rng.randrange(head), rng.choice((1, 2, 8, 100))
    match rng.randrange(8):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at : at + length] = rng.randbytes(length)
        case 2:
            del data[rng.randrange(len(data)) :]
        case 3:
            data[at : at + length] = bytes(length)
        case 4:
            data[at:at] = rng.randbytes(length)
        case 5:
            del data[at : at + length]
        case 6:
            data += rng.randbytes(length)
        case 7:
            digits = [i for i, x in enumerate(data[:head]) if chr(x).isdigit()]
            if digits:
                data[rng.choice(digits)] = ord(rng.choice("0123456789-.e"))
    return data


# What is done to a state dict; anything may be its key or value in a PyTorch file.
def _content(rng: random.Random, state: dict[Any, Any], folder: Path, plain: bool) -> None:
    key = rng.choice([key for key in state if isinstance(state[key], Tensor)])
    x: Tensor = state[key]
    number = rng.randrange(14 if plain else 22)
    match number:
        case 0:
            del state[key]
        case 1:
            state[f"{key}{rng.choice(('_more', '.0', '.weight', '2'))}"] = torch.zeros(rng.choice(((), (3,), (2, 2))))
        case 2:
            state[key] = torch.zeros(*(side + rng.choice((-1, 0, 1)) for side in x.shape)).to(x.dtype)
        case 3:
            state[key] = torch.ones(x.shape).to(rng.choice(DTYPES))
        case 4:
            state[key] = x.reshape(rng.choice(((-1,), (-1, 1, 1, 1, 1), (1, -1))))
        case 5:
            state[key] = torch.zeros(rng.choice(((), (0,), (0, 3), (1,) * 9)))
        case 6:
            x = x.clone()
            if x.numel() and x.dtype.is_floating_point:
                x.view(-1)[rng.randrange(x.numel())] = rng.choice(ODD_NUMBERS)
            state[key] = x
        case 7:
            name = rng.choice(("", "\n", "\x1b[31m", ".", "..", "a" * 3000, "é" * 40, f"{key}.", f".{key}"))
            state[name] = state.pop(key)
        case 8:
            state[_renumbered(rng, key)] = x
        case 9:
            state[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(
                list(json.dumps({"format": rng.choice(("int8_tensorwise", "float8_e4m3fn", "nvfp4", ""))}).encode())
            ).to(torch.uint8)
        case 10:
            name = rng.choice(("weight_scale", "scale_weight", "alpha", "scale_input", "dora_scale"))
            values = rng.choice((torch.ones(()), torch.ones(3), torch.ones(0), torch.tensor(rng.choice(ODD_NUMBERS))))
            state[f"{key.removesuffix('weight')}{name}"] = values
        case 11:
            other = rng.choice(list(state))
            state[key], state[other] = state[other], state[key]
        case 12:
            for other in [key for key in state if rng.random() < 0.5]:
                del state[other]
            state.setdefault("x.weight", torch.zeros(2))
        case 13:
            for other in [key for key in state if isinstance(state[key], Tensor)]:
                state[other] = state[other].to(rng.choice(DTYPES[:2]))
        case 14:
            state[rng.choice((3, None, (1, 2), 2.5, b"x", True))] = x
        case 15:
            state[key] = rng.choice((None, 3, "x", [x], {"a": x}, (x, x), 10**400, float("nan")))
        case 16:
            state[key] = x.float().to_sparse() if x.numel() else x
        case 17:
            state[key] = x.to("meta")
        case 18:
            state[key] = torch.nn.Parameter(x.float())
        case 19:
            state["a"] = state["b"] = state
        case 20:
            state["more"] = Payload(folder / "executed")
        case 21:
            state[key] = x.double().expand(2, *x.shape) if rng.random() < 0.5 else x.flatten()[::2]


def _renumbered(rng: random.Random, key: str) -> str:
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers:
        parts[rng.choice(numbers)] = rng.choice(("99", "1000000", "9" * 30, "-1", "01", "٣"))
    return ".".join(parts)


def _json(rng: random.Random, content: Any) -> Any:
    """Returns JSON with one value, at any depth, replaced or removed."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        if rng.random() < 0.15:
            return {name: value for name, value in content.items() if name != key}
        return {**content, key: _json(rng, content[key])}
    if rng.random() < 0.05:
        nested: Any = 0
        for _ in range(600):
            nested = [nested]
        return nested
    return rng.choice(ODD_JSON)


def _rezip(rng: random.Random, path: Path) -> None:
    """Writes the members of a PyTorch file anew: compressed, shorter, longer, in another order, or twice."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    match rng.randrange(4):
        case 0:
            rng.shuffle(members)
        case 1:
            i = rng.randrange(len(members))
            name, data = members[i]
            members[i] = name, data[: len(data) // 2] if rng.random() < 0.5 else data + bytes(8)
        case 2:
            members.pop(rng.randrange(len(members)))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)


def damage(rng: random.Random, source: Path, folder: Path) -> str:
    """Damages one file of a source; returns what was done."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    path = rng.choice(files)
    if path.suffix == ".json":
        if rng.random() < 0.7:
            path.write_text(json.dumps(_json(rng, json.loads(path.read_text()))))
            return f"JSON of {path.name}"
    elif rng.random() < 0.55:
        if path.suffix == ".safetensors":
            state, metadata = load_file(path), read_file_metadata(path)  # in no fixed order
            state, metadata = dict(sorted(state.items())), dict(sorted(metadata.items()))
            if metadata and rng.random() < 0.4:
                key = rng.choice(list(metadata))
                metadata[key] = json.dumps(_json(rng, json.loads(metadata[key]))) if metadata[key][:1] == "{" else "{"
            else:
                _content(rng, state, folder, plain=True)
            save_file({key: x.contiguous().clone() for key, x in state.items()}, path, metadata or None)
            return "content"
        if rng.random() < 0.3:
            _rezip(rng, path)
            return "members"
        content = torch.load(path, weights_only=True)
        states = [x for x in _dictionaries(content) if any(isinstance(value, Tensor) for value in x.values())]
        _content(rng, rng.choice(states), folder, plain=False)
        torch.save(content, path)
        return "content"
    path.write_bytes(damaged_bytes(rng, bytearray(path.read_bytes())))
    return f"bytes of {path.name}"


def _dictionaries(content: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _dictionaries(value)


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError in the block if it takes too long."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Wrong(Exception):
    """A case with the wrong outcome."""


def _accepts(name: str, run: Callable[[], Any], source: Path) -> Any:
    """Returns the result, or None if it is refused in one line that names the source. Raises Wrong for all else."""
    try:
        return run()
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, TimeoutError) or not text.isprintable() or len(text) > 1000:
            raise Wrong(f"{name}: {error!r:.200}") from error
        if type(error) not in (ValueError, OSError) and not isinstance(error, ValueError):
            raise Wrong(f"{name}: {error!r:.200}") from error
        if source.name not in text and source.parent.name not in text and str(source.parent) not in text:
            raise Wrong(f"{name} does not name the file: {text:.200}") from error
        return None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise Wrong(
            f"{name}: {type(error).__name__} {str(error):.100} ({Path(last.filename).name}:{last.lineno})"
        ) from error


def judge(subject: Subject, source: Path, folder: Path) -> bool:
    """Returns True if a source is accepted. Raises Wrong."""
    output = folder / "output.safetensors"
    before = sorted(folder.rglob("*"))
    if subject.part is None:
        accepted = _judge_small(source, output)
    else:
        described = _accepts("inspect", lambda: describe(source), source)
        if described is not None:
            lines = "".join(described.lines()) + "".join(described.problems.values())
            if not lines.isprintable():
                raise Wrong("inspect prints control characters")
        part = _accepts("load", lambda: build_part(read_part(source, subject.part)), source)
        converted = _accepts("convert", lambda: convert([source], output), source)
        fine = described is not None and not described.problems and not _has_wrong_checksum(source)
        if fine and part is None and subject.part in [one.name for one in described.parts]:
            raise Wrong("inspect says complete, load refuses")
        if fine and converted is None and all(x.isfinite().all() for x in _floats(source)):
            raise Wrong("inspect says complete, convert refuses")
        if converted is not None and not fine:
            raise Wrong(f"convert takes what inspect refuses: {described and described.problems}")
        if converted is not None and part is not None:
            written = _accepts("load of the output", lambda: build_part(read_part(output, subject.part)), output)
            if written is None:
                raise Wrong("convert writes what cannot be loaded")
            again = written.state_dict()
            if any(not _same(x, again[key]) for key, x in part.state_dict().items()):
                raise Wrong("convert writes other tensors than are loaded")
        if part is not None:
            _compare_with_plain_reader(source, folder, subject.part, part)
        accepted = part is not None
    output.unlink(missing_ok=True)
    if (folder / "executed").exists():
        raise Wrong("code was executed")
    if left := set(folder.rglob("*")) - set(before) - set(folder.glob("plain*")):
        raise Wrong(f"left behind: {sorted(path.name for path in left)}")
    return accepted


def _judge_small(source: Path, output: Path) -> bool:
    """Judges an adapter or embedding."""
    lora = _accepts("LoRA", lambda: read_lora(source), source)
    described = _accepts("description of the LoRA", lambda: describe_lora(source).lines(), source)
    if lora is None and described is not None:
        raise Wrong("inspect describes a LoRA that is refused")
    embedding = _accepts("embedding", lambda: read_embedding(source), source)
    lines = _accepts("description of the embedding", lambda: describe_embedding(source).lines(), source)
    if (embedding is None) != (lines is None):
        raise Wrong("inspect and the reader of embeddings disagree")
    if not "".join([*(described or []), *(lines or [])]).isprintable():
        raise Wrong("inspect prints control characters")
    _accepts("convert", lambda: convert([source], output), source)
    return lora is not None or embedding is not None


def _has_wrong_checksum(source: Path) -> bool:
    """True if a checksum in a PyTorch file is wrong, which `inspect` cannot see in its headers."""
    try:
        with zipfile.ZipFile(source) as archive:
            return archive.testzip() is not None
    except Exception:
        return False


def _floats(source: Path) -> list[Tensor]:
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.suffix == ".safetensors"]
    tensors = (x.load() for file in files for state in read_weight_file(file).states.values() for x in state.values())
    return [x.float() for x in tensors if x.dtype.is_floating_point]


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(torch.equal(torch.nan_to_num(x.float()), torch.nan_to_num(y.float())))


def _compare_with_plain_reader(source: Path, folder: Path, name: str, part: torch.nn.Module) -> None:
    """Raises Wrong if a file that torch or safetensors read and write anew gives other weights."""
    if source.is_dir():
        return
    plain = folder / f"plain{source.suffix}"
    try:
        if source.suffix == ".safetensors":
            save_file(load_file(source), plain, read_file_metadata(source) or None)
        else:
            torch.save(torch.load(source, weights_only=True), plain)
    except Exception as error:
        raise Wrong(f"accepted, but a plain reader refuses it: {error!r:.100}") from error
    expected = build_part(read_part(plain, name)).state_dict()
    plain.unlink()
    if any(not _same(x, expected[key]) for key, x in part.state_dict().items()):
        raise Wrong("other tensors than a plain reader finds")


def kept_folder() -> Path:
    """Returns a new folder, which is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _whole(name: str) -> tuple[Path, Path]:
    """Returns a folder with an undamaged subject, and its source."""
    folder = kept_folder()
    return folder, SUBJECTS[name].write(folder)


def run_case(seed: int) -> str:
    """Runs one case; returns "accepted", "refused", or what is wrong with it."""
    rng = random.Random(seed)
    name = rng.choice(list(SUBJECTS))
    original, source = _whole(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        folder = Path(path) / "in"
        shutil.copytree(original, folder)
        copy = folder / source.relative_to(original)
        try:
            done = [damage(rng, copy, folder) for _ in range(rng.choice((1, 1, 1, 2)))]
        except Exception:  # a second damage that does not apply, or that the format cannot hold
            return "skipped"
        try:
            with time_limit():
                return "accepted" if judge(SUBJECTS[name], copy, folder) else "refused"
        except Wrong as error:
            return f"{name} ({', '.join(done)}): {error}"
        except Exception as error:
            return f"{name} ({', '.join(done)}): {type(error).__name__} {str(error):.200}"


def main(
    description: str | None, run_case: Callable[[int], str], right: Sequence[str] = ("accepted", "refused", "skipped")
) -> None:
    """Runs the cases that the command line names, and prints those that are wrong and the counts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case; with --cases 1 it runs alone")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(options.seed, options.seed + options.cases):
        outcome = run_case(seed)
        expected = outcome in right
        counts[outcome if expected else "wrong"] += 1
        if not expected:
            sys.stdout.write(f"case {seed}: {outcome}\n")
    sys.stdout.write(f"{dict(counts)} in {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main(__doc__, run_case)
