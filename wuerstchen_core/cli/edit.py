"""`reconstruct`, `variations`, `inpaint`, `outpaint` and `interpolate`: what a model makes of pictures."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Job, add_count, add_options, run, seeds
from .save import ENDINGS

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.pipeline import WuerstchenPipeline

OWN_SIZE = "the legal size nearest to the picture's"
READ = (*ENDINGS, ".gif", ".bmp", ".tif", ".tiff", ".avif")  # an argument that ends so is no prompt
SIDES = ("left", "top", "right", "bottom")


def add(commands: Any) -> None:
    """Add the commands to a parser's commands."""
    _reconstruct(commands)
    _variations(commands)
    _inpaint(commands)
    _outpaint(commands)
    _interpolate(commands)


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command that takes a picture."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.set_defaults(run=_run)
    parser.add_argument("image", metavar="IMAGE")
    return parser


def _reconstruct(commands: Any) -> None:
    parser = _command(commands, "reconstruct", "send a picture through the 42.67x bottleneck and back")
    parser.add_argument("--prompt", default="", help="what Stage B reads beside the picture's features")
    add_options(parser, size=OWN_SIZE, prior=False, name="the picture's")
    add_count(parser)


def _variations(commands: Any) -> None:
    parser = _command(commands, "variations", "paint pictures like a picture, or change it by a prompt")
    parser.add_argument("--prompt", default="", help="what to paint (default: whatever the picture shows)")
    _strength(parser, 0.7)
    add_options(parser, size=OWN_SIZE, name="the picture's")
    add_count(parser)


def _inpaint(commands: Any) -> None:
    parser = _command(commands, "inpaint", "paint a part of a picture anew")
    parser.add_argument("mask", metavar="MASK", help="a picture of the same size: white is painted, black is kept")
    parser.add_argument("prompt", metavar="PROMPT", help="what to paint there")
    _over(parser)


def _outpaint(commands: Any) -> None:
    parser = _command(commands, "outpaint", "paint a picture on, beyond its borders")
    parser.add_argument("prompt", metavar="PROMPT", help="what the larger picture shows")
    for side in SIDES:
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help=f"to add at the {side}")
    _over(parser)


def _over(parser: argparse.ArgumentParser) -> None:
    _strength(parser, 1.0)
    text = "keep what is not masked as Stage B remembers it, not as it was"
    parser.add_argument("--no-composite", dest="composite", action="store_false", help=text)
    add_options(parser, size=None, name="the picture's")
    add_count(parser)


def _strength(parser: argparse.ArgumentParser, default: float) -> None:
    text = f"from 0, the picture as it is, to 1, a new one (default: {default})"
    parser.add_argument("--strength", type=float, default=default, help=text)


def _interpolate(commands: Any) -> None:
    parser = commands.add_parser("interpolate", help="paint the way from one picture or prompt to another")
    parser.set_defaults(run=_run_interpolate)
    for name in ("A", "B"):
        text = f"a prompt, or the file of a picture ({', '.join(READ)})"
        parser.add_argument(name.lower(), metavar=name, help=text)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="pictures, both ends included (default: 5)")
    add_options(parser, size="the first picture's, else the model's own", name="the two ends'")


def _run(options: argparse.Namespace) -> None:
    """One of the commands that take a picture: the pipeline's method has the same name and arguments."""
    from ..inference.images import open_mask, open_picture

    names = ("prompt", "strength", "composite", "negative", *SIDES)
    plain = {name: getattr(options, name) for name in names if hasattr(options, name)}
    pictures = {"image": open_picture(options.image)}  # before the model is loaded
    if hasattr(options, "mask"):
        pictures["mask"] = open_mask(options.mask)
    made = {"command": options.command, **{name: Path(getattr(options, name)).name for name in pictures}, **plain}

    def paint(pipeline: WuerstchenPipeline, seed: int, **told: Any) -> list[Image.Image]:
        images: list[Image.Image] = getattr(pipeline, options.command)(seed=seed, **pictures, **plain, **told)
        return images

    title = f"{Path(options.image).stem} {options.command}"
    run(options, title, [Job(seed, partial(paint, seed=seed), made) for seed in seeds(options)])


def _run_interpolate(options: argparse.Namespace) -> None:
    a, b = _end(options.a), _end(options.b)
    plain: dict[str, Any] = {"negative": options.negative, "steps": options.steps}

    def paint(pipeline: WuerstchenPipeline, **told: Any) -> list[Image.Image]:
        return pipeline.interpolate(a, b, seed=options.seed, **plain, **told)

    made = {"command": options.command, "a": _shown(options.a), "b": _shown(options.b), **plain}
    title = " to ".join(Path(_shown(end)).stem if _is_file(end) else end for end in (options.a, options.b))
    run(options, title, [Job(options.seed, paint, made)], options.steps)


def _is_file(argument: str) -> bool:
    return Path(argument).suffix.lower() in READ


def _shown(argument: str) -> str:
    return Path(argument).name if _is_file(argument) else argument


def _end(argument: str) -> str | Image.Image:
    """A prompt, or the picture in a file."""
    from ..inference.images import open_picture

    return open_picture(argument) if _is_file(argument) else argument
