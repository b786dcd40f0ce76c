"""The options that the commands share, and how they load a model, generate images and save them."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import StepBar
from .save import check_output, save_output

if TYPE_CHECKING:
    from ..inference.control import Hint
    from ..inference.pipeline import WuerstchenPipeline

MEMORY_HINT = "choose --low-memory, a smaller --width and --height, --dtype bf16, or --device cpu"
PART_OPTIONS = (
    "prior",
    "decoder",
    "token_decoder",
    "vqgan",
    "image_encoder",
    "text_encoder",
    "prior_text_encoder",
    "decoder_text_encoder",
)
VERSION_HELP = "release of the prior, if its file could be of both (default: auto)"


def import_torch_with(module: str) -> Any:
    """Imports a module of this package that imports torch, without garbage collection, which would find nothing there.

    Later collections skip what exists by then: `generate` with the demo takes 0.78 of the processor time.
    """
    if "torch" in sys.modules:
        return import_module(module, __package__)
    gc.disable()
    try:
        return import_module(module, __package__)
    finally:
        gc.enable()
        gc.freeze()


class Choices:
    """The names in a registry. They are imported when argparse needs them: importing torch would delay other --help."""

    def __init__(self, module: str, registry: str, *more: str) -> None:
        self._module, self._registry, self._more = module, registry, more

    def __iter__(self) -> Iterator[str]:
        return iter([*self._more, *getattr(import_torch_with(self._module), self._registry)])


def add_options(
    parser: argparse.ArgumentParser, *, name: str, size: str | None, count: bool = True, prior: bool = True
) -> None:
    """Adds the options of a command that generates images.

    `name` says what the default file is named after, `size` describes the default size (None: no size options).
    `count` adds --count, `prior` the options of Stage C.
    """
    parser.set_defaults(memory_hint=MEMORY_HINT if size else "choose a smaller image")
    option = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    pixels: dict[str, Any] = {"type": int, "metavar": "PIXELS"}
    scale: dict[str, Any] = {"type": float, "metavar": "SCALE"}
    option("--output", type=Path, help=f"file or folder to write to (default: a PNG file named after {name})")
    option("--model", default="demo", help='bundle, diffusers folder, "demo" or "demo-v1" (default: demo)')
    option("--version", default="auto", choices=("auto", "v1", "v2"), help=VERSION_HELP)
    option("--seed", **number, default=0, help="random seed; equal seeds give equal images (default: 0)")
    if count:
        option("--count", **number, default=1, help="number of images; each has the next seed (default: 1)")
    if size:
        option("--width", **pixels, help=f"width of the image, a multiple of 64 up to 2048 (default: {size})")
        option("--height", **pixels, help="height of the image, likewise")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu or mps (default: auto)")
    dtypes = Choices("..common.devices", "NETWORK_DTYPES", "auto")
    option("--dtype", default="auto", metavar="NAME", choices=dtypes, help="precision: %(choices)s (default: auto)")
    text = "run Stages C and B with torch.compile; the first image takes a minute longer (slower on a CPU)"
    option("--compile", action="store_true", help=text)
    text = "read each network when it is used, and release it before the next one is read"
    option("--low-memory", action="store_true", help=text)
    if prior:
        option("--negative", default="", metavar="PROMPT", help="what the image should not show")
        text = "apply a LoRA to the stage that it fits, with a strength (default: 1); repeatable"
        option("--lora", type=with_strength, action="append", default=[], metavar="FILE[:STRENGTH]", help=text)
        text = "file or folder of textual inversions, for embedding:NAME in prompts; repeatable"
        option("--embedding", type=Path, action="append", default=[], metavar="FILE", help=text)
    text = "leave out of the images how they were made (prompt, settings, ComfyUI workflow)"
    option("--no-metadata", dest="metadata", action="store_false", help=text)
    option("--json", action="store_true", help="print paths, seeds and seconds as JSON")

    option = parser.add_argument_group("components", "Files or folders whose parts replace the model's.").add_argument
    for name in PART_OPTIONS:
        option(f"--{name.replace('_', '-')}", metavar="FILE", help=f"the {name.replace('_', ' ')}")

    option = parser.add_argument_group("settings", "Defaults come from the model.").add_argument
    if prior:
        schedules, samplers = Choices("..diffusion.schedule", "SCHEDULES"), Choices("..diffusion.samplers", "SAMPLERS")
        text = "schedule of Stage C: %(choices)s; fast takes few steps in Stages C and B"
        option("--schedule", metavar="NAME", choices=schedules, help=text)
        text = "sampler of Stage C: %(choices)s (default: the schedule's)"
        option("--sampler", metavar="NAME", choices=samplers, help=text)
        option("--prior-steps", **number, help="steps of Stage C; schedules of a fixed number become linear")
        option("--prior-guidance", **scale, help="guidance scale of Stage C; 1: no guidance")
    option("--decoder-steps", **number, help="steps of Stage B")
    option("--decoder-guidance", **scale, help="guidance scale of Stage B; 1: no guidance")
    option("--decoder-guidance-end", **scale, help="guidance scale of Stage B at its last step, reached linearly")
    text = "compute one in N steps of Stage B in full, the others with its deep features; 1: all in full (default: 1)"
    option("--reuse", dest="decoder_reuse", **number, help=text)
    text = "v1 only: sampling temperatures of Stage B at its first and last step"
    option("--temperature", type=float, nargs=2, metavar=("FIRST", "LAST"), help=text)
    modes = Choices("..diffusion.token_sampler", "MODES")
    option("--token-mode", metavar="MODE", choices=modes, help="v1 only: how Stage B chooses tokens: %(choices)s")


def add_control(parser: argparse.ArgumentParser) -> None:
    """Adds --control, for commands that run Stage C."""
    text = "steer Stage C by a picture, such as an outline, with a ControlNet; repeatable"
    parser.add_argument("--control", nargs=2, action="append", metavar=("NET", "PICTURE[:STRENGTH]"), help=text)


def read_control(control: Iterable[Any] | None) -> list[Hint]:
    """Returns the hints of --control, whose files are read now, so that errors come before the model is loaded."""
    from ..inference.control import Hint

    hints = [x if isinstance(x, Hint) else Hint(x[0], *with_strength(x[1])) for x in control or ()]
    return [hint.read() for hint in hints]


def run_command(options: argparse.Namespace, title: str, arguments: dict[str, Any], request: dict[str, Any]) -> None:
    """Loads the model, calls the pipeline's method with the command's name once per seed, and saves the images.

    `arguments` are passed to the method along with the settings and the hints of --control. Prints the paths, or a
    report with --json. `title` gives the default file name. `request` is the command's part of the report.
    """
    import_torch_with("..inference.pipeline")
    from ..inference.settings import check_count

    count = getattr(options, "count", 1)
    check_count(count, options.seed)
    check_output(options.output)
    changes = chosen_settings(options)
    if hasattr(options, "control"):
        arguments["control"] = read_control(options.control)
    started = time.perf_counter()
    pipeline = load_pipeline(options)
    pipeline.sampling.updated(**changes)  # raises ValueError for wrong settings
    saved: list[dict[str, Any]] = []
    report = {**request, "device": str(pipeline.device), "images": saved}
    report["load_seconds"] = round(time.perf_counter() - started, 3)
    for i in range(count):
        seed, method = options.seed + i, getattr(pipeline, options.command)
        with StepBar(f"image {i + 1} of {count}: " if count > 1 else "") as callback:
            images = method(seed=seed, callback=callback, **arguments, **changes)
        for image in images:
            number = len(saved) if count * len(images) > 1 else None
            path = save_output(image, options.output, title, number, options.metadata)
            saved.append({"path": str(path), "seed": seed, "seconds": callback.seconds})
            if not options.json:
                sys.stdout.write(f"{path}\n")
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")


def chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of size and sampling as keyword arguments of the pipeline; None where they are not given."""
    from ..inference.settings import SamplingOptions

    names = ("width", "height", *SamplingOptions.__annotations__)
    settings = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if settings["temperature"] is not None:
        settings["temperature"] = tuple(settings["temperature"])
    return settings


def load_pipeline(options: argparse.Namespace) -> WuerstchenPipeline:
    """Returns the pipeline that the options select."""
    from ..inference.pipeline import WuerstchenPipeline

    kwargs = {name: getattr(options, name) for name in ("device", "dtype", "version", "compile", "low_memory")}
    parts: dict[str, Any] = {name: file for name in PART_OPTIONS if (file := getattr(options, name)) is not None}
    loras: dict[str | PathLike[str], float] = dict(getattr(options, "lora", ()))
    pipeline = WuerstchenPipeline.load(options.model, lora=loras, progress=False, **kwargs, **parts)
    if files := getattr(options, "embedding", []):
        pipeline.load_embeddings(files)
    return pipeline


def with_strength(text: str) -> tuple[str, float]:
    """Parses FILE or FILE:STRENGTH; the colon of a Windows drive belongs to the file."""
    file, _, strength = text.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:
        return text, 1.0
