"""The only place that touches ComfyUI's own modules (`comfy`, `folder_paths`, `latent_preview`).

Uses, of what ComfyUI keeps private: `supported_models_base.BASE`, `model_base.BaseModel`, `latent_formats`,
`model_sampling` and `conds` (how a model joins), `ops.cast_to_input` and
`ops.cast_bias_weight` (bare parameters on another device, and a layer's weights as it would multiply them),
`model_patcher` (loading and offload), `sd.CLIP`, `sd.VAE` and `sd1_clip` (the objects behind the sockets),
`sd.load_lora_for_models` (a LoRA's changes as the host's own patches),
`samplers.KSAMPLER` and `sample.sample_custom` (guidance, hooks and masks around our own steps),
`patcher_extension.WrappersMP` (what is done around a run: areas in the latents of each stage, and advice where a choice
of the host's sampling harms), `samplers.resolve_areas_and_cond_masks_multidim` (areas),
`model_management.load_models_gpu`, the patcher's `pre_run` and `cleanup` (v1's tokens, which the host can't sample).
"""
