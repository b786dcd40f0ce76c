"""`reconstruct`, `variations`, `inpaint`, `outpaint` and `interpolate`: the commands that read images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_control, add_options, run_command

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = "the legal size nearest to the image's"
IMAGE_NAME = "the image"
MASK_HELP = "image file of the same size: its transparent part is replaced, or its white part if all of it is opaque"
SIDES = ("left", "top", "right", "bottom")


def add(commands: Any) -> None:
    """Adds the commands to the parser's commands."""
    parser = _add_command(commands, "reconstruct", "compress an image by 42.67 and decode it")
    parser.add_argument("--prompt", default="", help="text that Stage B reads in addition to the image")
    add_options(parser, size=IMAGE_SIZE, prior=False, name=IMAGE_NAME)

    parser = _add_command(commands, "variations", "generate images similar to an image, or change it by a prompt", 0.7)
    parser.add_argument("--prompt", default="", help="what to generate (default: only the image counts)")
    add_options(parser, size=IMAGE_SIZE, name=IMAGE_NAME)
    add_control(parser)

    parser = _add_command(commands, "inpaint", "replace a part of an image", 1.0)
    parser.add_argument("mask", metavar="MASK", help=MASK_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="what to generate there")
    _add_fill_options(parser)

    parser = _add_command(commands, "outpaint", "extend an image beyond its borders", 1.0)
    parser.add_argument("prompt", metavar="PROMPT", help="what the larger image shows")
    for side in SIDES:
        text = f"pixels to add at the {side} (default: 0)"
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help=text)
    _add_fill_options(parser)

    parser = commands.add_parser("interpolate", help="generate images between two images or prompts")
    parser.set_defaults(run=_interpolate)
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="prompt, or image file (by its suffix)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="number of images (default: 5)")
    add_options(parser, name="both ends", size="the first image's, else the model's own", count=False)


def _add_command(commands: Any, name: str, text: str, strength: float | None = None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.set_defaults(run=_edit)
    parser.add_argument("image", metavar="IMAGE", help="the image file")
    if strength is not None:
        text = f"how much to change, from 0 (nothing) to 1 (the original is ignored; default: {strength})"
        parser.add_argument("--strength", type=float, default=strength, help=text)
    return parser


def _add_fill_options(parser: argparse.ArgumentParser) -> None:
    text = "save the decoded image without copying the original's unmasked pixels over it"
    parser.add_argument("--no-composite", dest="composite", action="store_false", help=text)
    add_options(parser, size=None, name=IMAGE_NAME)
    add_control(parser)


def _edit(options: argparse.Namespace) -> None:
    """Runs a command with an IMAGE argument; its options are named like the parameters of the pipeline's method."""
    from ..inference.images import open_mask, open_picture, read_masked

    names = ("prompt", "strength", "composite", "negative", *SIDES)
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    images = {"image": open_picture(options.image)}  # errors before the model is loaded
    if hasattr(options, "mask"):
        mask = open_mask(options.mask)
        read_masked(images["image"], mask.image)  # checks their sizes
        part = "the transparent part (its alpha)" if mask.source == "alpha" else "the white part (its luminance)"
        sys.stderr.write(f"mask: {part}, {mask.fraction:.1%} of the picture, is replaced\n")
        images["mask"] = mask.image
    files = {name: Path(getattr(options, name)).name for name in images}
    for name, image in images.items():
        image.filename = files[name]  # type: ignore[attr-defined] # for the metadata of the results
    title = f"{Path(options.image).stem} {options.command}"
    run_command(options, title, {**images, **values}, {"command": options.command, **files, **values})


def _interpolate(options: argparse.Namespace) -> None:
    values = {"negative": options.negative, "steps": options.steps}
    texts = {"a": options.a, "b": options.b}
    ends = {name: _read_end(text) for name, text in texts.items()}
    labels = {name: Path(text).name if _is_image(text) else text for name, text in texts.items()}
    title = " to ".join(Path(label).stem if _is_image(label) else label for label in labels.values())
    run_command(options, title, {**ends, **values}, {"command": options.command, **labels, **values})


def _is_image(argument: str) -> bool:
    from ..inference.image_files import image_suffixes

    return Path(argument).suffix.lower() in image_suffixes()


def _read_end(argument: str) -> str | Image.Image:
    """Returns the image, if the argument names an image file, otherwise the prompt."""
    from ..inference.images import open_picture

    if not _is_image(argument):
        return argument
    image = open_picture(argument)
    image.filename = Path(argument).name  # type: ignore[attr-defined] # for the metadata of the results
    return image
