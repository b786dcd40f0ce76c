"""Compares ComfyUI's images with the core's, with the images of the workflows, and with prompts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tools.comfyui.client import Outcome
from tools.comfyui.graphs import picture_file
from tools.comfyui.workflow_pictures import in_rows
from tools.demo.judge import Judge
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene

LIMIT = 0.01  # of 255, largest mean deviation beyond rounding; observed below 0.00005
JPEG = 4.0  # of 255, largest mean change by JPEG compression; another image differs by 10 or more
LARGE = 0  # index of a size


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def deviation(comfyui: Image.Image, core: Image.Image) -> float:
    """Returns the mean deviation of 255 between two images. ComfyUI truncates colours, the core rounds them."""
    truncated, rounded = (pixels(image).astype(np.float32) for image in (comfyui, core))
    assert truncated.shape == rounded.shape
    difference = rounded - truncated  # 0 or 1 if the colours are equal
    return float(np.maximum(np.maximum(difference - 1, -difference), 0).mean())


def difference(a: Image.Image, b: Image.Image) -> float:
    """Returns the mean absolute difference of two images, of 255."""
    return float(np.abs(pixels(a).astype(np.float32) - pixels(b)).mean())


def content(judge: Judge, image: Image.Image) -> tuple[str, str]:
    """Returns the large thing and the background colour that an image shows."""
    array = pixels(image)
    colour = judge.background(array)
    assert colour >= 0, "unknown background"
    thing = judge.identify(array, Scene(0, colour, LARGE)).thing
    return THINGS[thing].name if thing >= 0 else "nothing", list(COLOURS)[colour]


def check_image(name: str, outcome: Outcome) -> None:
    """Asserts that a workflow generates the image next to its file."""
    shipped, generated = Image.open(picture_file(name)), in_rows(outcome.pictures)
    assert shipped.size == generated.size
    assert difference(shipped, generated) < JPEG, f"{picture_file(name).name} is out of date"
