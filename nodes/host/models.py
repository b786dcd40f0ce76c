"""MODEL objects: configuration, latent format, conditioning and loading of Stage C and Stage B."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from torch import nn

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.components import release
from ...wuerstchen_core.checkpoints.key_maps import split_attention
from .conditioning import PRIOR_KEY, check_no_prior, prepare_runs_of, prior_cond, text_cond
from .diffusion_models import HostDecoder, HostPrior, HostTokenDecoder
from .latents import STAGE_B, STAGE_C, DecoderLatents, PriorLatents, check_shape, warn_of_other_size
from .model_sampling import WuerstchenSampling
from .sampler_warnings import advise

TOKENS = 77  # of a text


class StageModel(comfy.model_base.BaseModel):
    """What both stages share."""

    network: ClassVar[type[nn.Module]]
    area_multiple = 1  # areas of the latents are multiples of it

    def __init__(self, config: Any, device: Any = None):
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=self.network)
        self.model_sampling = WuerstchenSampling()
        # One of the two hosts leaves a new network in training mode.
        self.diffusion_model.eval().requires_grad_(False)

    @property
    def numbers_held(self) -> float:
        """How many numbers a call holds at its peak for each pixel of the latents: measured, see docs/memory.md."""
        raise NotImplementedError

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Bytes of one call, whatever the conditioning."""
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        grows = self.numbers_held * input_shape[0] * math.prod(input_shape[2:])
        return size * (grows + self.numbers_besides(input_shape[0]))

    def numbers_besides(self, batch: int) -> int:
        """How many numbers it holds whatever the pixels."""
        return 0

    def get_dtype_inference(self) -> torch.dtype:
        """The dtype of the computation (the older host has no such method)."""
        return self.get_dtype() if self.manual_cast_dtype is None else self.manual_cast_dtype


class PriorModel(StageModel):
    """Stage C in the host."""

    network = HostPrior

    @property
    def version(self) -> str:
        """The release whose features it paints, as far as its units tell."""
        return release([self.diffusion_model.params])

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        check_shape(kwargs["noise"].shape, STAGE_C, "Stage C")
        check_no_prior(kwargs)
        return {"c_crossattn": text_cond("Stage C", self.diffusion_model.params.c_cond, kwargs)}

    @property
    def numbers_held(self) -> float:
        return 18 * self.diffusion_model.params.c

    def numbers_besides(self, batch: int) -> int:
        """Keys and values of each block, of the texts that it has read."""
        params = self.diffusion_model.params
        return 2 * params.depth * params.c * TOKENS * batch


class DecoderModel(StageModel):
    """Stage B in the host."""

    network = HostDecoder

    @property
    def area_multiple(self) -> int:  # type: ignore[override]
        return self.diffusion_model.params.multiple

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        params = self.diffusion_model.params
        shape = kwargs["noise"].shape
        check_shape(shape, STAGE_B, "Stage B", params.multiple)
        text, prior = text_cond("Stage B", params.clip_embd, kwargs), prior_cond(params, kwargs)
        if kwargs.get("prompt_type") == "positive":
            warn_of_other_size(prior.cond.shape, shape)
        return {"c_crossattn": text, PRIOR_KEY: prior}

    @property
    def numbers_held(self) -> float:
        return 4.2 * self.diffusion_model.params.c_hidden[0]

    def numbers_besides(self, batch: int) -> int:
        """The matrix that a block makes of two."""
        params = self.diffusion_model.params
        widest = max(params.c_hidden)
        return 4 * widest * (widest + params.effnet_embd)


class TokenModel(StageModel):
    """v1's Stage B in the host, which loads it; what walks along the tokens is `host/tokens.py`."""

    network = HostTokenDecoder

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Bytes of one call and of the choice of its tokens: nearly all of them for the logits of every code."""
        labels, tokens = self.diffusion_model.params.num_labels, input_shape[0] * math.prod(input_shape[2:])
        return 2.2 * 4 * labels * tokens  # in fp32, whatever the network computes in: measured, see docs/memory.md


class StageConfig(comfy.supported_models_base.BASE):
    """What the host asks of a model's family; all of `unet_config` goes to the network."""

    model: ClassVar[type[StageModel]]
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    memory_usage_factor = 1.0
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> StageModel:
        return self.model(self, device=device)


class PriorConfig(StageConfig):
    """Stage C's family, v1's and v2's: they differ in the units of their latents."""

    model = PriorModel

    def __init__(self, unet_config: dict[str, Any]):
        super().__init__(unet_config)
        self.latent_format = PriorLatents(unet_config["params"])


class DecoderConfig(StageConfig):
    """Stage B's family."""

    model = DecoderModel
    latent_format = DecoderLatents


class TokenConfig(StageConfig):
    """The family of v1's Stage B."""

    model = TokenModel
    latent_format = DecoderLatents


_CONFIGS = {"prior": PriorConfig, "decoder": DecoderConfig, "token_decoder": TokenConfig}


def load_model(part: Part, weight_dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> Any:
    """A prior or a decoder of either kind as a MODEL: the host's patcher around a network built from the host's layers.

    `weight_dtype` is that of the stored weights (None: the host's choice); what they are computed in, the host says.
    """
    management = comfy.model_management
    # Building it names what is missing or mis-shaped, and copies nothing.
    state_dict = split_attention(build_part(part).state_dict())
    config = _CONFIGS[part.name]({"params": part.params})
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = weight_dtype or management.unet_dtype(
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
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    if not dynamic:  # layers that the newer host builds without weights would take the file's dtype for theirs
        state_dict = {key: x.to(dtype) for key, x in state_dict.items()}
    model.diffusion_model.load_state_dict(state_dict, strict=False, assign=dynamic)
    model.diffusion_model.requires_grad_(False)
    if part.name != "token_decoder":  # the host's own sampling has no part in that
        prepare_runs_of(patcher)
        advise(patcher, ancestral=part.name == "decoder")
    if hasattr(patcher, "cached_patcher_init"):  # how the newer host copies models, for torch.compile and several GPUs
        patcher.cached_patcher_init = (load_model, (part, weight_dtype))
    return patcher
