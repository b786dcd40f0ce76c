"""Run by ComfyUI's Python, `inside_loaders.py COMFYUI YAML SAVED OUTPUT`: loads files from the folders of a YAML file
with the nodes, and saves models to the folder SAVED. For test_host_loaders.py."""

from __future__ import annotations

import copy
import ctypes
import gc
import inspect
import threading
from pathlib import Path
from typing import Any

import torch
from conditioning_walk import logged
from inside import PROMPTS
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

# The loaders' choices of a dtype besides "default". Never change these names: saved workflows contain them.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FILES = {  # the part that each file holds
    "prior_original.pt": "prior",
    "prior_diffusers.safetensors": "prior",
    "prior_comfyui.safetensors": "prior",
    "prior_bundle.safetensors": "prior",
    "decoder_original.pt": "decoder",
    "decoder_diffusers.bin": "decoder",
}
TOWERS = ("prior_tower.safetensors", "decoder_tower.bin", "tower_bundle.safetensors")
BY_WIDTH = {"bigg.safetensors": "prior_text_encoder", "h.safetensors": "decoder_text_encoder"}
VAES = ("stage_a_original.pt", "stage_a_cascade.safetensors", "stage_a_diffusers.safetensors")
ENCODER = "encoder_bundle.safetensors"
LARGE = "large.safetensors"
DISTILLED_BUNDLE = "distilled_bundle.safetensors"
DISTILLED = {  # what the notice about a file names, as `train distill` writes it; nothing for other files
    "distilled_prior.safetensors": ("Würstchen Prior Sample", "turbo", "steps to 2", "cfg to 1"),
    "distilled_decoder.safetensors": ("Würstchen Decoder Sample", "steps to 1"),
    DISTILLED_BUNDLE: ("Würstchen Prior Sample", "turbo", "Würstchen Decoder Sample", "steps to 1"),
    "prior_bundle.safetensors": (),
}
# Loader, wrong file, and what the error must name.
MISTAKES: dict[tuple[str, str], tuple[str, ...]] = {
    ("model", "stage_a.pt"): ("stage_a.pt", "Stage A", "vae folder", "Würstchen VAE Loader"),
    ("model", "tower.safetensors"): ("tower.safetensors", "text_encoders folder", "Würstchen CLIP Loader"),
    ("model", "encoder.pt"): ("image encoder", "vae folder", "Würstchen VAE Loader"),
    ("model", "v1_stage_b.pt"): ("token decoder", "Würstchen Token Decoder Loader"),
    ("tokens", "decoder_original.pt"): ("decoder (Stage B)", "Würstchen Model Loader"),
    ("tokens", "sd.safetensors"): ("Stable Diffusion", "Würstchen Token Decoder Loader"),
    ("tokens", "token decoder of gone.safetensors"): ("gone.safetensors", "checkpoints folder"),
    ("model", "cascade.safetensors"): ("cascade.safetensors", "Stable Cascade"),
    ("model", "sd.safetensors"): ("Stable Diffusion", "prior (Stage C)", "decoder (Stage B)"),
    ("model", "lora.safetensors"): ("LoRA", "loras folder"),
    ("model", "unknown.safetensors"): ("unknown.safetensors", "some.key"),
    ("model", "whole.safetensors"): ("whole.safetensors", "convert"),
    ("model", "cut.safetensors"): ("cut.",),
    ("model", "cut.pt"): ("cut.",),
    ("model", "payload.pt"): ("payload.pt", "safetensors"),
    ("model", "half.safetensors"): ("prior", "out.1.bias"),
    ("model", "gone.safetensors"): ("gone.safetensors", "diffusion_models folder"),
    ("clip", "sd2.safetensors"): ("sd2.safetensors", "last layer"),
    ("clip", "clip_l.safetensors"): ("CLIP-L", "CLIP-bigG"),
    ("clip", "t5.safetensors"): ("T5", "Würstchen CLIP Loader"),
    ("clip", "decoder.safetensors"): (
        "decoder (Stage B)",
        "diffusion_models folder",
        "Würstchen Model Loader",
    ),
    ("clip", "two_towers.safetensors"): ("two_towers.safetensors", "convert"),
    ("vae", "v1_parts.safetensors"): ("v1_parts.safetensors", "checkpoints folder"),
    ("vae", "sd_vae.safetensors"): ("Stable Diffusion", "ComfyUI's own loaders"),
    ("vae", "prior.safetensors"): ("prior (Stage C)", "diffusion_models folder", "Würstchen Model Loader"),
    ("vae", "effnet_cascade.pt"): ("effnet_cascade.pt", "Stable Cascade"),
}


def inputs(kind: str, params: Any) -> tuple[Tensor, ...]:
    """Returns the inputs of a network: x, t, text, and Stage B's prior latents."""
    t = torch.tensor([1.0, 0.37])
    if kind == "prior":
        return seeded(2, 16, 5, 6), t, seeded(2, 77, params.c_cond)
    return seeded(2, 4, 16, 24), t, seeded(2, 77, params.clip_embd), seeded(2, 16, 2, 3)


LATENTS, PICTURE = (1, 4, 8, 12), (1, 32, 48, 3)


def predict(model: Any, kind: str) -> Tensor:
    network = model.model.diffusion_model
    x, t, text, *prior_latents = inputs(kind, network.params)
    return network(x, t, text, **dict(zip(("stable_cascade_prior",), prior_latents)))  # noqa: B905 (none for a prior)


M_MMAP_THRESHOLD = -3  # of glibc's mallopt: blocks of this size get pages of their own


class PeakMemory:
    """Measures the peak of this process's anonymous memory, in bytes above the start."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**18)  # else large blocks leave gaps
        libc.malloc_trim(0)  # else they reuse freed memory, unmeasured
        self.before = self.peak = self._anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self._anonymous())

    @staticmethod
    def _anonymous() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folders: str, saved: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import folder_paths
    from comfy_extras.nodes_model_merging import save_checkpoint
    from utils.extra_config import load_extra_path_config

    load_extra_path_config(folders)
    table = copy.deepcopy(folder_paths.folder_names_and_paths)
    load_pack()
    from pack.nodes import loaders
    from pack.nodes.model_files import choices
    from pack.wuerstchen_core.checkpoints.components import CLIP_LOADER, MODEL_LOADER, VAE_LOADER

    def model(name: str, dtype: str = "default") -> Any:
        return loaders.WuerstchenModelLoader.execute(name, dtype).args[0]

    def tokens(name: str) -> Any:
        return loaders.WuerstchenTokenDecoderLoader.execute(name, "default").args[0]

    def tower(name: str) -> Any:
        return loaders.WuerstchenCLIPLoader.execute(name).args[0]

    def vae(name: str) -> Any:
        return loaders.WuerstchenVAELoader.execute(name).args[0]

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"dtypes": {}, "towers": {}, "mistakes": {}, "distilled": {}}
    for name, kind in FILES.items():
        tensors[name] = predict(model(name), kind)
    for name in ("prior_diffusers.safetensors", "decoder_diffusers.bin"):
        for dtype in DTYPES:
            loaded = model(name, dtype)
            tensors[f"{name} {dtype}"] = predict(loaded, FILES[name])
            kept = {str(x.dtype) for x in loaded.model.diffusion_model.parameters()}
            facts["dtypes"][f"{name} {dtype}"] = [*kept, str(loaded.model.manual_cast_dtype)]
            # ComfyUI's ModelSave, and back.
            save_checkpoint(loaded, filename_prefix=f"{dtype}_{FILES[name]}", output_dir=saved)
            tensors[f"{name} {dtype} saved"] = predict(model(f"{dtype}_{FILES[name]}_00001_.safetensors"), FILES[name])
    for name in TOWERS:
        clip = tower(name)
        facts["towers"][name] = clip.cond_stage_model.clip_name
        for i, prompt in enumerate(PROMPTS):
            [[states, _]] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            tensors[f"{name} {i}"] = states
    build, loaders.clip.load_clip = loaders.clip.load_clip, lambda part, _: part.name  # builds nothing
    facts["towers"] |= {name: tower(name) for name in BY_WIDTH}
    loaders.clip.load_clip = build
    for name in VAES:
        tensors[name] = vae(name).decode(seeded(*LATENTS))
    tensors[ENCODER] = vae(ENCODER).encode(seeded(*PICTURE).sigmoid())

    # ComfyUI's CheckpointSave, and back.
    parts = model("prior_diffusers.safetensors"), tower("prior_tower.safetensors"), vae("stage_a_original.pt")
    save_checkpoint(*parts, filename_prefix="whole", output_dir=saved)
    name = "whole_00001_.safetensors"
    offered = [choices(loader) for loader in (MODEL_LOADER, CLIP_LOADER, VAE_LOADER)]
    facts["offered"] = [[choice for choice in found if choice.endswith(f" of {name}")] for found in offered]
    tensors["checkpoint model"] = predict(model(f"prior of {name}"), "prior")
    clip = tower(f"text tower (prior) of {name}")
    [[tensors["checkpoint clip"], _]] = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPTS[0]))
    tensors["checkpoint vae"] = vae(f"Stage A of {name}").decode(seeded(*LATENTS))
    try:
        loaders.WuerstchenBundleLoader.execute(name)
    except ValueError as error:
        facts["whole"] = str(error)

    for kind, name in MISTAKES:
        try:
            {"model": model, "tokens": tokens, "clip": tower, "vae": vae}[kind](name)
        except ValueError as error:
            facts["mistakes"][f"{kind} {name}"] = str(error)
    facts["fingerprint"] = [
        loaders.WuerstchenModelLoader.fingerprint_inputs(model_name=name, weight_dtype="default")
        for name in ("prior_original.pt", None)
    ]

    first = model("prior_original.pt")
    if "force_deepcopy" in inspect.signature(first.clone).parameters:  # newer versions copy models: torch.compile
        copied = first.clone(force_deepcopy=True)
        facts["copied"] = copied.model is not first.model
        tensors["prior_original.pt copied"] = predict(copied, "prior")
    with PeakMemory() as memory:
        large = model(LARGE, "fp32")
    facts["peak"] = [memory.peak - memory.before, large.model_size()]
    build, loaders.models.load_model = loaders.models.load_model, lambda *_: None  # builds nothing
    for name in DISTILLED:
        with logged() as facts["distilled"][name]:
            loaders.WuerstchenBundleLoader.execute(name) if name == DISTILLED_BUNDLE else model(name)
    loaders.models.load_model = build
    facts["table unchanged"] = table == folder_paths.folder_names_and_paths
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
