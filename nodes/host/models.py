"""MODEL objects: configuration, memory estimates and loading of Stage C and Stage B."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.build import build_outline
from ...wuerstchen_core.checkpoints.key_maps import split_attention
from ...wuerstchen_core.checkpoints.release import release_of_model
from . import int8
from .attention_scales import AttentionScales
from .conditioning import PRIOR_KEY, prior_cond, text_cond
from .diffusion_models import HostDecoder, HostPrior, HostTokenDecoder
from .latents import STAGE_B, STAGE_C, DecoderLatents, PriorLatents, check_shape, warn_of_other_size
from .masks import widen_masks
from .model_sampling import WuerstchenSampling
from .notices import notify
from .patch_notices import NO_PRIOR
from .wrappers import add_wrappers

TEXT_TOKENS = 77


class StageModel(comfy.model_base.BaseModel):
    """The base of all stages as ComfyUI models."""

    stage: ClassVar[str] = "Stage B"
    trained: tuple[float, float] | None = None  # the sides of a prior's training images in pixels
    network: ClassVar[type[nn.Module]]
    area_multiple = 1  # areas are widened to multiples of this many latents

    def __init__(self, config: Any, device: Any = None):
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=self.network)
        self.model_sampling = WuerstchenSampling()
        self.diffusion_model.eval().requires_grad_(False)  # ComfyUI 0.3.64 leaves it in training mode

    @property
    def params(self) -> Any:
        return self.diffusion_model.params

    def memory_values(self, batch: int, pixels: int) -> float:
        """Returns the most values alive in one call on `batch` latents of `pixels` each; docs/memory.md measures it."""
        raise NotImplementedError

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Returns the bytes of one call, whatever the conditioning."""
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        return size * self.memory_values(input_shape[0], math.prod(input_shape[2:]))

    def get_dtype_inference(self) -> torch.dtype:
        """Returns the computation's dtype; ComfyUI 0.3.64 has no such method."""
        return self.get_dtype() if self.manual_cast_dtype is None else self.manual_cast_dtype


widen_masks(StageModel)


class PriorModel(StageModel):
    """Stage C."""

    stage = "Stage C"
    network = HostPrior

    @property
    def version(self) -> str:
        """The release of the features that it generates, as its units tell."""
        return release_of_model([self.params])

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        check_shape(kwargs["noise"].shape, STAGE_C, "Stage C")
        if kwargs.get(PRIOR_KEY) is not None:
            raise ValueError(
                "Stage C got the decoder's conditioning: connect the prior output of Würstchen Text Encode"
            )
        return {"c_crossattn": text_cond("Stage C", self.params.c_cond, kwargs)}

    def memory_values(self, batch: int, pixels: int) -> float:
        keys_values = 2 * self.params.depth * self.params.c * TEXT_TOKENS * batch
        return 18 * self.params.c * batch * pixels + keys_values


class DecoderModel(StageModel):
    """Stage B of v2."""

    network = HostDecoder

    @property
    def area_multiple(self) -> int:  # type: ignore[override]
        return self.params.multiple

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        shape = kwargs["noise"].shape
        check_shape(shape, STAGE_B, "Stage B", self.params.multiple)
        text, prior = text_cond("Stage B", self.params.clip_embd, kwargs), prior_cond(self.params, kwargs)
        if kwargs.get("prompt_type") == "positive":
            warn_of_other_size(prior.cond.shape, shape)
        elif kwargs.get(PRIOR_KEY) is None and self.diffusion_model.patches.sampling:  # encoded by another node
            notify(NO_PRIOR)
        return {"c_crossattn": text, PRIOR_KEY: prior}

    def memory_values(self, batch: int, pixels: int) -> float:
        widest = max(self.params.c_hidden)
        combined_weights = 4 * widest * (widest + self.params.effnet_embd)  # a block merges two matrices
        return 3.75 * self.params.c_hidden[0] * batch * pixels + combined_weights


class TokenModel(StageModel):
    """Stage B of v1, loaded by ComfyUI and sampled by token_sampling.py."""

    network = HostTokenDecoder

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Returns the bytes of one call and of choosing its tokens: mostly fp32 logits (docs/memory.md)."""
        return 2.2 * 4 * self.params.num_labels * input_shape[0] * math.prod(input_shape[2:])


MODELS: dict[str, type[StageModel]] = {"prior": PriorModel, "decoder": DecoderModel, "token_decoder": TokenModel}


class StageConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of a stage; the network gets all of `unet_config`."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    memory_usage_factor = 1.0
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, name: str, params: Any):
        # Some nodes look for a U-Net's width.
        super().__init__({"params": params, "model_channels": params.c if name == "prior" else params.c_hidden[0]})
        self.model = MODELS[name]
        self.latent_format = PriorLatents(params) if name == "prior" else DecoderLatents()

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> StageModel:
        return self.model(self, device=device)


def _patch_bare_parameters(patcher: Any, device: Any, *_: Any) -> None:
    """Applies patches of parameters outside layers, such as a merge's or a LoRA's of a norm.

    ComfyUI drops them where it loads a model in part or on demand.
    """
    for key in patcher.patches:
        if key.startswith("diffusion_model.") and key.rpartition(".")[2] not in ("weight", "bias"):
            if key in patcher.backup:  # patched already
                comfy.utils.set_attr_param(patcher.model, key, patcher.backup[key].weight)
            patcher.patch_weight_to_device(key, device)


@cache
def _patcher_class(kind: Any) -> type:
    """Returns a class of ComfyUI's patchers for MODELs that ComfyUI samples."""
    return type(kind.__name__, (AttentionScales, int8.Int8Hooks, kind), {})


def _extend_clone(patcher: Any, clone: Any) -> None:
    """Extends the plain patcher that ComfyUI makes, for hooks, of one that loads on demand."""
    kind: Any = type(clone)
    if not issubclass(kind, AttentionScales):
        clone.__class__ = _patcher_class(kind)


def load_model(part: Part, weight_dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> Any:
    """Returns a prior or decoder as a MODEL: ComfyUI's patcher around a network built from ComfyUI's layers.

    Weights are stored in `weight_dtype` (None: int8 if the file is and that is fast, else ComfyUI's choice); ComfyUI
    chooses the dtype of the computation.
    """
    management = comfy.model_management
    management.throw_exception_if_processing_interrupted()
    config = StageConfig(part.name, part.params)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    supported = config.supported_inference_dtypes
    in_int8 = weight_dtype == torch.int8 or (weight_dtype is None and int8.keeps_int8(part, load_device))
    if in_int8:
        int8.check_supported(load_device)
        build_outline(part)  # reports missing and misshapen weights
        config.quant_config = {"mixed_ops": True}
        state_dict = split_attention(part.state_dict)
        dtype = cast = management.unet_manual_cast(None, load_device, supported)
    else:
        state_dict = split_attention(build_part(part).state_dict())
        dtype = weight_dtype or management.unet_dtype(
            device=load_device,
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(state_dict),
        )
        cast = management.unet_manual_cast(dtype, load_device, supported)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(state_dict, device=offload_device)
    # Newer ComfyUI versions replace this class at their start if the device supports loading on demand.
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    if in_int8:
        only_stored = weight_dtype is None
        state_dict = int8.quantised(model.diffusion_model, state_dict, dtype, load_device, only_stored)
    elif not dynamic:  # layers that ComfyUI builds without weights would keep the file's dtype
        state_dict = {key: x.to(offload_device, dtype) for key, x in state_dict.items()}
    model.diffusion_model.load_state_dict(state_dict, strict=False, assign=True)
    model.diffusion_model.requires_grad_(False)
    model.trained = part.trained
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "wuerstchen", _patch_bare_parameters)
    if part.name != "token_decoder":  # ComfyUI's samplers never run that
        add_wrappers(patcher)
        kind: Any = type(patcher)  # not patcher_class, whose constructor may return another class
        patcher.__class__ = _patcher_class(kind)
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, "wuerstchen", _extend_clone)
    if hasattr(patcher, "cached_patcher_init"):  # copies models for torch.compile and several GPUs; not in 0.3.64
        patcher.cached_patcher_init = (load_model, (part, weight_dtype))
    return patcher
