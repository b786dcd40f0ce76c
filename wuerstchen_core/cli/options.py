"""Options shared by the commands that generate images, and the way from these options to saved images."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import StepBar
from .save import check_output, image_metadata, output_path, save_image

if TYPE_CHECKING:
    from ..inference.pipeline import WuerstchenPipeline

SIZE = ("width", "height")
SAMPLING = (
    "schedule", "sampler", "prior_steps", "prior_guidance", "decoder_steps", "decoder_guidance",
    "decoder_guidance_end", "temperature", "token_mode",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
CHUNKS, CHUNK_BYTES = 64, 4096  # read of each file for its fingerprint
MEMORY_HINT = "choose a smaller --width and --height, --dtype bf16, or --device cpu"
VERSION_HELP = "release of a prior that could be v1 or v2 (default: auto)"


class Choices:
    """The names in a registry, imported when argparse reads them: torch comes along, and --help should be quick."""

    def __init__(self, module: str, registry: str, *more: str) -> None:
        self._module, self._registry, self._more = module, registry, more

    def __iter__(self) -> Iterator[str]:
        return iter([*self._more, *getattr(import_module(self._module, __package__), self._registry)])


def add_options(
    parser: argparse.ArgumentParser, *, name: str, size: str | None, count: bool = True, prior: bool = True
) -> None:
    """Adds the options of a command that generates images.

    `name` says what the default file is named after, `size` describes the default size (None: no size options).
    `count` adds --count, `prior` the options of Stage C.
    """
    parser.set_defaults(memory_hint=MEMORY_HINT if size else "choose a smaller image")
    option = parser.add_argument
    option("--output", type=Path, help=f"file or folder to write to (default: named after {name})")
    option("--model", default="demo", help="bundle file or diffusers folder (default: the small model that ships)")
    option("--version", default="auto", choices=("auto", "v1", "v2"), help=VERSION_HELP)
    option("--seed", type=int, default=0, help="same seed, same image (default: 0)")
    if count:
        option("--count", type=int, default=1, help="number of images, with the seeds SEED, SEED + 1, ... (default: 1)")
    if size:
        option("--width", type=int, help=f"in pixels, a multiple of 64 up to 2048 (default: {size})")
        option("--height", type=int, help="in pixels, likewise")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu or mps (default: auto)")
    dtypes = Choices("..common.devices", "DTYPES", "auto")
    option("--dtype", default="auto", metavar="NAME", choices=dtypes, help="%(choices)s (default: auto)")
    text = "use torch.compile for Stages C and B: the first image takes a minute longer; slower on a CPU"
    option("--compile", action="store_true", help=text)
    if prior:
        option("--negative", default="", metavar="PROMPT", help="what the image should not show")
        text = "a LoRA for Stage C and its strength (default: 1); repeatable"
        option("--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]", help=text)
        schedules, samplers = Choices("..diffusion.schedule", "SCHEDULES"), Choices("..diffusion.samplers", "SAMPLERS")
        text = "of Stage C: %(choices)s (default: the model's; fast takes few steps in both stages)"
        option("--schedule", metavar="NAME", choices=schedules, help=text)
        option("--sampler", metavar="NAME", choices=samplers, help="of Stage C: %(choices)s (default: the schedule's)")
        option("--prior-steps", type=int, metavar="N", help="steps of Stage C (linear schedule, unless --schedule)")
        option("--prior-guidance", type=float, metavar="SCALE", help="guidance scale of Stage C; 1: none")
    option("--decoder-steps", type=int, metavar="N", help="steps of Stage B")
    option("--decoder-guidance", type=float, metavar="SCALE", help="guidance scale of Stage B; 1: none")
    option("--decoder-guidance-end", type=float, metavar="SCALE", help="scale at the last step (default: the same)")
    option("--temperature", type=float, nargs=2, metavar=("FIRST", "LAST"), help="v1: at the first and last step")
    text = "v1: how Stage B chooses tokens: %(choices)s"
    option("--token-mode", metavar="MODE", choices=Choices("..diffusion.token_sampler", "MODES"), help=text)
    option("--json", action="store_true", help="print files, seeds and seconds as JSON")


def run_command(options: argparse.Namespace, title: str, arguments: dict[str, Any], request: dict[str, Any]) -> None:
    """Loads the model, calls its method of the command's name once per seed, saves the images and prints their paths.

    `arguments` go to the method beside the options of sampling. `title` is the default file name. `request` is the part
    of the images' metadata that differs between commands.
    """
    from ..inference.settings import check_count

    count = getattr(options, "count", 1)
    check_count(count, options.seed)
    check_output(options.output)
    size = {name: getattr(options, name) for name in SIZE if hasattr(options, name)}
    sampling = sampling_options(options)
    started = time.perf_counter()
    pipeline, models = load_pipeline(options)
    settings = pipeline.sampling.updated(**sampling).as_dict()
    saved: list[dict[str, Any]] = []
    report = {**request, "device": str(pipeline.device), "images": saved}
    report["load_seconds"] = round(time.perf_counter() - started, 3)
    for i in range(count):
        seed, method = options.seed + i, getattr(pipeline, options.command)
        with StepBar(f"image {i + 1} of {count}: " if count > 1 else "") as callback:
            images = method(seed=seed, callback=callback, **arguments, **size, **sampling)
        for image in images:
            path = output_path(options.output, title, len(saved) if count * len(images) > 1 else None)
            settings |= {"width": image.width, "height": image.height}
            save_image(image, path, image_metadata(request, seed, models, settings))
            saved.append({"path": str(path), "seed": seed, "seconds": callback.seconds})
            if not options.json:
                sys.stdout.write(f"{path}\n")
    if options.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of sampling by the pipeline's names; None where an option is not set."""
    sampling = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    if sampling["temperature"] is not None:
        sampling["temperature"] = tuple(sampling["temperature"])
    return sampling


def load_pipeline(options: argparse.Namespace) -> tuple[WuerstchenPipeline, dict[str, Any]]:
    """Returns the pipeline that the options name, and the metadata of its models for image files."""
    from ..inference.pipeline import WuerstchenPipeline

    kwargs = {name: getattr(options, name) for name in ("device", "dtype", "version", "compile")}
    loras: dict[str | PathLike[str], float] = dict(getattr(options, "lora", ()))
    pipeline = WuerstchenPipeline.load(options.model, lora=loras, **kwargs)
    models: dict[str, Any] = {"model": Path(options.model).name, "weights": fingerprint(options.model)}
    if loras:
        models["loras"] = [
            {"file": Path(file).name, "weights": fingerprint(file), "strength": strength}
            for file, strength in loras.items()
        ]
    return pipeline, models


def fingerprint(source: str | PathLike[str]) -> str:
    """Returns 12 hex digits that identify a model's weights.

    Hashes file sizes and 64 evenly spaced chunks of each file: reading a whole model takes seconds.
    """
    from ..checkpoints.open import source_path

    path, digest = source_path(source), hashlib.sha256()
    files = [file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES] if path.is_dir() else [path]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as content:
            for chunk in range(CHUNKS):
                content.seek(size * chunk // CHUNKS)
                digest.update(content.read(CHUNK_BYTES))
    return digest.hexdigest()[:12]


def _lora(text: str) -> tuple[str, float]:
    """Parses FILE or FILE:STRENGTH; the colon of a Windows drive belongs to the file."""
    file, _, strength = text.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:
        return text, 1.0
