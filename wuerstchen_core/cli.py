"""The command line: `python -m wuerstchen_core {generate,inspect,train}`. A failure is one line and exit code 2."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# torch is imported where a command needs it, so that --help and mistakes answer at once.

STAGES = ("text", "encoder", "vqgan", "decoder", "prior")
METADATA_KEY = "wuerstchen"  # of the PNG text that says how a picture was made
FAILURE, INTERRUPTED = 2, 130
SLUG_LENGTH = 60
BAR = 30  # characters of the progress bar
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(FAILURE, f"{message}; `{self.prog} --help` shows what can be given\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if options.command == "train":
        logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left half-written", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __package__):
            raise
        return _fail(f"{package} is not installed: python -m pip install -r {options.requirements}")
    except (ValueError, OSError) as error:
        return _fail(_one_line(error))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"not enough memory: {options.smaller}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m wuerstchen_core", description="Würstchen: text to image in three stages.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="paint a picture of a prompt")
    smaller = "choose a smaller --width and --height, --dtype bf16, or --device cpu"
    generate.set_defaults(run=_generate, requirements="requirements.txt", smaller=smaller)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help='what to paint, such as "a red apple on a blue background"')
    add("--output", type=Path, help="file or folder to write to (default: a name made of the prompt, in this folder)")
    add("--model", default="demo", help="bundle file or diffusers folder (default: the small model that ships)")
    add("--negative", default="", metavar="PROMPT", help="what to stay away from")
    add("--seed", type=int, default=0, help="same seed, same picture (default: 0)")
    add("--count", type=int, default=1, help="number of pictures, with the seeds SEED, SEED + 1, ... (default: 1)")
    add("--width", type=int, help="in pixels, a multiple of 64 up to 2048 (default: the model's own)")
    add("--height", type=int)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    add("--schedule", choices=("original", "diffusers", "linear"), help="of Stage C (default: the model's own)")
    add("--prior-steps", type=int, metavar="N", help="steps of Stage C, linear unless --schedule says otherwise")
    add("--prior-guidance", type=float, metavar="SCALE", help="how closely Stage C follows the prompt; 1: no guidance")
    add("--decoder-steps", type=int, metavar="N", help="steps of Stage B")
    add("--decoder-guidance", type=float, metavar="SCALE", help="guidance of Stage B; 1: none")
    add("--json", action="store_true", help="print files, seeds and seconds as JSON")

    inspect = commands.add_parser("inspect", help="say what a weight file holds")
    inspect.set_defaults(run=_inspect, requirements="requirements.txt", smaller="close other programs")
    inspect.add_argument("file", metavar="FILE", help='weight file, diffusers folder, or "demo"')
    inspect.add_argument("--json", action="store_true")

    train = commands.add_parser("train", help="train one stage")
    smaller = "choose a smaller batch, such as --set train.batch=8"
    train.set_defaults(run=_train, requirements="requirements-train.txt", smaller=smaller)
    train.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    train.add_argument("--config", type=Path, required=True, metavar="FILE.toml")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the file")
    return parser


def _generate(options: argparse.Namespace) -> None:
    names = ("width", "height", "schedule", "prior_steps", "prior_guidance", "decoder_steps", "decoder_guidance")
    chosen = {name: getattr(options, name) for name in names}
    check_output(options.output)
    started = time.perf_counter()
    from .pipeline import WuerstchenPipeline
    from .sampling import check_count

    check_count(options.count, options.seed)
    pipeline = WuerstchenPipeline.load(options.model, device=options.device, dtype=options.dtype)
    report: dict[str, Any] = {"prompt": options.prompt, "device": str(pipeline.device), "images": []}
    report["load_seconds"] = round(time.perf_counter() - started, 3)
    for i in range(options.count):
        path = output_path(options.output, options.prompt, i if options.count > 1 else None)
        seed = options.seed + i
        progress = Progress(f"picture {i + 1} of {options.count}: " if options.count > 1 else "")
        try:
            [image] = pipeline.generate(
                options.prompt, negative=options.negative, seed=seed, callback=progress, **chosen
            )
        finally:
            progress.clear()
        made = {"prompt": options.prompt, "negative": options.negative, "seed": seed, "model": Path(options.model).name}
        save_picture(image, path, made | asdict(pipeline.sampling.changed(**chosen)))
        report["images"].append({"path": str(path), "seed": seed, "seconds": progress.seconds})
        if not options.json:
            sys.stdout.write(f"{path}\n")
    if options.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoints.inspect import describe

    description = describe(options.file)
    text = json.dumps(description.as_dict(), ensure_ascii=False) if options.json else "\n".join(description.lines())
    sys.stdout.write(f"{text}\n")


def _train(options: argparse.Namespace) -> None:
    from .training.run import run

    run(options.stage, options.config, options.set)


class Progress:
    """The pipeline's callback: seconds by stage, and a line on stderr that counts steps if that is a terminal."""

    def __init__(self, label: str = ""):
        self.seconds: dict[str, float] = {}
        self._label = label
        self._last = time.perf_counter()
        self._shown = sys.stderr.isatty()

    def __call__(self, stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
        if self._shown:
            bar = "#" * (BAR * done // steps)
            self._write(f"{self._label}{stage:8}[{bar:{BAR}}] {done}/{steps}")

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._write("")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def slug(prompt: str) -> str:
    """A file name, without ending, made of a prompt's letters and digits."""
    words = re.sub(r"[\W_]+", "-", prompt.casefold()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or "picture"


def check_output(output: Path | None) -> None:
    """Raise ValueError unless pictures can be written to `output`."""
    if output is None or output.is_dir():
        return
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} does not exist: create it, or give another --output")
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"{output} names no kind of picture: let it end in one of {', '.join(ENDINGS)}")


def output_path(output: Path | None, prompt: str, number: int | None) -> Path:
    """Where a picture goes; `number` counts pictures of one run. Only a file that was named is ever overwritten."""
    if output is not None and not output.is_dir():
        return output if number is None else output.with_stem(f"{output.stem}-{number + 1}")
    folder, stem = output or Path(), slug(prompt)
    names = (f"{stem}{f'-{i}' if i > 1 else ''}.png" for i in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def save_picture(image: Image.Image, path: Path, made: dict[str, Any]) -> None:
    """Write a picture, complete or not at all; a PNG carries as text how it was `made`."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(made, ensure_ascii=False))
    draft = path.with_name(f".{os.getpid()}.part{path.suffix}")
    try:
        image.save(draft, pnginfo=text, quality=95)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _fail(message: str, code: int = FAILURE) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error)
