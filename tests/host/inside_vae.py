"""Run by ComfyUI's Python, `inside_vae.py COMFYUI BUNDLE OUTPUT`: our VAE objects in ComfyUI's VAE nodes (`got/...`)
and the expected results (`want/...`)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

Results = tuple[dict[str, Tensor], dict[str, Any]]

TILES = ((64, 32), (128, 32), (96, 64), (512, 64))  # size and overlap in pixels
ODD = (70, 101)  # height and width that are no multiples


def picture(height: int, width: int, count: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(7))


def stage_a(bundle: str) -> Results:
    """Runs Stage A in ComfyUI's nodes: whole, tiled, cropped, without alpha, in half precision."""
    from comfy.cli_args import args
    from pack.nodes.host.vae import load_stage_a
    from pack.wuerstchen_core.checkpoints import load_vqgan, read_part

    import nodes

    core, vae = load_vqgan(bundle), load_stage_a(read_part(bundle, "vqgan"))
    latents = seeded(2, 4, 48, 56)

    def decode(x: Tensor) -> Tensor:
        return core.decode(x).clamp(0, 1).movedim(1, -1)

    def encode(x: Tensor) -> Tensor:
        return core.encode(x.movedim(-1, 1))

    got, want, facts = {}, {}, {"dtype": str(vae.vae_dtype)}
    [got["decode"]], want["decode"] = nodes.VAEDecode().decode(vae, {"samples": latents}), decode(latents)
    for size, overlap in TILES:
        [tiled] = nodes.VAEDecodeTiled().decode(vae, {"samples": latents[:1]}, size, overlap)
        got[f"decode tiled {size} {overlap}"], want[f"decode tiled {size} {overlap}"] = tiled, decode(latents[:1])
    pixels = picture(192, 224, 2)
    [latent] = nodes.VAEEncode().encode(vae, pixels)
    got["encode"], want["encode"] = latent["samples"], encode(pixels)
    [latent] = nodes.VAEEncodeTiled().encode(vae, pixels, 128, 32)
    got["encode tiled"], want["encode tiled"] = latent["samples"], encode(pixels)
    odd = picture(*ODD)
    [latent] = nodes.VAEEncode().encode(vae, odd)
    got["encode odd"], want["encode odd"] = latent["samples"], encode(odd[:, 1:69, :100])
    transparent = picture(64, 64, channels=4)
    [latent] = nodes.VAEEncode().encode(vae, transparent)
    got["encode rgba"], want["encode rgba"] = latent["samples"], encode(transparent[..., :3])
    grey = picture(64, 64, channels=1)
    [latent] = nodes.VAEEncode().encode(vae, grey)
    got["encode grey"], want["encode grey"] = latent["samples"], encode(grey.expand(-1, -1, -1, 3))
    [latent] = nodes.VAEEncodeTiled().encode(vae, pixels, 64, 32)  # ComfyUI divides by 0: the overlap is half a tile
    got["encode narrow tiles"], want["encode narrow tiles"] = latent["samples"], encode(pixels)
    for name in ("bf16", "fp16"):
        with patch.object(args, f"{name}_vae", True):
            half = load_stage_a(read_part(bundle, "vqgan"))
        facts[name] = str(half.vae_dtype)
        [got[f"decode {name}"]], want[f"decode {name}"] = (
            nodes.VAEDecode().decode(half, {"samples": latents}),
            decode(latents),
        )
    return named(got, want), facts


def image_encoder(bundle: str) -> Results:
    """Runs the image encoder in ComfyUI's nodes with any size; the tiled node does not tile it either."""
    from pack.nodes.host.vae import load_image_encoder as load_vae
    from pack.wuerstchen_core.checkpoints import load_image_encoder, read_part
    from pack.wuerstchen_core.models.image_encoder import semantic_view

    import nodes

    core, vae = load_image_encoder(bundle), load_vae(read_part(bundle, "image_encoder"))
    got, want = {}, {}
    for name, pixels in (("odd", picture(*ODD, 2)), ("rgba", picture(128, 64, channels=4))):
        [latent] = nodes.VAEEncode().encode(vae, pixels)
        got[f"semantic {name}"] = latent["samples"]
        want[f"semantic {name}"] = core(semantic_view(pixels[..., :3].movedim(-1, 1)))
    [latent] = nodes.VAEEncodeTiled().encode(vae, picture(*ODD, 2), 64, 32)
    got["semantic tiled"], want["semantic tiled"] = latent["samples"], want["semantic odd"]
    from comfy.cli_args import args

    for name in ("bf16", "fp16"):  # a CPU cannot resize images in these
        with patch.object(args, f"{name}_vae", True):
            half = load_vae(read_part(bundle, "image_encoder"))
        [latent] = nodes.VAEEncode().encode(half, picture(*ODD, 2))
        got[f"semantic {name}"], want[f"semantic {name}"] = latent["samples"], want["semantic odd"]
    grey, mask = torch.full((1, *ODD, 3), 0.5), torch.ones(1, *ODD)
    [latent] = nodes.VAEEncodeForInpaint().encode(vae, picture(*ODD), mask)
    got["semantic inpaint"], want["semantic inpaint"] = latent["samples"], core(semantic_view(grey.movedim(-1, 1)))
    return named(got, want), {"semantic mask": list(latent["noise_mask"].shape)}


# What is wrong, and what the error must name.
MISTAKES: dict[str, tuple[str, ...]] = {
    "stage c": ("Stage B", "[1, 16, 3, 5]", "Würstchen Decoder Sample"),
    "stage c, tiled": ("Stage B", "[1, 16, 3, 5]", "Würstchen Decoder Sample"),
    "not finite": ("Stage B", "not finite"),
    "not finite, tiled": ("Stage B", "not finite"),
    "a video's latents": ("Stage B", "[1, 4, 2, 8, 8]"),
    "encoder": ("image encoder", "Stage A"),
    "encoder, tiled": ("image encoder", "Stage A"),
    "two channels": ("[1, 64, 64, 2]", "image"),
    "two channels, tiled": ("[1, 64, 64, 2]", "image"),
    "two channels to the encoder": ("[1, 64, 64, 2]", "image"),
    "two channels to our node": ("[1, 64, 64, 2]", "image"),
    "too small": ("[1, 3, 64, 3]", "4 or more pixels"),
    "another family in our node": ("Stage A", "vae output"),
    "no VAE in our node": ("Stage A", "vae output"),
}


def mistakes(bundle: str) -> Results:
    """Gives our VAEs to ComfyUI's nodes, and other VAEs to ours, with what they cannot take; returns the errors."""
    from pack.nodes.host import vae
    from pack.nodes.vae import WuerstchenImageEncode, WuerstchenVAEDecode
    from pack.wuerstchen_core.checkpoints import read_part

    import nodes

    stage_a = vae.load_stage_a(read_part(bundle, "vqgan"))
    encoder = vae.load_image_encoder(read_part(bundle, "image_encoder"))
    stage_b, stage_c = ({"samples": seeded(*shape)} for shape in ((1, 4, 8, 8), (1, 16, 3, 5)))
    flat = picture(64, 64, channels=2)
    cases = {
        "stage c": lambda: nodes.VAEDecode().decode(stage_a, stage_c),
        "stage c, tiled": lambda: nodes.VAEDecodeTiled().decode(stage_a, stage_c, 64, 16),
        "not finite": lambda: nodes.VAEDecode().decode(stage_a, {"samples": stage_b["samples"] / 0}),
        "not finite, tiled": lambda: nodes.VAEDecodeTiled().decode(
            stage_a, {"samples": stage_b["samples"] / 0}, 64, 16
        ),
        "a video's latents": lambda: nodes.VAEDecode().decode(stage_a, {"samples": seeded(1, 4, 2, 8, 8)}),
        "encoder": lambda: nodes.VAEDecode().decode(encoder, stage_c),
        "encoder, tiled": lambda: nodes.VAEDecodeTiled().decode(encoder, stage_b, 64, 16),
        "two channels": lambda: nodes.VAEEncode().encode(stage_a, flat),
        "two channels, tiled": lambda: nodes.VAEEncodeTiled().encode(stage_a, flat, 64, 16),
        "two channels to the encoder": lambda: nodes.VAEEncode().encode(encoder, flat),
        "two channels to our node": lambda: WuerstchenImageEncode.execute(encoder, flat),
        "too small": lambda: nodes.VAEEncode().encode(stage_a, picture(3, 64)),
        "another family in our node": lambda: WuerstchenVAEDecode.execute(
            SimpleNamespace(latent_channels=16, upscale_ratio=8), stage_b
        ),
        "no VAE in our node": lambda: WuerstchenVAEDecode.execute(object(), stage_b),
    }
    errors = {}
    for name, run in cases.items():
        try:
            run()
        except ValueError as error:
            errors[name] = str(error)
    return {}, {"mistakes": errors}


def inpainting(bundle: str) -> Results:
    """Samples a masked image with our nodes and KSampler; `kept` is the area outside the mask."""
    from pack.nodes import sampling
    from pack.nodes.host import models, vae
    from pack.nodes.host.models import PRIOR_KEY
    from pack.wuerstchen_core.checkpoints import read_part

    import nodes

    prior, decoder = (models.load_model(read_part(bundle, name)) for name in ("prior", "decoder"))
    pixels = picture(128, 192)
    mask = torch.zeros(1, 128, 192)
    mask[:, :, 128:] = 1
    tensors = {}

    def keep(name: str, before: dict[str, Any], after: dict[str, Any], edge: int) -> None:
        tensors[f"want/{name} kept"], tensors[f"got/{name} kept"] = (
            latent["samples"][..., :edge] for latent in (before, after)
        )
        tensors[f"changed/{name}"] = (after["samples"] - before["samples"])[..., edge:]

    common = {"positive": None, "negative": None, "seed": 3, "steps": 4, "cfg": 2.0}
    stage_b = vae.load_stage_a(read_part(bundle, "vqgan"))
    [latent] = nodes.VAEEncodeForInpaint().encode(stage_b, pixels, mask, 0)
    text = [[seeded(1, 77, decoder.model.diffusion_model.params.clip_embd), {PRIOR_KEY: seeded(1, 16, 3, 5)}]]
    common["positive"] = common["negative"] = text
    [out] = sampling.WuerstchenDecoderSample.execute(model=decoder, stage_b=latent, **common).args
    keep("decoder node", latent, out, 32)
    [out] = nodes.KSampler().sample(
        decoder, sampler_name="euler", scheduler="simple", latent_image=latent, denoise=0.8, **common
    )
    keep("decoder ksampler", latent, out, 32)

    encoder = vae.load_image_encoder(read_part(bundle, "image_encoder"))
    [latent] = nodes.VAEEncode().encode(encoder, pixels)
    [latent] = nodes.SetLatentNoiseMask().set_mask(latent, mask)
    common["positive"] = common["negative"] = [[seeded(1, 77, prior.model.diffusion_model.params.c_cond), {}]]
    [out] = sampling.WuerstchenPriorSample.execute(model=prior, stage_c=latent, schedule="linear", **common).args
    keep("prior node", latent, out, 3)
    [out] = nodes.KSampler().sample(
        prior, sampler_name="ddpm", scheduler="simple", latent_image=latent, denoise=0.8, **common
    )
    keep("prior ksampler", latent, out, 3)
    return tensors, {}


def cancelling(bundle: str) -> Results:
    """Cancels Stage A after its first band of rows, the image encoder in its backbone, and each loader at its start."""
    import comfy.model_management as management
    from pack.nodes.host import clip, models, vae
    from pack.wuerstchen_core.checkpoints import read_part

    names = ("prior", "prior_text_encoder", "vqgan", "image_encoder")
    parts = {name: read_part(bundle, name) for name in names}
    loaders = dict(
        zip(names, (models.load_model, clip.load_clip, vae.load_stage_a, vae.load_image_encoder), strict=True)
    )
    stage_a, encoder = vae.load_stage_a(parts["vqgan"]), vae.load_image_encoder(parts["image_encoder"])
    latents, pixels, facts = seeded(1, 4, 72, 64), picture(64, 64), {}
    want = stage_a.decode(latents)

    def stops(work: Callable[[], Any]) -> bool:
        try:
            work()
        except management.InterruptProcessingException:
            return True
        finally:
            management.interrupt_current_processing(False)
        return False

    def after(block: torch.nn.Module, work: Callable[[], Any]) -> bool:
        hook = block.register_forward_hook(lambda *_: management.interrupt_current_processing(True))
        try:
            return stops(work)
        finally:
            hook.remove()

    facts["decode"] = after(stage_a.first_stage_model.out_block, lambda: stage_a.decode(latents))
    facts["encode"] = after(encoder.first_stage_model.encoder.backbone[0], lambda: encoder.encode(pixels))
    for name, load in loaders.items():
        management.interrupt_current_processing(True)
        facts[name] = stops(lambda load=load, name=name: load(parts[name]))
    return named({"after cancelling": stage_a.decode(latents)}, {"after cancelling": want}), {"stops": facts}


def named(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"got/{key}": x for key, x in got.items()} | {f"want/{key}": x for key, x in want.items()}


def main(bundle: str) -> Results:
    load_pack()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for compute in (stage_a, image_encoder, mistakes, inpainting, cancelling):
        more, found = compute(bundle)
        tensors |= more
        facts |= found
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
