"""MODEL objects: configuration, latent format, conditioning and loading of Stage C and Stage B."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.diffusion.sizes import prior_side
from ...wuerstchen_core.models.decoder import resize_prior_latents
from ...wuerstchen_core.models.prior import features_from_latents, latents_from_features
from ...wuerstchen_core.models.vqgan import VQGANParams
from .networks import HostDecoder, HostPrior
from .previews import preview_factors
from .time import WuerstchenSampling

PRIOR_KEY = "stable_cascade_prior"  # Stage C latents in a CONDITIONING; the host's Cascade nodes use it too

CLIP_NAMES = {1024: "CLIP-H", 1280: "CLIP-bigG"}


class PriorLatents(comfy.latent_formats.LatentFormat):
    """Features as Stage B takes them outside, (features + 1) / 42 inside the prior."""

    latent_channels = 16
    spacial_downscale_ratio = 128 / 3

    def __init__(self) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors("prior")

    def process_in(self, latent: Tensor) -> Tensor:
        return latents_from_features(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return features_from_latents(latent)


class DecoderLatents(comfy.latent_formats.LatentFormat):
    """Stage A's codebook units outside, about unit variance inside the decoder."""

    latent_channels = 4
    spacial_downscale_ratio = 4
    scale_factor = 1 / VQGANParams.scale_factor

    def __init__(self) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors("decoder")


def text_cond(stage: str, width: int, states: Tensor | None) -> dict[str, comfy.conds.CONDRegular]:
    """Text states as the host batches them: never repeated to a common length, since every token is attended."""
    if states is None:
        raise ValueError(f"{stage} was given a conditioning without text: connect Würstchen Text Encode")
    if states.shape[-1] != width:
        clip = CLIP_NAMES.get(width, "its own text tower")
        raise ValueError(
            f"{stage} reads text states {width} wide ({clip}), but this conditioning is {states.shape[-1]} wide: "
            "encode the prompt with Würstchen Text Encode and the CLIP that belongs to this model"
        )
    return {"c_crossattn": comfy.conds.CONDRegular(states)}


class PriorCond(comfy.conds.CONDRegular):
    """Stage C latents of the whole picture: where the host crops Stage B's latents to an area, so it does these."""

    def __init__(self, cond: Tensor, whole: tuple[int, int]):
        super().__init__(cond)
        self.whole = whole  # h, w

    def _copy_with(self, cond: Tensor) -> PriorCond:
        return type(self)(cond, self.whole)

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> PriorCond:
        prior = self.cond
        if area is not None:
            height, width, top, left = area
            prior = resize_prior_latents(prior, self.whole)[..., top : top + height, left : left + width]
        return self._copy_with(comfy.utils.repeat_to_batch_size(prior, batch_size))


class StageModel(comfy.model_base.BaseModel):
    """What both stages share."""

    network: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, device: Any = None):
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=self.network)
        self.model_sampling = WuerstchenSampling()
        # One of the two hosts leaves a new network in training mode.
        self.diffusion_model.eval().requires_grad_(False)


class PriorModel(StageModel):
    """Stage C in the host."""

    network = HostPrior

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return text_cond("Stage C", self.diffusion_model.params.c_cond, kwargs.get("cross_attn"))


class DecoderModel(StageModel):
    """Stage B in the host."""

    network = HostDecoder

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        params = self.diffusion_model.params
        conds = text_cond("Stage B", params.clip_embd, kwargs.get("cross_attn"))
        prior, noise = kwargs.get(PRIOR_KEY), kwargs["noise"]
        height, width = noise.shape[-2:]
        if prior is None:  # the unconditional half: zeros of the size that the picture's prior has
            prior = torch.zeros(1, params.effnet_embd, prior_side(height * 4), prior_side(width * 4))
        return {**conds, PRIOR_KEY: PriorCond(prior.to(noise.device), (height, width))}

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Bytes of one call: 12 KB a latent pixel were measured at full width in fp32."""
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        width = self.diffusion_model.params.c_hidden[0] / 320
        return 12 * 1024 / 4 * size * width * input_shape[0] * math.prod(input_shape[2:])

    def get_dtype_inference(self) -> torch.dtype:
        """The dtype of the computation (the older host has no such method)."""
        return self.get_dtype() if self.manual_cast_dtype is None else self.manual_cast_dtype


class StageConfig(comfy.supported_models_base.BASE):
    """What the host asks of a model's family; all of `unet_config` goes to the network."""

    model: ClassVar[type[StageModel]]
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    memory_usage_factor = 1.0
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> StageModel:
        return self.model(self, device=device)


class PriorConfig(StageConfig):
    """Stage C's family."""

    model = PriorModel
    latent_format = PriorLatents


class DecoderConfig(StageConfig):
    """Stage B's family."""

    model = DecoderModel
    latent_format = DecoderLatents


_CONFIGS = {"prior": PriorConfig, "decoder": DecoderConfig}


def load_model(part: Part) -> Any:
    """A prior or decoder part as a MODEL: the host's patcher around a network built from the host's layers."""
    management = comfy.model_management
    state_dict = build_part(part).state_dict()  # names what is missing or mis-shaped; copies nothing
    config = _CONFIGS[part.name]({"params": part.params})
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(
        device=load_device,
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    )
    model = config.get_model(state_dict, device=offload_device)
    # The newer host replaces this class at its start where the device allows loading on demand.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    model.diffusion_model.load_state_dict(state_dict, strict=False, assign=dynamic)
    model.diffusion_model.requires_grad_(False)
    return patcher
