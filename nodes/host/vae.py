"""VAE objects: Stage A, and the image encoder as a VAE that only encodes."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.release import release_of
from ...wuerstchen_core.common.numbers import check_finite
from ...wuerstchen_core.kernels.vqgan import band_height
from ...wuerstchen_core.models.image_encoder import semantic_view


class SemanticCompressor(nn.Module):
    """The image encoder with the method that ComfyUI calls."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(semantic_view(images))


def _stop_if_cancelled(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        comfy.model_management.throw_exception_if_processing_interrupted()


class WuerstchenVAE(comfy.sd.VAE):
    """A VAE around one of the core's networks. Its layers are plain torch, so it is loaded as a whole."""

    first_stage_model: Any
    codebook: torch.Tensor  # of Stage A
    smallest = 4  # side of an image in pixels that can be encoded
    network_name = "Stage A"

    def __init__(self, network: nn.Module, *, latent_channels: int, ratio: float, dtypes: list[torch.dtype]):
        management, root = comfy.model_management, logging.getLogger()
        root.addFilter(_is_other_message)
        try:
            super().__init__(sd={})  # sets this ComfyUI version's defaults
        finally:
            root.removeFilter(_is_other_message)
        self.latent_channels = latent_channels
        self.upscale_ratio = self.downscale_ratio = ratio
        self.process_input = lambda images: images[:, :3].expand(-1, 3, -1, -1)  # drops the alpha channel
        self.process_output = lambda images: images.clamp_(0.0, 1.0)  # in place: ComfyUI 0.33 ignores the result
        self.working_dtypes = dtypes
        self.disable_offload = True
        self.device = management.vae_device()
        self.output_device = management.intermediate_device()
        # Options such as --fp16-vae choose others, even on a CPU, whose resizing of images computes in fp32 only.
        self.vae_dtype = management.vae_dtype(self.device, dtypes) if len(dtypes) > 1 else dtypes[0]
        self.first_stage_model = network.to(self.vae_dtype).eval().requires_grad_(False)
        for block in (module for module in network.modules() if next(module.children(), None)):
            block.register_forward_pre_hook(_stop_if_cancelled)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_latents(samples_in)
        return check_finite(self.network_name, super().decode(samples_in, *args, **kwargs))

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_latents(samples)
        return check_finite(self.network_name, super().decode_tiled(samples, *args, **kwargs))

    def encode(self, pixel_samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_image(pixel_samples)
        return check_finite(self.network_name, super().encode(pixel_samples, *args, **kwargs))

    def encode_tiled(
        self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64, **kwargs: Any
    ) -> Tensor:
        self.check_image(pixel_samples)
        overlap = min(overlap, min(tile_x, tile_y) // 4)  # ComfyUI divides by half a tile minus the overlap
        encoded = super().encode_tiled(pixel_samples, tile_x=tile_x, tile_y=tile_y, overlap=overlap, **kwargs)
        return check_finite(self.network_name, encoded)

    def check_latents(self, latents: Tensor) -> None:
        """Raises ValueError unless latents are finite and have the shape [B, c, h, w] that the network decodes."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"Stage A decodes Stage B's latents [batch, {self.latent_channels}, height, width], not "
                f"{list(latents.shape)}: connect the latents of Würstchen Decoder Sample"
            )
        check_finite("Stage B", latents)

    def check_image(self, images: Tensor) -> None:
        """Raises ValueError unless images have the shape [B, H, W, 1, 3 or 4] and the least size."""
        shape = images.shape
        if len(shape) != 4 or shape[-1] not in (1, 3, 4) or min(shape[1:3]) < self.smallest:
            raise ValueError(
                f"Würstchen encodes images [batch, height, width, 1, 3 or 4] of {self.smallest} or more pixels a side, "
                f"not {list(shape)}: connect another image"
            )


def _is_other_message(record: logging.LogRecord) -> bool:
    """False for ComfyUI's warning about a VAE without weights."""
    return "No VAE weights" not in record.getMessage()


class SemanticVAE(WuerstchenVAE):
    """The image encoder as a VAE. Its receptive field is large, so images are always encoded whole."""

    smallest = 1
    network_name = "the image encoder"
    release: str | None = None  # of the priors and Stage B that its latents fit; None if unknown

    def check_latents(self, latents: Tensor) -> None:
        raise ValueError("the image encoder only encodes: connect the loader's vae output (Stage A) to decode")

    def encode_tiled_(self, pixel_samples: Tensor, *_: Any, **__: Any) -> Tensor:
        pixels = self.process_input(pixel_samples).to(device=self.device, dtype=self.vae_dtype)
        return self.first_stage_model.encode(pixels).to(self.output_device).float()


def load_stage_a(part: Part) -> WuerstchenVAE:
    """Returns Stage A as a VAE between images and latents in codebook units."""
    _stop_if_cancelled()
    network = build_part(part)
    codebook = network.state_dict()["vquantizer.codebook.weight"].float()
    # bf16 on devices that compute in it: half the memory, 59 dB PSNR against fp32 (docs/memory.md).
    vae = WuerstchenVAE(network, latent_channels=4, ratio=4, dtypes=[torch.bfloat16, torch.float32])
    vae.codebook = codebook  # before rounding: tokens stand for exactly these values
    # Peak values per pixel, measured at full width and proportional to it (docs/memory.md).
    width = part.params.c_hidden / 384
    vae.memory_used_decode = lambda shape, dtype: _decode_values(*shape[2:]) * _size(dtype) * width
    vae.memory_used_encode = lambda shape, dtype: 700 * shape[2] * shape[3] * _size(dtype) * width
    return vae


def load_image_encoder(part: Part, release: str | None = None) -> SemanticVAE:
    """Returns the image encoder as a VAE that only encodes: images of any size to Stage C latents.

    `release` is the file's; without it, the sizes of the published encoders tell the release.
    """
    _stop_if_cancelled()
    network = SemanticCompressor(build_part(part))
    vae = SemanticVAE(network, latent_channels=16, ratio=128 / 3, dtypes=[torch.float32])
    vae.release = release or release_of(part.params)
    vae.downscale_ratio = 1  # ComfyUI need not crop: semantic_view resizes any size
    width = part.params.stages[0][4] / 24
    vae.memory_used_encode = lambda shape, dtype: 27 * shape[2] * shape[3] * _size(dtype) * width
    return vae


def _decode_values(height: int, width: int) -> int:
    """Returns the peak number of values while one image is decoded in bands of rows."""
    return 17_000 * band_height(1, height, width, cpu=False) * width + 100 * height * width


def _size(dtype: Any) -> int:
    return comfy.model_management.dtype_size(dtype)
