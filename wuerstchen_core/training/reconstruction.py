"""Checks, before a run starts, that Stages A and B can show its pictures at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inference.images import to_pictures
from .rng import StepRandom
from .sample_grid import prompt_grid, write_grid
from .stage import Stage

log = logging.getLogger(__name__)

COUNT = 4  # pictures
FILE = "reconstruction.png"
# A stage should lose less than a thumbnail, whose sides are divided by this number. Measured on the shipped model, mean
# PSNR of four pictures of 256 pixels, of its drawings and of others: Stage A 30.6 and 18.4 dB, the thumbnails 27.7 and
# 19.2 dB; with Stage B 28.2 and 14.2 dB, the thumbnails 21.2 and 16.3 dB.
STAGE_A, STAGE_B = "Stage A", "Stages A and B"
THUMBNAILS = {STAGE_A: 8, STAGE_B: 32}
ENOUGH = {STAGE_A: 25.0, STAGE_B: 20.0}  # dB; of pictures with few details, thumbnails keep even more
ADVICE = {
    STAGE_A: "train Stage A on such pictures (`train vqgan`) first, or choose another base model",
    STAGE_B: "train a LoRA of Stage B on them too (`train new FOLDER --recipe decoder-lora`) and generate with both, "
    "or choose another base model",
}


def psnr(images: Tensor, others: Tensor) -> float:
    """Returns the mean over images [B, 3, H, W] in [0, 1] of the peak signal-to-noise ratio in dB."""
    errors = (images - others.clamp(0, 1)).square().flatten(1).mean(1)
    return float(-10 * errors.clamp(min=1e-10).log10().mean())


def thumbnails(images: Tensor, factor: int) -> Tensor:
    """Returns images with their sides divided by a number and enlarged again."""
    size = [max(1, side // factor) for side in images.shape[-2:]]
    return F.interpolate(F.interpolate(images, size, mode="area"), images.shape[-2:], mode="bicubic").clamp(0, 1)


@torch.no_grad()
def check_reconstruction(stage: Stage[Any], net: Any, folder: Path) -> None:
    """Logs the PSNR of a few pictures after Stage A and after Stages B and A, and writes them to reconstruction.png.

    Warns if a stage cannot show them. Does nothing if networks are missing. `net` is the stage's, on its device.
    """
    previews = stage.dataset.preview_images()
    if previews is None:
        return
    picked = previews.evenly_spaced(COUNT)
    images = previews.images(picked)
    rows = {name: x.float().cpu() for name, x in stage.reconstructions(net, images).items()}
    if not rows:
        return
    captions = previews.captions(picked, StepRandom(0, 0, len(picked)))
    groups = {name: to_pictures(x) for name, x in {"pictures": images, **rows}.items()}
    write_grid(folder / FILE, prompt_grid(captions, [0], groups), captions)
    for name, reconstructed in rows.items():
        quality, least = psnr(images, reconstructed), psnr(images, thumbnails(images, THUMBNAILS[name]))
        log.info("%s of the base model: %.1f dB on these pictures (%s)", name, quality, folder / FILE)
        if quality < min(least, ENOUGH[name]):
            log.warning(
                "%s of the base model cannot show these pictures, so this training cannot either: they keep less "
                "than a thumbnail of 1/%d of the side, which has %.1f dB (see %s): %s",
                name, THUMBNAILS[name], least, folder / FILE, ADVICE[name],
            )  # fmt: skip
            return
