"""VAE objects: Stage A, and the semantic compressor as an encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.release import version_of
from ...wuerstchen_core.kernels.vqgan import band_height
from ...wuerstchen_core.models.image_encoder import semantic_view


class SemanticCompressor(nn.Module):
    """The image encoder with the two methods that the host calls."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(semantic_view(images))

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError(
            "the semantic compressor only encodes: connect Stage A's VAE (the loader's fifth output) to decode"
        )


class WuerstchenVAE(comfy.sd.VAE):
    """A VAE around one of the core's networks, built from plain layers and hence loaded whole."""

    first_stage_model: Any
    codebook: torch.Tensor  # of Stage A

    def __init__(self, network: nn.Module, *, latent_channels: int, ratio: float, dtypes: list[torch.dtype]):
        management = comfy.model_management
        with _without_warning():  # only for this version's defaults: without weights it builds nothing
            super().__init__(sd={})
        self.latent_channels = latent_channels
        self.upscale_ratio = self.downscale_ratio = ratio
        self.process_input = lambda images: images[:, :3]  # without opacity
        # In place: one host throws away what this returns.
        self.process_output = lambda images: images.clamp_(0.0, 1.0)
        self.working_dtypes = dtypes
        self.disable_offload = True
        self.device = management.vae_device()
        self.output_device = management.intermediate_device()
        self.vae_dtype = management.vae_dtype(self.device, dtypes)
        self.first_stage_model = network.to(self.vae_dtype).eval().requires_grad_(False)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )


class SemanticVAE(WuerstchenVAE):
    """The image encoder as a VAE: every latent depends on a wide surrounding, so that pictures are encoded whole."""

    release: str | None = None  # of Würstchen, whose priors and Stage B its latents are for; None if nothing tells

    def encode_tiled_(self, pixel_samples: Tensor, *_: Any, **__: Any) -> Tensor:
        pixels = self.process_input(pixel_samples).to(device=self.device, dtype=self.vae_dtype)
        return self.first_stage_model.encode(pixels).to(self.output_device).float()


@contextmanager
def _without_warning() -> Iterator[None]:
    """Keep the host from warning that a VAE without weights is being made."""

    def keep(record: logging.LogRecord) -> bool:
        return "No VAE weights" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def load_stage_a(part: Part) -> WuerstchenVAE:
    """Stage A as a VAE between pictures and latents in codebook units."""
    network = build_part(part)
    codebook = part.state_dict["vquantizer.codebook.weight"].float()
    # bf16 where the device computes in it: half the memory for 59 dB of fp32's picture (docs/memory.md).
    vae = WuerstchenVAE(network, latent_channels=4, ratio=4, dtypes=[torch.bfloat16, torch.float32])
    vae.codebook = codebook  # before it is rounded: tokens stand for these very numbers
    # Numbers held at the peak for each pixel, measured at full width (docs/memory.md); they scale with it.
    width = part.params.c_hidden / 384
    vae.memory_used_decode = lambda shape, dtype: _decoded(shape) * _size(dtype) * width
    vae.memory_used_encode = lambda shape, dtype: 700 * shape[2] * shape[3] * _size(dtype) * width
    return vae


def load_image_encoder(part: Part, release: str | None = None) -> SemanticVAE:
    """The semantic compressor as a VAE that only encodes: pictures of any size to Stage C latents.

    `release` is what its file says; else its sizes tell it, where they are a published encoder's.
    """
    network = SemanticCompressor(build_part(part))
    vae = SemanticVAE(network, latent_channels=16, ratio=128 / 3, dtypes=[torch.float32])
    vae.release = release or version_of(part.params)
    vae.downscale_ratio = 1  # what the host crops pictures and masks to: every size is resized to the view it needs
    width = part.params.stages[0][4] / 24
    vae.memory_used_encode = lambda shape, dtype: 27 * shape[2] * shape[3] * _size(dtype) * width
    return vae


def _decoded(shape: Any) -> int:
    """Numbers held for one picture of latents of a shape, in the bands of rows in which it is decoded."""
    height, width = shape[2:]
    return 17_000 * band_height(1, height, width, cpu=False) * width + 100 * height * width


def _size(dtype: Any) -> int:
    return comfy.model_management.dtype_size(dtype)
