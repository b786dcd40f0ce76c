"""Run by ComfyUI's Python, `inside_tokens.py COMFYUI V1 OUTPUT`: samples an untrained v1 model with the nodes
(`got/...`) and with the core (`want/...`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conditioning_walk import walk
from inside_memory import small_device
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

SIZE = (16, 32)  # of Stage B's latents; Stage C's are 2x3
SETTINGS = {"steps": 3, "cfg": 2.0, "cfg_end": 0.0, "temperature": 1.0, "temperature_end": 0.6, "mode": "multinomial"}
RUNS: dict[str, dict[str, Any]] = {  # differences from SETTINGS
    "multinomial": {},
    "argmax": {"mode": "argmax"},
    "quantised": {"mode": "quantised"},
    "guidance to 1": {"cfg": 4.0, "cfg_end": 1.0},
    "no guidance": {"cfg": 1.0},
    "cold": {"temperature": 0.2, "temperature_end": 0.1},
    "reuse": {"reuse": 2, "steps": 5},
}
SEED, BATCH = 7, 2
RENOISED = 0.4
# What is wrong, and what the error must name.
MISTAKES: dict[str, tuple[str, ...]] = {
    "two prompts": ("2 combined", "Würstchen Text Encode"),
    "area": ("area",),
    "mask": ("mask",),
    "range": ("step range",),
    "other text": ("24", "32 wide", "Würstchen Text Encode"),
    "no stage c": ("Stage C latents", "Würstchen Decoder Conditioning"),
    "no negative": ("negative", "cfg"),
    "image encoder as vae": ("Stage A", "vae output"),
    "another codebook": ("64 codes", "32"),
    "odd size": ("18x16", "72x64 pixels", "multiples"),
    "three pictures": ("2 empty latents", "3 Stage C latents", "batch size"),
    "v2's features": ("v1", "v2", "Würstchen Decoder Sample"),
    "v1's features": ("v1", "v2", "Würstchen Token Decoder Sample"),
    "empty, denoise 0.5": ("empty latents", "0.5", "Würstchen Image Encode", "vae input"),
}


class Sampler:
    """The node and the core with the same model and settings."""

    def __init__(self, source: Any):
        from pack.nodes.host import models, vae
        from pack.nodes.sampling_v1 import WuerstchenTokenDecoderSample
        from pack.wuerstchen_core.checkpoints import build_part
        from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline

        self.node = WuerstchenTokenDecoderSample
        self.decoder = models.load_model(source.part("token_decoder"))
        self.vae = vae.load_stage_a(source.part("vqgan"))
        self.core = WuerstchenPipeline(
            **{name: build_part(source.part(name)) for name in ("prior", "token_decoder", "vqgan")}
        )
        self.features, self.text = seeded(BATCH, 16, 2, 3), seeded(1, 77, 24)
        self.empty = seeded(1, 77, 24).flip(1)
        self.picture = seeded(BATCH, 4, *SIZE)

    def inputs(self, **changes: Any) -> dict[str, Any]:
        from pack.nodes.host.conditioning import PRIOR_KEY

        canvas = {"samples": torch.zeros(BATCH, 4, *SIZE)}
        conds = {"positive": [[self.text, {PRIOR_KEY: self.features}]], "negative": [[self.empty, {}]]}
        return {
            "token_decoder": self.decoder,
            "vae": self.vae,
            "stage_b": canvas,
            **conds,
            **SETTINGS,
            "seed": SEED,
            **changes,
        }

    def generate(self, **changes: Any) -> Tensor:
        return self.node.execute(**self.inputs(**changes)).args[0]["samples"]

    def core_result(self, changes: dict[str, Any], seed: int = SEED, **edit: Any) -> Tensor:
        from pack.wuerstchen_core.inference.settings import V1

        settings = {**SETTINGS, **changes}
        sampling = replace(
            V1,
            width=SIZE[1] * 4,
            height=SIZE[0] * 4,
            decoder_steps=settings["steps"],
            decoder_guidance=settings["cfg"],
            decoder_guidance_end=settings["cfg_end"] or None,
            temperature=(settings["temperature"], settings["temperature_end"]),
            token_mode=settings["mode"],
            decoder_reuse=settings.get("reuse", 1),
        )
        text = self.text.expand(BATCH, -1, -1)
        return self.core.sample_decoder(self.features, text, sampling, negative=self.empty, seed=seed, **edit)


def runs(sampler: Sampler) -> dict[str, Tensor]:
    """Samples with every setting, one image of a batch alone, a masked image, and with a denoise of 0 and 1."""
    tensors: dict[str, Tensor] = {}
    for name, changes in RUNS.items():
        tensors[f"got/{name}"] = sampler.generate(**changes)
        tensors[f"want/{name}"] = sampler.core_result(changes)
    alone = {"samples": torch.zeros(1, 4, *SIZE), "batch_index": [1]}
    conds = sampler.inputs()["positive"]
    one = [[sampler.text, {**conds[0][1], "stable_cascade_prior": sampler.features[1:]}]]
    tensors["got/the second alone"] = sampler.generate(stage_b=alone, positive=one)
    tensors["want/the second alone"] = tensors["want/multinomial"][1:]
    mask = torch.zeros(1, SIZE[0] * 4, SIZE[1] * 4)
    mask[..., 32:] = 1
    masked = {"samples": sampler.picture, "noise_mask": mask}
    tensors["got/masked"] = sampler.generate(stage_b=masked)
    cells = mask[:, None, ::4, ::4].expand(BATCH, -1, -1, -1)
    tensors["want/masked"] = sampler.core_result({}, init=sampler.picture, mask=cells)
    soft = mask * 0 + 0.6
    tensors["got/soft mask"] = sampler.generate(stage_b={"samples": sampler.picture, "noise_mask": soft})
    cells = torch.full((BATCH, 1, *SIZE), 0.6)
    tensors["want/soft mask"] = sampler.core_result({}, init=sampler.picture, mask=cells)
    tensors["kept"] = sampler.core.vqgan.quantize(sampler.picture).latents[..., :8]
    tensors["got/ignored"] = sampler.generate(stage_b={"samples": sampler.picture})
    tensors["want/ignored"] = tensors["want/multinomial"]
    tensors["got/as it is"] = sampler.generate(stage_b={"samples": sampler.picture}, denoise=0.0)
    tensors["want/as it is"] = sampler.picture
    return tensors


def start_tokens(sampler: Sampler) -> Tensor:
    """Returns the first tokens of a run that starts from an image, and the image's tokens: [2 * BATCH, H, W]."""
    network, seen = sampler.decoder.model.diffusion_model, []

    def call(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tokens[:BATCH])
        return forward(tokens, *args, **kwargs)

    forward, network.forward = network.forward, call
    try:
        sampler.generate(stage_b={"samples": sampler.picture}, denoise=RENOISED)
    finally:
        del network.forward
    return torch.cat([seen[0], sampler.core.vqgan.quantize(sampler.picture).indices])


def progress(sampler: Sampler) -> dict[str, Any]:
    """Records ComfyUI's progress hook, cancels a run after its first step, and runs again."""
    import comfy.model_management as management
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    calls: list[list[Any]] = []

    def hook(value: int, total: int, preview: Any, *_: Any, **__: Any) -> None:
        calls.append([value, total, list(preview[1].size) if preview else None])

    def cancel(value: int, *_: Any, **__: Any) -> None:
        calls.append([value, 0, None])
        management.interrupt_current_processing(True)  # newer ComfyUI versions report only the first and last step

    before = sampler.generate(**{**SETTINGS, "steps": 4})
    with patch.object(args, "preview_method", LatentPreviewMethod.Latent2RGB):
        comfy.utils.set_progress_bar_global_hook(hook)
        sampler.generate()
    complete, calls[:] = list(calls), []
    comfy.utils.set_progress_bar_global_hook(cancel)
    cancelled = False
    try:
        sampler.generate(**{**SETTINGS, "steps": 4})
    except management.InterruptProcessingException:
        cancelled = True
    comfy.utils.set_progress_bar_global_hook(None)
    after = torch.equal(before, sampler.generate(**{**SETTINGS, "steps": 4}))
    return {"complete": complete, "cancelled": cancelled, "until": calls[-1][0], "after": after}


def mistakes(sampler: Sampler, source: Any) -> dict[str, str]:
    from pack.nodes.host import models, vae
    from pack.nodes.host.conditioning import PRIOR_KEY, VERSION_KEY, prior_cond
    from pack.wuerstchen_core.checkpoints import Part
    from pack.wuerstchen_core.models.decoder import DecoderParams
    from pack.wuerstchen_core.models.vqgan import VQGAN

    [[text, options]] = sampler.inputs()["positive"]

    def positive(**more: Any) -> Callable[[], Any]:
        return lambda: sampler.generate(positive=[[text, {**options, **more}]])

    params = replace(source.part("vqgan").params, codebook_size=32)
    small = vae.load_stage_a(Part("vqgan", params, VQGAN(params).state_dict()))
    encoder = vae.load_image_encoder(source.part("image_encoder"))
    given = {"noise": torch.zeros(1, 4, *SIZE), VERSION_KEY: "v1"}
    wrong: dict[str, Callable[[], Any]] = {
        "two prompts": lambda: sampler.generate(positive=sampler.inputs()["positive"] * 2),
        "area": positive(area=(8, 8, 0, 0)),
        "mask": positive(mask=torch.ones(1, 8, 8)),
        "range": positive(start_percent=0.5, end_percent=1.0),
        "other text": lambda: sampler.generate(positive=[[seeded(1, 77, 32), options]]),
        "no stage c": lambda: sampler.generate(positive=[[text, {}]]),
        "no negative": lambda: sampler.generate(negative=None),
        "image encoder as vae": lambda: sampler.generate(vae=encoder),
        "another codebook": lambda: sampler.generate(vae=small),
        "odd size": lambda: sampler.generate(stage_b={"samples": torch.zeros(BATCH, 4, 16, 18)}),
        "three pictures": lambda: sampler.generate(positive=[[text, {PRIOR_KEY: seeded(3, 16, 2, 3)}]]),
        "v2's features": positive(**{VERSION_KEY: "v2"}),
        "v1's features": lambda: prior_cond(DecoderParams(), given),
        "empty, denoise 0.5": lambda: sampler.generate(denoise=0.5),
    }
    errors = {}
    for name, run in wrong.items():
        try:
            run()
        except ValueError as error:
            errors[name] = str(error)
    assert models.TokenModel is type(sampler.decoder.model)
    return errors


def prior(source: Any) -> dict[str, Tensor]:
    """Samples v1's prior with our node and the core, and with KSampler in v1's units and in v2's."""
    import comfy.sample
    from pack.nodes.host import models
    from pack.nodes.sampling import WuerstchenPriorSample
    from pack.wuerstchen_core.checkpoints import build_part
    from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline
    from pack.wuerstchen_core.inference.settings import V1
    from pack.wuerstchen_core.models.prior import PriorParams, latents_from_features

    part = source.part("prior")
    units = {name: getattr(PriorParams(), name) for name in ("feature_scale", "feature_shift")}
    first, second = (models.load_model(replace(part, params=p)) for p in (part.params, replace(part.params, **units)))
    text, empty = seeded(1, 77, 24), seeded(1, 77, 24).flip(1)
    cond, none = [[text, {}]], [[empty, {}]]
    canvas = {"samples": torch.zeros(1, 16, 2, 3)}
    settings = {"schedule": "linear", "steps": 4, "cfg": 6.0, "seed": SEED}
    [out] = WuerstchenPriorSample.execute(first, cond, none, canvas, **settings).args
    sampling = replace(V1, width=128, height=64, prior_steps=4)
    core = WuerstchenPipeline(prior=build_part(part)).sample_prior(text, sampling, negative=empty, seed=SEED)
    noise = seeded(1, 16, 2, 3)
    steps = (4, 6.0, "euler", "simple", cond, none, canvas["samples"])
    outs = [comfy.sample.sample(model, noise, *steps, seed=SEED) for model in (first, second)]
    return {
        "got/prior": out["samples"],
        "want/prior": core,
        "got/prior in KSampler": outs[0],
        "want/prior in KSampler": latents_from_features(outs[1], PriorParams()),
    } | {"version": torch.tensor([out["wuerstchen_version"] == "v1"])}


def evicted(sampler: Sampler, source: Any) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Runs the token decoder and Stage A in turn on a device with room for one network."""
    with small_device() as meter:
        other = Sampler(source)
        seen = []
        for _ in range(2):
            latents = other.generate()
            seen.append(meter.loaded())
            other.vae.decode(latents)
            seen.append(meter.loaded())
    return {"got/evicted": latents, "want/evicted": sampler.generate()}, seen


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    from pack.wuerstchen_core.checkpoints.open import open_source

    source = open_source(Path(bundle))
    sampler = Sampler(source)
    tensors = runs(sampler) | prior(source)
    tensors["start"] = start_tokens(sampler)
    facts = {"progress": progress(sampler), "mistakes": mistakes(sampler, source)}
    facts["nodes"] = walk(
        lambda positive, negative: sampler.generate(steps=1, positive=positive, negative=negative),
        sampler.inputs()["positive"], [[sampler.empty, {"stable_cascade_prior": sampler.features}]], None, sampler.vae,
    )  # fmt: skip
    more, facts["loaded in turn"] = evicted(sampler, source)
    return tensors | more, facts


if __name__ == "__main__":
    write_results(main)
