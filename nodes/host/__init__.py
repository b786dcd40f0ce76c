"""The only package that imports ComfyUI's own modules (`comfy`, `folder_paths`, `latent_preview`).

ComfyUI internals in use:
- `supported_models_base.BASE`, `model_base.BaseModel`, `latent_formats`, `model_sampling`, `conds`: defining a model
- `model_management.cast_to_device`, `ops.cast_bias_weight`: parameters on another device or in another dtype
- `model_patcher`: loading and offloading
- `sd.CLIP`, `sd.VAE`, `sd1_clip`: the objects behind the sockets
- `sd.load_lora_for_models`: LoRA patches
- `samplers.KSAMPLER`, `sample.sample_custom`: guidance, hooks and masks around our steps
- `samplers.CFGGuider.sample`, the only function that we wrap: masks of latents before ComfyUI interpolates them
- `patcher_extension.WrappersMP`, `samplers.resolve_areas_and_cond_masks_multidim`: areas, and sampler warnings
- `model_management.load_models_gpu`, the patcher's `pre_run` and `cleanup`: v1's tokens, which ComfyUI cannot sample
"""
