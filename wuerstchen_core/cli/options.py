"""What the commands that paint share: their options, and the way from the model to files."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import Progress
from .save import check_output, output_path, save_picture

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.pipeline import WuerstchenPipeline

SIZE = ("width", "height")
PRIOR = ("schedule", "sampler", "prior_steps", "prior_guidance")
DECODER = ("decoder_steps", "decoder_guidance", "decoder_guidance_end", "temperature", "token_mode")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PIECES, PIECE = 64, 4096  # pieces of a file that its fingerprint is made of, and bytes of each
SMALLER = "choose a smaller --width and --height, --dtype bf16, or --device cpu"


@dataclass(frozen=True)
class Job:
    """What is painted at a time: pictures of one seed. `made` is what their PNG text says beside the numbers."""

    seed: int
    paint: Callable[..., list[Image.Image]]  # called with the pipeline, a callback, and the numbers
    made: Mapping[str, Any]


class Choices:
    """The names in a registry, imported when argparse reads them: torch comes along, and --help should be quick."""

    def __init__(self, module: str, registry: str, *more: str) -> None:
        self._module, self._registry, self._more = module, registry, more

    def __iter__(self) -> Iterator[str]:
        return iter([*self._more, *getattr(import_module(self._module, __package__), self._registry)])


def add_options(parser: argparse.ArgumentParser, *, size: str | None, prior: bool = True, name: str) -> None:
    """The options of a command that paints; `size` and `name` say where its size and its file's name come from."""
    parser.set_defaults(requirements="requirements.txt", smaller=SMALLER if size else "choose a smaller picture")
    option = parser.add_argument
    option("--output", type=Path, help=f"file or folder to write to (default: a name made of {name})")
    option("--model", default="demo", help="bundle file or diffusers folder (default: the small model that ships)")
    option("--version", default="auto", choices=("auto", "v1", "v2"), help="whose a prior is that may be either's")
    option("--seed", type=int, default=0, help="same seed, same picture (default: 0)")
    if size:
        option("--width", type=int, help=f"in pixels, a multiple of 64 up to 2048 (default: {size})")
        option("--height", type=int)
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu or mps (default: auto)")
    dtypes = Choices("..common.devices", "DTYPES", "auto")
    option("--dtype", default="auto", metavar="NAME", choices=dtypes, help="%(choices)s (default: auto)")
    text = "let torch compile Stages C and B, where it can: a minute more at first, slower on a CPU, untried on a GPU"
    option("--compile", action="store_true", help=text)
    if prior:
        option("--negative", default="", metavar="PROMPT", help="what to stay away from")
        text = "a LoRA of Stage C, and how much of it (default: 1); can be given several times"
        option("--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]", help=text)
        text = "of Stage C (default: the model's own); fast, with few steps of both stages, suits the shipped model"
        schedules, samplers = Choices("..diffusion.schedule", "SCHEDULES"), Choices("..diffusion.samplers", "SAMPLERS")
        option("--schedule", metavar="NAME", choices=schedules, help=f"{text}: %(choices)s")
        text = "of Stage C (default: the schedule's own): %(choices)s"
        option("--sampler", metavar="NAME", choices=samplers, help=text)
        option("--prior-steps", type=int, metavar="N", help="steps of Stage C, linear unless --schedule says otherwise")
        option("--prior-guidance", type=float, metavar="SCALE", help="how closely Stage C follows the prompt; 1: none")
    option("--decoder-steps", type=int, metavar="N", help="steps of Stage B")
    option("--decoder-guidance", type=float, metavar="SCALE", help="guidance of Stage B; 1: none")
    option("--decoder-guidance-end", type=float, metavar="SCALE", help="what it reaches at the last step")
    option("--temperature", type=float, nargs=2, metavar=("FIRST", "LAST"), help="of v1's tokens, at either step")
    text = "how v1's Stage B chooses a token: %(choices)s"
    option("--token-mode", metavar="MODE", choices=Choices("..diffusion.token_sampler", "MODES"), help=text)
    option("--json", action="store_true", help="print files, seeds and seconds as JSON")


def add_count(parser: argparse.ArgumentParser) -> None:
    """The option --count."""
    text = "number of pictures, with the seeds SEED, SEED + 1, ... (default: 1)"
    parser.add_argument("--count", type=int, default=1, help=text)


def run(options: argparse.Namespace, title: str, jobs: Sequence[Job], pictures: int | None = None) -> None:
    """Load the model, do the jobs, write the pictures and say where they are; `title` names them if nobody else does.

    `pictures` is how many come of all the jobs, if not one of each.
    """
    numbers = numbers_of(options)
    size = {name: getattr(options, name) for name in SIZE if hasattr(options, name)}
    check_output(options.output)
    started = time.perf_counter()
    pipeline, models = load(options)
    report: dict[str, Any] = {**jobs[0].made, "device": str(pipeline.device), "images": []}
    sampling = pipeline.sampling.changed(**numbers).numbers()
    report["load_seconds"] = round(time.perf_counter() - started, 3)
    for i, job in enumerate(jobs):
        progress = Progress(f"picture {i + 1} of {len(jobs)}: " if len(jobs) > 1 else "")
        try:
            images = job.paint(pipeline, callback=progress, **size, **numbers)
        finally:
            progress.clear()
        for image in images:
            number = len(report["images"]) if (pictures or len(jobs)) > 1 else None
            path = output_path(options.output, title, number)
            made = {**job.made, "seed": job.seed, **models, **_told(sampling, image)}
            save_picture(image, path, made)
            report["images"].append({"path": str(path), "seed": job.seed, "seconds": progress.seconds})
            if not options.json:
                sys.stdout.write(f"{path}\n")
    if options.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")


def numbers_of(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of sampling that the options give, by the pipeline's names."""
    numbers = {name: getattr(options, name) for name in (*PRIOR, *DECODER) if hasattr(options, name)}
    if numbers["temperature"] is not None:
        numbers["temperature"] = tuple(numbers["temperature"])
    return numbers


def load(options: argparse.Namespace) -> tuple[WuerstchenPipeline, dict[str, Any]]:
    """The model that the options name, and what the text of a picture says of it."""
    from ..inference.pipeline import WuerstchenPipeline

    told = {name: getattr(options, name) for name in ("device", "dtype", "version", "compile")}
    loras: dict[str | PathLike[str], float] = dict(getattr(options, "lora", ()))
    pipeline = WuerstchenPipeline.load(options.model, lora=loras, **told)
    models: dict[str, Any] = {"model": Path(options.model).name, "weights": fingerprint(options.model)}
    if loras:
        models["loras"] = [
            {"file": Path(file).name, "weights": fingerprint(file), "strength": strength}
            for file, strength in loras.items()
        ]
    return pipeline, models


def fingerprint(source: str | PathLike[str]) -> str:
    """Twelve digits that tell weights apart: of their files' sizes and of pieces spread over them, since all of a model
    takes seconds to read."""
    from ..checkpoints.open import source_path

    path, digest = source_path(source), hashlib.sha256()
    files = [file for file in path.rglob("*") if file.suffix in WEIGHTS] if path.is_dir() else [path]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as content:
            for piece in range(PIECES):
                content.seek(size * piece // PIECES)
                digest.update(content.read(PIECE))
    return digest.hexdigest()[:12]


def _lora(text: str) -> tuple[str, float]:
    """A file and its strength out of FILE or FILE:STRENGTH; a drive's colon is a part of the file."""
    file, _, strength = text.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:
        return text, 1.0


def _told(sampling: Mapping[str, Any], image: Image.Image) -> dict[str, Any]:
    """The numbers that a picture was painted with."""
    told = {**sampling, "width": image.width, "height": image.height}
    return {name: value for name, value in told.items() if value is not None}


def seeds(options: argparse.Namespace) -> range:
    """The seeds of --count pictures; raises ValueError where there are none."""
    from ..inference.settings import check_count

    check_count(options.count, options.seed)
    return range(options.seed, options.seed + options.count)
