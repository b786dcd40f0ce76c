"""Helpers for tests of the pipeline and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.main import main

PROMPT = "a red apple"
ROUNDING = 1  # of 255: fp32 results depend on memory alignment and batch size in their last digit


def run(*arguments: str | Path, main: Callable[[list[str]], int] = main) -> int:
    """Runs a command and returns its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's
        return int(stop.code or 0)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path, main: Callable[[list[str]], int] = main) -> str:
    """Runs a command that fails and returns its error, which is one line."""
    assert run(*arguments, main=main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def latents(pipe: WuerstchenPipeline, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Returns the latents of Stages C and B for prompts."""
    prior_text, decoder_text = pipe.encode_text(prompts)
    features = pipe.sample_prior(prior_text, pipe.sampling, seed=seed)
    return features, pipe.sample_decoder(features, decoder_text, pipe.sampling, seed=seed)


@torch.no_grad()
def make_vivid(pipe: WuerstchenPipeline) -> None:
    """Scales the weights of a tiny random model so that its images visibly depend on input image, seed and prompt."""
    encoder, vqgan = pipe.image_encoder, pipe.vqgan
    assert encoder is not None and vqgan is not None
    for norm in encoder.modules():  # random layers shrink the signal; measured statistics restore it
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    noise = torch.randn(32, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    encoder.train()(F.interpolate(noise, size=(64, 96), mode="bicubic"))
    encoder.eval().mapper[1].get_parameter("weight").mul_(20)
    vqgan.out_block[0].get_parameter("weight").mul_(4)
    if pipe.token_decoder is not None:
        vqgan.vquantizer.codebook.weight.mul_(50)
        pipe.token_decoder.out_mapper[1].get_parameter("weight").mul_(20)
