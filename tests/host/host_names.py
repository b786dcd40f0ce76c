"""The names of ComfyUI that the pack uses, as dotted paths."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview")

# Attributes of ComfyUI's objects, which dotted paths in the code do not show: called, overridden, or set.
METHODS = {
    "comfy.conds.CONDRegular": "_copy_with process_cond",
    "comfy.controlnet.ControlBase": "cleanup copy_to get_models inference_memory_requirements pre_run",
    "comfy.latent_formats.LatentFormat": "latent_channels scale_factor process_in process_out latent_rgb_factors",
    "comfy.model_base.BaseModel": "extra_conds memory_required get_dtype",
    "comfy.model_patcher.ModelPatcher": "add_wrapper_with_key cleanup get_model_object "
    "patch_cached_hook_weights patch_hook_weight_to_device pre_run unpatch_hooks",
    "comfy.model_sampling.StableCascadeSampling": "set_parameters set_sigmas sigma timestep",
    "comfy.patcher_extension.WrapperExecutor": "execute",
    "comfy.sd.CLIP": "encode_from_tokens_scheduled load_sd tokenize",
    "comfy.sd.VAE": "decode encode encode_tiled_",
    "comfy.supported_models_base.BASE": "get_model set_inference_dtype unet_extra_config memory_usage_factor "
    "supported_inference_dtypes",
}
# Attributes that the pack sets on a VAE, where ComfyUI's methods read them.
VAE = (
    "device disable_offload downscale_ratio first_stage_model latent_channels memory_used_decode memory_used_encode "
    "output_device patcher process_input process_output upscale_ratio vae_dtype working_dtypes"
).split()

# What ComfyUI 0.3.64 lacks. The code looks for each, and works without it.
OPTIONAL = {
    "comfy.model_patcher.CoreModelPatcher",
    "comfy.model_patcher.ModelPatcher.is_dynamic",
    "comfy.quant_ops.QUANT_ALGOS",
    "comfy.quant_ops.QuantizedTensor",
}


def _names(tree: ast.Module) -> Iterator[str]:
    """Yields the dotted paths that a module imports and reads, also through names that it gives them."""
    meaning: dict[str, str] = {}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return base and f"{base}.{node.attr}"
        return meaning.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    first = alias.name.split(".")[0]
                    meaning[alias.asname or first] = alias.name if alias.asname else first
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, given in zip(target.elts, value.elts, strict=True) if both else [(target, value)]:
                if isinstance(name, ast.Name) and (found := dotted(given)):
                    meaning[name.id] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (found := dotted(node)):
            yield found
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name, *_ = node.args
            if isinstance(name, ast.Constant) and (found := dotted(owner)):
                yield f"{found}.{name.value}"


def used_names() -> list[str]:
    """Returns all names of ComfyUI that the pack uses, sorted."""
    files = [REPOSITORY / "__init__.py", *(REPOSITORY / "nodes").rglob("*.py")]
    found = {name for file in files for name in _names(ast.parse(file.read_text(encoding="utf-8")))}
    return sorted(found | {f"{owner}.{name}" for owner, names in METHODS.items() for name in names.split()} | OPTIONAL)
