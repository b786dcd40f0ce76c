"""Run by ComfyUI's Python, `inside_model_walk.py COMFYUI BUNDLE V1_BUNDLE OUTPUT`: every node from MODEL to MODEL on
both stages of v2 and the prior of v1, for test_host_model_walk.py."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from conditioning_walk import logged
from safetensors.torch import save_file
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

STAGES = {"Stage C": ("prior", (1, 16, 12, 12)), "Stage B": ("decoder", (1, 4, 32, 32))}
STEPS, CFG, SEED = 3, 3.0, 11

# Values for inputs whose defaults change nothing here, or name blocks that the small models lack.
VALUES: dict[str, Any] = {
    "attention": "pytorch attention",
    "backend": "eager",
    "block_number": 3,
    "blocks": "1",
    "context_length": 6,
    "context_overlap": 2,
    "dim": 2,
    "double_layers": "1",
    "dtype": "bf16",
    "end_percent": 1.0,
    "end_sigma": 0.0,
    "force_sequential_txt_ids": True,
    "layers": "1",
    "nerf_tile_size": 16,
    "reuse_threshold": 1.5,
    "single_layers": "1",
    "start_percent": 0.0,
    "start_sigma": 1000.0,
    "tile_size": 32,
}


# Nodes that do nothing without a file of another family, and the patches that they set.
OTHER_FILES = {
    "AnimaLLLiteApply",
    "LTXVReferenceAudio",
    "QwenImageDiffsynthControlnet",
    "SUPIRApply",
    "USOStyleReference",
    "WanInfiniteTalkToVideo",
    "WanUni3CControlnetApply",
    "ZImageFunControlnet",
}
FOREIGN_PATCHES = ("double_block", "post_input", "noise_refiner", "mlp_patch", "attn2_output_patch", "emb_patch")


def call(node: Any, **inputs: Any) -> Any:
    """Returns the outputs of a node's class, in any form of ComfyUI's nodes."""
    bound = node if getattr(node, "FUNCTION", "").startswith("EXECUTE") else node()
    result = getattr(bound, node.FUNCTION)(**inputs)
    return getattr(result, "result", result)


class Walk:
    """One model and what nodes need beside it."""

    def __init__(self, model: Any, other: Any, stage: str, others: dict[str, Any]):
        part, shape = STAGES[stage]
        options = {"stable_cascade_prior": seeded(1, 16, 3, 3)} if part == "decoder" else {}
        width = model.model.params.clip_embd if part == "decoder" else model.model.params.c_cond
        text = 5 * seeded(1, 77, width)  # an untrained model hardly reads a text
        negative = text.roll(1, -1)
        self.model, self.stage, self.other = model, stage, other
        self.positive, self.negative = [[text, options]], [[negative, options]]
        self.latent = {"samples": seeded(*shape), "noise_mask": torch.linspace(0.1, 1, 64).expand(1, 64, 64)}
        self.values = {**others, "model2": other, "LATENT": self.latent, "CONDITIONING": self.positive}
        self.values["empty_conditioning"] = [[text * 0.5, {}]]
        with logged() as self.plain_notices:
            self.plain = self.sample(model)
        self.shapes: set[Any] = set()  # block, queries and keys of replaced attention

    def sample(self, model: Any) -> Tensor:
        import nodes

        common = ("euler_ancestral", "simple", self.positive, self.negative, self.latent)
        return nodes.KSampler().sample(model, SEED, STEPS, CFG, *common)[0]["samples"]

    def inputs(self, node: Any) -> dict[str, Any]:
        """Returns arguments of a node: the defaults, but 0.5 for 1.0, with which many nodes change nothing."""
        kinds = node.INPUT_TYPES()
        out = {}
        for name, (kind, *rest) in {**kinds.get("required", {}), **kinds.get("optional", {})}.items():
            options = rest[0] if rest else {}
            if name in VALUES:
                out[name] = VALUES[name]
            elif name in self.values:
                out[name] = self.values[name]
            elif isinstance(kind, list) or kind == "COMBO":
                choices = options.get("options", kind)
                out[name] = options.get("default", choices[0] if choices else "")
            elif kind in self.values:
                out[name] = self.values[kind]
            elif kind == "MODEL":
                out[name] = self.model
            elif "default" in options:
                out[name] = 0.5 if kind == "FLOAT" and options["default"] == 1.0 else options["default"]
        return out

    def apply(self, node: Any) -> Any:
        outputs = call(node, **self.inputs(node))
        return outputs[list(node.RETURN_TYPES).index("MODEL")]

    def patched(self, name: str) -> dict[str, Any]:
        """Returns the outcome of a patch that only other families call."""
        model = self.model.clone()
        model.set_model_patch(lambda *args: 1 / 0, name)
        return self.outcome(lambda: model)

    def neutral(self) -> dict[str, float]:
        """Returns the changes by patches that compute what the network does, and between equal pairs of patches."""
        from comfy.ldm.modules.attention import optimized_attention
        from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply, UNetSelfAttentionMultiply

        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            self.shapes.add((extra["block"], q.shape[1], k.shape[1]))
            return optimized_attention(q, k, v, extra["n_heads"])

        def node(kind: Any, model: Any, *factors: float) -> Any:
            result = kind.execute(model, *factors) if hasattr(kind, "execute") else kind().patch(model, *factors)
            return getattr(result, "result", result)[0]

        models = {name: self.model.clone() for name in ("attn1", "attn2", "inputs", "queries", "blocks", "dit")}
        models["attn1"].set_model_attn1_replace(attend, "middle", 0)
        models["attn2"].set_model_attn2_replace(attend, "middle", 0)
        models["inputs"].set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
        models["queries"].set_model_attn2_patch(lambda q, k, v, extra: (q.clone(), k, v))  # two sets of queries
        models["blocks"].set_model_output_block_patch(lambda x, skip, options: (x, skip))
        models["dit"].set_model_patch_replace(
            lambda args, extra: extra["original_block"](args), "dit", "double_block", 1
        )
        changes = {name: self.change(self.sample(model), self.plain) for name, model in models.items()}
        both = node(
            UNetCrossAttentionMultiply, node(UNetSelfAttentionMultiply, self.model, 0.5, 2.0, 0.5, 1), 0.5, 2, 0.5, 1
        )
        with logged() as said:
            both.get_key_patches()
        assert any("attention-multiply" in text for text in said)
        assert {x.shape for x in both.model_state_dict().values()}  # every listed name has a weight
        weights = self.model.clone()  # the same factors on the weights that both share
        for key in self.model.model.state_dict():
            for layer, factor in (("to_q", 0.5), ("to_k", 2.0), ("to_v", 0.5)):
                if f"attention.{layer}." in key:
                    weights.add_patches({key: (None,)}, 0.0, factor)
        changes["factors"] = self.change(self.sample(both), self.sample(weights))
        passed, stg = self.model.clone(), self.model.clone()
        passed.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
        network = self.model.model.diffusion_model
        middle = next(b.number for b in network.attention_blocks().values() if b.place == ("middle", 0))
        stg.model_options["transformer_options"]["stg_self_attn_blocks"] = {middle}
        changes["stg"] = self.change(self.sample(stg), self.sample(passed))
        return changes

    def custom(self) -> dict[str, list[str]]:
        """Returns the notices about another family's scheduler, and about a guider with an additional text."""
        import nodes

        classes = nodes.NODE_CLASS_MAPPINGS
        common = {"model": self.model, "positive": self.positive, "negative": self.negative, "cfg": CFG}
        [sampler] = call(classes["KSamplerSelect"], sampler_name="euler_ancestral")
        [noise] = call(classes["RandomNoise"], noise_seed=SEED)
        [turbo] = call(classes["SDTurboScheduler"], model=self.model, steps=4, denoise=1.0)
        [sigmas] = call(classes["BasicScheduler"], model=self.model, scheduler="simple", steps=4, denoise=1.0)
        [guider] = call(
            classes["PerpNegGuider"], **common, empty_conditioning=self.values["empty_conditioning"], neg_scale=1.0
        )
        rest = {"sampler": sampler, "latent_image": self.latent}
        with logged() as of_scheduler:
            call(classes["SamplerCustom"], **common, **rest, add_noise=True, noise_seed=SEED, sigmas=turbo)
        with logged() as of_guider:
            call(classes["SamplerCustomAdvanced"], **rest, noise=noise, guider=guider, sigmas=sigmas)
        return {"scheduler": self.new(of_scheduler), "guider": self.new(of_guider)}

    def new(self, notices: list[str]) -> list[str]:
        """Returns the notices that the unchanged MODEL does not cause."""
        return [text for text in dict.fromkeys(notices) if text not in self.plain_notices]

    @staticmethod
    def change(out: Tensor, plain: Tensor) -> float:
        return ((out - plain).norm() / plain.norm()).item()

    def outcome(self, change: Callable[[], Any]) -> dict[str, Any]:
        """Returns the relative change of the latents with a changed MODEL, this pack's warnings, and the error."""
        torch.manual_seed(SEED)
        with logged() as said:
            try:
                out = self.sample(change())
            except Exception as error:  # every node's
                return {"error": f"{type(error).__name__}: {error}", "said": self.new(said)}
        change = (out - self.plain).norm() / self.plain.norm() if out.shape == self.plain.shape else torch.tensor(1.0)
        return {
            "change": round(change.item(), 6),
            "finite": bool(out.isfinite().all()),
            "said": self.new(said),
        }


def write_files(folder: Path, widths: set[int], networks: list[Any]) -> dict[str, Any]:
    """Writes a LoRA and a hypernetwork that fit all networks; returns the nodes' inputs that name them."""
    import folder_paths

    lora = {}
    for network in networks:
        name, layer = next((name, layer) for name, layer in network.named_modules() if name.endswith("channelwise.0"))
        lora[f"diffusion_model.{name}.lora_up.weight"] = seeded(layer.out_features, 2)
        lora[f"diffusion_model.{name}.lora_down.weight"] = seeded(2, layer.in_features)
    save_file(lora, folder / "walk.safetensors")
    layers = [{"linear.weight": torch.eye(width), "linear.bias": torch.ones(width)} for width in widths]
    torch.save({width: (one, one) for width, one in zip(widths, layers, strict=True)}, folder / "walk.pt")
    for kind in ("loras", "hypernetworks"):
        folder_paths.add_model_folder_path(kind, str(folder))
    return {"lora_name": "walk.safetensors", "hypernetwork_name": "walk.pt", "LORA_MODEL": lora, "clip": None}


def main(bundle: str, v1_bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    load_pack()
    from pack.nodes.host import models, vae
    from pack.wuerstchen_core.checkpoints import read_part

    stage_a = vae.load_stage_a(read_part(bundle, "vqgan"))
    others = {"VAE": stage_a, "IMAGE": seeded(1, 64, 64, 3).sigmoid(), "MASK": torch.ones(1, 64, 64)}
    others |= {kind: MagicMock() for kind in ("MODEL_PATCH", "AUDIO", "CLIP_VISION_OUTPUT")}
    others |= {"LATENT_OPERATION": lambda latent: latent * 0.9}
    walks = {}
    sources = {"v2 C": (bundle, "Stage C"), "v2 B": (bundle, "Stage B"), "v1 C": (v1_bundle, "Stage C")}
    pairs = {
        key: [models.load_model(read_part(source, STAGES[stage][0])) for _ in range(2)]
        for key, (source, stage) in sources.items()
    }
    networks = [model.model.diffusion_model for model, _ in pairs.values()]
    widths = {block.kv_mapper[1].out_features for network in networks for block in network.attention_blocks().values()}
    others |= write_files(Path(tempfile.mkdtemp(dir=".")).resolve(), widths, networks)
    for key, (model, other) in pairs.items():
        for weight in other.model.diffusion_model.parameters():
            weight.mul_(0.8)
        walks[key] = Walk(model, other, sources[key][1], others)
    found: dict[str, Any] = {}
    for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        if "MODEL" not in getattr(node, "RETURN_TYPES", ()) or name.startswith("Wuerstchen"):
            continue
        kinds = node.INPUT_TYPES()
        kinds = {**kinds.get("required", {}), **kinds.get("optional", {})}
        if name not in OTHER_FILES and any(kind[0] == "MODEL" for kind in kinds.values()):
            found[name] = {key: walk.outcome(partial(walk.apply, node)) for key, walk in walks.items()}
    VALUES["reuse_threshold"] = 0.0
    cache, windows = (nodes.NODE_CLASS_MAPPINGS[name] for name in ("EasyCache", "ContextWindowsManual"))
    along: dict[int, Any] = {}
    for VALUES["dim"] in (1, 4):
        along[VALUES["dim"]] = {key: walk.outcome(partial(walk.apply, windows)) for key, walk in walks.items()}
    return {}, {
        "windows": along,
        "nodes": found,
        "patches": {kind: {key: walk.patched(kind) for key, walk in walks.items()} for kind in FOREIGN_PATCHES},
        "idle cache": {key: walk.outcome(partial(walk.apply, cache)) for key, walk in walks.items()},
        "custom": {key: walk.custom() for key, walk in walks.items()},
        "neutral": {key: walk.neutral() for key, walk in walks.items()},
        "shapes": {key: sorted(walk.shapes) for key, walk in walks.items()},
    }


if __name__ == "__main__":
    write_results(main)
