"""Trains LoRAs with ComfyUI's own node, for inside_lora.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.comfyui.in_host import seeded

STEPS, PICTURES = 4, 3
ALGORITHMS = ("LoRA", "LoHa", "LoKr", "OFT")
OFFLOADED = {"offloading": True, "gradient_checkpointing": True, "checkpoint_depth": 3}


def call(node: Any, **inputs: Any) -> Any:
    """Returns the results of a node class of either kind."""
    return node.execute(**inputs).result if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**inputs)


def defaults(node: Any) -> dict[str, Any]:
    """Returns the default of each of a node's inputs that has one."""
    inputs = node.INPUT_TYPES()["required"]
    return {name: x[1]["default"] for name, x in inputs.items() if "default" in dict(*x[1:])}


def train(model: Any, latents: list[Any], positive: Any, **settings: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Returns the LoRA and the losses of ComfyUI's Train LoRA; newer versions take a list of latents."""
    from comfy_extras.nodes_train import TrainLoraNode

    torch.manual_seed(0)  # of the times
    inputs = defaults(TrainLoraNode) | {"steps": STEPS, "existing_lora": "[None]", "model": model} | settings
    inputs |= {"latents": latents[0], "positive": positive}
    if hasattr(TrainLoraNode, "execute"):
        inputs = {name: [value] for name, value in inputs.items()} | {"latents": latents}
    *_, lora, losses, _ = call(TrainLoraNode, **inputs)
    return lora, losses["loss"]


def error_of(run: Any, *arguments: Any) -> str:
    """Returns the message of the ValueError that a call raises; "" if it raises none."""
    try:
        run(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def predict(inputs: list[Tensor], prior: dict[str, Tensor], model: Any) -> Tensor:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.model.diffusion_model(*inputs, **prior)


def training(parts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains on both stages with all algorithms, and applies the results with ComfyUI's nodes."""
    import comfy.sd
    import folder_paths
    from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA, TrainLoraNode
    from pack.nodes.host import models
    from pack.wuerstchen_core.kernels.dispatch import is_plain

    known = defaults(TrainLoraNode)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"bypass": "bypass_mode" in known}
    for stage, part in parts.items():
        decoder = stage == "decoder"
        model = models.load_model(part)
        text = seeded(1, 77, part.params.clip_embd if decoder else part.params.c_cond)
        features, latents = seeded(1, 16, 1, 1), seeded(PICTURES, *((4, 8, 8) if decoder else (16, 2, 2)))
        prior = {"stable_cascade_prior": features} if decoder else {}
        inputs = [latents, torch.full((PICTURES,), 0.5), text.expand(PICTURES, -1, -1)]
        many = {key: x.expand(PICTURES, -1, -1, -1) for key, x in prior.items()}
        run = partial(train, model, [{"samples": latents}])
        conditioning = [[text, prior]]
        out = partial(predict, inputs, many)
        apply = partial(call, LoraModelLoader, model=model, strength_model=1.0)
        tensors[f"{stage}/untouched"] = out(model)
        exact = {"training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 0.003}
        facts[f"{stage}/slowest"] = run(conditioning, **exact | {"learning_rate": 1e-7})[1]
        for algorithm in ALGORITHMS:
            name = f"{stage}/{algorithm}"
            lora, facts[name] = run(conditioning, algorithm=algorithm, **exact)
            tensors[f"{name}/applied"] = out(*apply(lora=lora))
            if facts["bypass"]:
                for options in ({}, OFFLOADED) if algorithm == ALGORITHMS[0] else ({},):
                    bypassed, losses = run(conditioning, algorithm=algorithm, bypass_mode=True, **options, **exact)
                    facts.setdefault(f"{name}/bypassed", []).append(losses)
                tensors[f"{name}/bypass"] = out(*apply(lora=bypassed, bypass=True))
        layers = [layer for layer in model.model.diffusion_model.modules() if hasattr(layer, "weights")]
        tensors[f"{stage}/afterwards"] = out(model)
        facts[f"{stage}/plain"] = all(map(is_plain, layers))
        quantised = models.load_model(part, torch.float8_e4m3fn)
        facts[f"{stage}/fp8"] = train(quantised, [{"samples": latents}], conditioning, **exact)[1]

        with TemporaryDirectory() as folder:
            folder_paths.set_output_directory(folder)
            call(SaveLoRA, lora=lora, prefix="trained", steps=STEPS)
            [file] = Path(folder).iterdir()
            stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
            tensors[f"{stage}/saved"] = out(stock)
        facts[f"{stage}/batched"] = error_of(run, [[text if decoder else text.expand(PICTURES, -1, -1), many]])
        combined = conditioning * PICTURES
        facts[f"{stage}/combined"] = run(combined, **exact)[1]
        if facts["bypass"]:  # also takes lists of latents
            other = {"samples": seeded(1, *latents.shape[1:-1], 2 * latents.shape[-1])}
            facts[f"{stage}/sizes"] = error_of(train, model, [{"samples": latents}, other], conditioning)
        with torch.inference_mode(False):  # where ComfyUI copies models
            copy = models.load_model(part)
        facts[f"{stage}/copied"] = not any(x.is_inference() for x in copy.model.diffusion_model.parameters())
    return tensors, facts
