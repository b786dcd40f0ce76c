"""Run by a ComfyUI's own Python, `inside_tokens.py COMFYUI V1 OUTPUT`: paints with the parts of an untrained model of
v1 by the nodes, beside what the core paints (`got/...` and `want/...`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from inside_memory import small_device
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

SIZE = (16, 32)  # of Stage B's latents; Stage C's are 2x3
HOW = {"steps": 3, "cfg": 2.0, "cfg_end": 0.0, "temperature": 1.0, "temperature_end": 0.6, "mode": "multinomial"}
RUNS: dict[str, dict[str, Any]] = {  # what differs from HOW
    "multinomial": {},
    "argmax": {"mode": "argmax"},
    "quantised": {"mode": "quantised"},
    "guidance to 1": {"cfg": 4.0, "cfg_end": 1.0},
    "no guidance": {"cfg": 1.0},
    "cold": {"temperature": 0.2, "temperature_end": 0.1},
}
SEED, BATCH = 7, 2
RENOISED = 0.4
# What is done wrong, and words of the answer.
MISTAKES: dict[str, tuple[str, ...]] = {
    "two prompts": ("one conditioning", "2 combined", "one Würstchen Text Encode"),
    "area": ("with an area", "take that away"),
    "mask": ("with a mask",),
    "range": ("with a range of steps",),
    "other text": ("24 wide", "is 32 wide", "Würstchen Text Encode"),
    "no stage c": ("no Stage C latents", "Würstchen Decoder Conditioning"),
    "no negative": ("needs a negative", "cfg to 1"),
    "image encoder as vae": ("not Stage A", "vae output"),
    "another codebook": ("64 codes", "has 32", "belongs to it"),
    "odd size": ("multiples of",),
    "three pictures": ("2 empty latents for 3 pictures", "same batch size"),
    "v2's features": ("Würstchen v1", "of v2", "Würstchen Decoder Sample"),
    "v1's features": ("Würstchen v2", "of v1", "Würstchen Token Decoder Sample"),
    "empty, to be kept": ("empty latents", "denoise of 0.5", "set denoise to 1", "at its vae input"),
}


class Painter:
    """The nodes with what they are given unless a run says otherwise, and the core with the same."""

    def __init__(self, source: Any):
        from pack.nodes.host import models, vae
        from pack.nodes.sampling_v1 import WuerstchenTokenDecoderSample
        from pack.wuerstchen_core.checkpoints import build_part
        from pack.wuerstchen_core.inference.stages import Stages

        self.node = WuerstchenTokenDecoderSample
        self.decoder = models.load_model(source.part("token_decoder"))
        self.vae = vae.load_stage_a(source.part("vqgan"))
        self.core = Stages(**{name: build_part(source.part(name)) for name in ("prior", "token_decoder", "vqgan")})
        self.features, self.text = seeded(BATCH, 16, 2, 3), seeded(1, 77, 24)
        self.empty = seeded(1, 77, 24).flip(1)
        self.picture = seeded(BATCH, 4, *SIZE)

    def given(self, **more: Any) -> dict[str, Any]:
        from pack.nodes.host.conditioning import PRIOR_KEY

        canvas = {"samples": torch.zeros(BATCH, 4, *SIZE)}
        conds = {"positive": [[self.text, {PRIOR_KEY: self.features}]], "negative": [[self.empty, {}]]}
        return {"token_decoder": self.decoder, "vae": self.vae, "stage_b": canvas, **conds, **HOW, "seed": SEED, **more}

    def paint(self, **more: Any) -> Tensor:
        return self.node.execute(**self.given(**more)).args[0]["samples"]

    def want(self, how: dict[str, Any], seed: int = SEED, **told: Any) -> Tensor:
        from pack.wuerstchen_core.inference.settings import V1

        how = {**HOW, **how}
        sampling = replace(
            V1,
            width=SIZE[1] * 4,
            height=SIZE[0] * 4,
            decoder_steps=how["steps"],
            decoder_guidance=how["cfg"],
            decoder_guidance_end=how["cfg_end"] or None,
            temperature=(how["temperature"], how["temperature_end"]),
            token_mode=how["mode"],
        )
        text = self.text.expand(BATCH, -1, -1)
        return self.core.sample_decoder(self.features, text, sampling, negative=self.empty, seed=seed, **told)


def runs(painter: Painter) -> dict[str, Tensor]:
    """Every mode; one picture of a batch alone; a masked picture; and a longer negative."""
    tensors: dict[str, Tensor] = {}
    for name, how in RUNS.items():
        tensors[f"got/{name}"] = painter.paint(**how)
        tensors[f"want/{name}"] = painter.want(how)
    alone = {"samples": torch.zeros(1, 4, *SIZE), "batch_index": [1]}
    conds = painter.given()["positive"]
    one = [[painter.text, {**conds[0][1], "stable_cascade_prior": painter.features[1:]}]]
    tensors["got/the second alone"] = painter.paint(stage_b=alone, positive=one)
    tensors["want/the second alone"] = tensors["want/multinomial"][1:]
    mask = torch.zeros(1, SIZE[0] * 4, SIZE[1] * 4)
    mask[..., 32:] = 1
    masked = {"samples": painter.picture, "noise_mask": mask}
    tensors["got/masked"] = painter.paint(stage_b=masked)
    cells = mask[:, None, ::4, ::4].expand(BATCH, -1, -1, -1)
    tensors["want/masked"] = painter.want({}, init=painter.picture, mask=cells)
    tensors["kept"] = painter.core.vqgan.quantize(painter.picture).latents[..., :8]
    tensors["got/ignored"] = painter.paint(stage_b={"samples": painter.picture})
    tensors["want/ignored"] = tensors["want/multinomial"]
    tensors["got/as it is"] = painter.paint(stage_b={"samples": painter.picture}, denoise=0.0)
    tensors["want/as it is"] = painter.picture
    return tensors


def started(painter: Painter) -> Tensor:
    """The tokens that the network sees first where it starts from a picture, and the picture's: [2 * BATCH, H, W]."""
    network, seen = painter.decoder.model.diffusion_model, []

    def call(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tokens[:BATCH])
        return forward(tokens, *args, **kwargs)

    forward, network.forward = network.forward, call
    try:
        painter.paint(stage_b={"samples": painter.picture}, denoise=RENOISED)
    finally:
        del network.forward
    return torch.cat([seen[0], painter.core.vqgan.quantize(painter.picture).indices])


def watched(painter: Painter) -> dict[str, Any]:
    """What the host's progress bar is told; a run that is cancelled after its first step, and the next."""
    import comfy.model_management as management
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    told: list[list[Any]] = []

    def hook(value: int, total: int, preview: Any, *_: Any, **__: Any) -> None:
        told.append([value, total, list(preview[1].size) if preview else None])

    def cancel(value: int, *_: Any, **__: Any) -> None:
        told.append([value, 0, None])
        management.interrupt_current_processing(True)  # the newer host tells the first step and the last, at this pace

    before = painter.paint(**{**HOW, "steps": 4})
    with patch.object(args, "preview_method", LatentPreviewMethod.Latent2RGB):
        comfy.utils.set_progress_bar_global_hook(hook)
        painter.paint()
    complete, told[:] = list(told), []
    comfy.utils.set_progress_bar_global_hook(cancel)
    cancelled = False
    try:
        painter.paint(**{**HOW, "steps": 4})
    except management.InterruptProcessingException:
        cancelled = True
    comfy.utils.set_progress_bar_global_hook(None)
    after = torch.equal(before, painter.paint(**{**HOW, "steps": 4}))
    return {"complete": complete, "cancelled": cancelled, "until": told[-1][0], "after": after}


def mistakes(painter: Painter, source: Any) -> dict[str, str]:
    from pack.nodes.host import models, vae
    from pack.nodes.host.conditioning import PRIOR_KEY, VERSION_KEY, prior_cond
    from pack.wuerstchen_core.checkpoints import Part
    from pack.wuerstchen_core.models.decoder import DecoderParams
    from pack.wuerstchen_core.models.vqgan import VQGAN

    [[text, options]] = painter.given()["positive"]

    def positive(**more: Any) -> Callable[[], Any]:
        return lambda: painter.paint(positive=[[text, {**options, **more}]])

    params = replace(source.part("vqgan").params, codebook_size=32)
    small = vae.load_stage_a(Part("vqgan", params, VQGAN(params).state_dict()))
    encoder = vae.load_image_encoder(source.part("image_encoder"))
    given = {"noise": torch.zeros(1, 4, *SIZE), VERSION_KEY: "v1"}
    wrong: dict[str, Callable[[], Any]] = {
        "two prompts": lambda: painter.paint(positive=painter.given()["positive"] * 2),
        "area": positive(area=(8, 8, 0, 0)),
        "mask": positive(mask=torch.ones(1, 8, 8)),
        "range": positive(start_percent=0.5, end_percent=1.0),
        "other text": lambda: painter.paint(positive=[[seeded(1, 77, 32), options]]),
        "no stage c": lambda: painter.paint(positive=[[text, {}]]),
        "no negative": lambda: painter.paint(negative=None),
        "image encoder as vae": lambda: painter.paint(vae=encoder),
        "another codebook": lambda: painter.paint(vae=small),
        "odd size": lambda: painter.paint(stage_b={"samples": torch.zeros(BATCH, 4, 16, 18)}),
        "three pictures": lambda: painter.paint(positive=[[text, {PRIOR_KEY: seeded(3, 16, 2, 3)}]]),
        "v2's features": positive(**{VERSION_KEY: "v2"}),
        "v1's features": lambda: prior_cond(DecoderParams(), given),
        "empty, to be kept": lambda: painter.paint(denoise=0.5),
    }
    answers = {}
    for name, run in wrong.items():
        try:
            run()
        except ValueError as error:
            answers[name] = str(error)
    assert models.TokenModel is type(painter.decoder.model)
    return answers


def prior(source: Any) -> dict[str, Tensor]:
    """v1's prior in our sampling beside the core's, and in the host's beside the same weights in v2's units."""
    import comfy.sample
    from pack.nodes.host import models
    from pack.nodes.sampling import WuerstchenPriorSample
    from pack.wuerstchen_core.checkpoints import build_part
    from pack.wuerstchen_core.inference.settings import V1
    from pack.wuerstchen_core.inference.stages import Stages
    from pack.wuerstchen_core.models.prior import PriorParams, latents_from_features

    part = source.part("prior")
    units = {name: getattr(PriorParams(), name) for name in ("feature_scale", "feature_shift")}
    first, second = (models.load_model(replace(part, params=p)) for p in (part.params, replace(part.params, **units)))
    text, empty = seeded(1, 77, 24), seeded(1, 77, 24).flip(1)
    cond, none = [[text, {}]], [[empty, {}]]
    canvas = {"samples": torch.zeros(1, 16, 2, 3)}
    how = {"schedule": "linear", "steps": 4, "cfg": 6.0, "seed": SEED}
    [out] = WuerstchenPriorSample.execute(first, cond, none, canvas, **how).args
    sampling = replace(V1, width=128, height=64, prior_steps=4)
    core = Stages(prior=build_part(part)).sample_prior(text, sampling, negative=empty, seed=SEED)
    noise = seeded(1, 16, 2, 3)
    steps = (4, 6.0, "euler", "simple", cond, none, canvas["samples"])
    outs = [comfy.sample.sample(model, noise, *steps, seed=SEED) for model in (first, second)]
    return {
        "got/prior": out["samples"],
        "want/prior": core,
        "got/prior in the host": outs[0],
        "want/prior in the host": latents_from_features(outs[1], PriorParams()),
    } | {"version": torch.tensor([out["wuerstchen_version"] == "v1"])}


def evicted(painter: Painter, source: Any) -> tuple[dict[str, Tensor], list[list[str]]]:
    """The token decoder and Stage A in turn on a device that holds one network."""
    with small_device() as meter:
        other = Painter(source)
        seen = []
        for _ in range(2):
            latents = other.paint()
            seen.append(meter.loaded())
            other.vae.decode(latents)
            seen.append(meter.loaded())
    return {"got/evicted": latents, "want/evicted": painter.paint()}, seen


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    from pack.wuerstchen_core.checkpoints.open import open_source

    source = open_source(Path(bundle))
    painter = Painter(source)
    tensors = runs(painter) | prior(source)
    tensors["started"] = started(painter)
    facts = {"watched": watched(painter), "mistakes": mistakes(painter, source)}
    more, facts["loaded in turn"] = evicted(painter, source)
    return tensors | more, facts


if __name__ == "__main__":
    write_results(main)
