"""Run by ComfyUI's Python, `inside_pictures_in.py COMFYUI BUNDLE OUTPUT`: images as input on small untrained networks
(`got/...`), the expected results (`want/...`), and the errors of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

Results = tuple[dict[str, Tensor], dict[str, Any]]

SIZES = {"as it is": (128, 192), "odd": (70, 101), "one pixel": (1, 1), "very wide": (10, 20_000)}  # height, width
STRENGTH, CFG, STEPS, SEED = 0.6, 2.0, 4, 3
SOFT = 0.6  # of a mask; the steps are at times 1, 0.75, 0.5 and 0.25


class Bundle:
    """The parts of the bundle as ComfyUI's objects, and the core's pipeline."""

    def __init__(self, path: str):
        from pack.nodes.host import models, vae
        from pack.wuerstchen_core import WuerstchenPipeline
        from pack.wuerstchen_core.checkpoints import read_part

        self.core = WuerstchenPipeline.load(path, device="cpu", dtype="fp32")
        self.prior, self.decoder = (models.load_model(read_part(path, name)) for name in ("prior", "decoder"))
        self.stage_a = vae.load_stage_a(read_part(path, "vqgan"))
        self.encoder = vae.load_image_encoder(read_part(path, "image_encoder"))
        widths = self.core.prior.params.c_cond, self.core.decoder.params.clip_embd
        self.text, self.decoder_text = (seeded(1, 77, width) for width in widths)


def pixels(height: int, width: int, channels: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def image(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255)


def encode(bundle: Bundle) -> Results:
    """Encodes images of every size, with and without alpha, with the node and with the core."""
    from pack.nodes.vae import WuerstchenImageEncode as Encode
    from pack.wuerstchen_core.inference.images import read_pixels

    tensors, facts = {}, {}
    for name, (height, width) in SIZES.items():
        channels = 3 if name == "as it is" else 4
        array = pixels(height, width, channels, 2 if name in ("as it is", "odd") else 1)
        c, b = Encode.execute(bundle.encoder, image(array), vae=bundle.stage_a).args
        views = torch.cat([read_pixels(Image.fromarray(one), None, None) for one in array])
        tensors[f"want/{name} c"] = torch.cat([bundle.core.encode(Image.fromarray(one)) for one in array])
        tensors[f"want/{name} b"] = bundle.core.vqgan.encode(views)
        tensors[f"got/{name} c"], tensors[f"got/{name} b"] = c["samples"], b["samples"]
        _, empty = Encode.execute(bundle.encoder, image(array)).args
        facts[f"{name} size"] = list(views.shape[-2:])
        facts[f"{name} empty"] = [list(empty["samples"].shape), float(empty["samples"].abs().sum())]

    mask = torch.zeros(1, 64, 96)  # another size than the image
    mask[:, 30:40, 60:] = 1
    picture = image(pixels(128, 192, 3))
    c, b = Encode.execute(bundle.encoder, picture, vae=bundle.stage_a, mask=mask).args
    tensors["mask c"], tensors["mask b"] = c["noise_mask"], b["noise_mask"]
    facts["mask without stage a"] = "noise_mask" in Encode.execute(bundle.encoder, picture, mask=mask).args[1]
    cropped, _ = Encode.execute(bundle.encoder, image(pixels(64, 256, 3)), mask=torch.ones(1, 64, 256)).args
    facts["mask of a cropped picture"] = float(cropped["noise_mask"].min())
    return tensors, facts


def saved(bundle: Bundle) -> Results:
    """Saves v2's image encoder with ComfyUI's VAESave and loads it with our node; recognises v1's by its size."""
    import folder_paths
    from comfy_extras.nodes_model_merging import VAESave
    from pack.nodes.host.conditioning import VERSION_KEY
    from pack.nodes.host.vae import load_image_encoder
    from pack.nodes.loaders import WuerstchenVAELoader
    from pack.nodes.vae import WuerstchenImageEncode as Encode
    from pack.wuerstchen_core.checkpoints import Part
    from pack.wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoder, ImageEncoderParams

    params, picture = ImageEncoderParams(), image(pixels(64, 64, 3))
    encoder = load_image_encoder(Part("image_encoder", params, ImageEncoder(params).state_dict()))
    folder = Path("saved").absolute()
    folder_paths.set_output_directory(str(folder))
    folder_paths.add_model_folder_path("vae", str(folder))
    VAESave().save(encoder, "encoder")
    [path] = folder.glob("*.safetensors")
    [again] = WuerstchenVAELoader.execute(path.name).args
    before, after = encoder.get_sd(), again.get_sd()
    same = list(before) == list(after) and all(torch.equal(x, after[key]) for key, x in before.items())
    c, _ = Encode.execute(again, picture).args
    large = ImageEncoder(ImageEncoderParams(EFFICIENTNET_V2_L), device="meta").state_dict()
    zeros = {key: torch.zeros((), dtype=x.dtype).expand(x.shape) for key, x in large.items()}  # holds no memory
    torch.save(zeros, folder / "encoder_v1.pt")
    [v1] = WuerstchenVAELoader.execute("encoder_v1.pt").args
    return {}, {
        "saved": [same, len(before)],
        "release": c[VERSION_KEY],
        "large": [v1.release, list(v1.encode(picture).shape)],
    }


def strength(bundle: Bundle) -> Results:
    """Runs both sampling nodes from an image: with a denoise of 0, between and 1, and with a mask."""
    from pack.nodes.host.conditioning import PRIOR_KEY
    from pack.nodes.sampling import WuerstchenDecoderSample, WuerstchenPriorSample
    from pack.wuerstchen_core.diffusion.samplers import guided, sample, seeded_noise
    from pack.wuerstchen_core.diffusion.schedule import diffuse, linear_times, strength_times
    from pack.wuerstchen_core.models.prior import features_from_latents, latents_from_features

    scale = bundle.core.vqgan.params.scale_factor
    features = seeded(1, 16, 3, 5)
    stages: dict[str, tuple[Callable[..., Tensor], Tensor, Any, tuple[Tensor, ...], Any, Any]] = {
        "prior": (
            lambda latent, **more: WuerstchenPriorSample.execute(
                bundle.prior, [[bundle.text, {}]], [[bundle.text * 0.5, {}]], latent, "linear", STEPS, CFG, SEED, **more
            ).args[0]["samples"],
            features,
            guided(bundle.core.prior, (bundle.text,), (bundle.text * 0.5,), CFG),
            latents_from_features,
            features_from_latents,
        ),
        "decoder": (
            lambda latent, **more: WuerstchenDecoderSample.execute(
                bundle.decoder, [[bundle.decoder_text, {PRIOR_KEY: features}]], latent, STEPS, 1.0, SEED, **more
            ).args[0]["samples"],
            seeded(1, 4, 32, 48) * scale,
            guided(bundle.core.decoder, *[(features, bundle.decoder_text)] * 2, 1.0),
            lambda x: x / scale,
            lambda x: x * scale,
        ),
    }
    tensors = {}
    for name, (run, x, denoiser, inner, outer) in stages.items():
        mask = torch.zeros(1, 1, *x.shape[-2:])
        mask[..., x.shape[-1] // 2 :] = 1
        kept = slice(0, x.shape[-1] // 2)
        tensors[f"want/{name} at 0"], tensors[f"got/{name} at 0"] = x, run({"samples": x}, denoise=0.0)
        tensors[f"want/{name} at 1"] = run({"samples": torch.zeros_like(x)})
        tensors[f"got/{name} at 1"] = run({"samples": x}, denoise=1.0)
        draw, times = seeded_noise(SEED, 1), strength_times(linear_times(STEPS), STRENGTH)
        start = diffuse(inner(x), times[:1], draw(x))
        tensors[f"want/{name} between"] = outer(sample(denoiser, start, times, draw=draw))
        tensors[f"got/{name} between"] = run({"samples": x}, denoise=STRENGTH)
        inside = {"samples": x, "noise_mask": mask}
        draw = seeded_noise(SEED, 1)
        noise = draw(x)
        start = diffuse(inner(x), times[:1], noise)
        core = sample(denoiser, start, times, draw=draw, init=inner(x), mask=mask, kept_noise=noise)
        tensors[f"want/{name} masked between"] = torch.where(mask > 0, outer(core), x)
        tensors[f"got/{name} masked between"] = run(inside, denoise=STRENGTH)
        tensors[f"want/{name} outside"], tensors[f"got/{name} outside"] = (
            latent[..., kept] for latent in (x, run(inside, denoise=STRENGTH))
        )
        other = torch.where(mask > 0, -x, x)  # the masked area cannot matter at 1
        tensors[f"want/{name} masked at 1"] = run({"samples": other, "noise_mask": mask})
        tensors[f"got/{name} masked at 1"] = run(inside)
    return tensors, {}


def kept_until(time: float, picture: Tensor, denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a denoiser that predicts the picture at times above `time`."""
    from pack.wuerstchen_core.diffusion.samplers import noise_in

    return lambda x, t: denoiser(x, t) if t[0] <= time else noise_in(x, picture, t)


def masks(bundle: Bundle) -> Results:
    """Samples both stages with masks in pixels: with our nodes and the core, then with ComfyUI's sampler and ours."""
    import comfy.sample
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
    from pack.nodes.host.conditioning import PRIOR_KEY
    from pack.nodes.host.sampling import sampler_object, stage_sigmas
    from pack.nodes.sampling import WuerstchenDecoderSample, WuerstchenPriorSample
    from pack.wuerstchen_core.diffusion.masks import latent_mask
    from pack.wuerstchen_core.diffusion.samplers import guided, sample, seeded_noise
    from pack.wuerstchen_core.diffusion.schedule import diffuse, linear_times, strength_times

    import nodes

    features, latents, height, width = seeded(1, 16, 3, 5), seeded(1, 4, 32, 48), 128, 192
    thin = torch.zeros(1, height, width)
    thin[..., 100:102] = 1
    cases = {
        "kept": torch.zeros(1, height, width),
        "soft": torch.full((1, height, width), SOFT),
        "feathered": torch.linspace(-0.3, 1.3, width).clamp(0, 1).expand(1, height, width),
        "thin": thin,
        "free": torch.ones(1, height, width),
    }
    prior_text, text = [[bundle.text, {}]], [[bundle.decoder_text, {PRIOR_KEY: features}]]

    def with_prior(model: Any, latent: Any, denoise: float = 1.0) -> Tensor:
        arguments = (model, prior_text, prior_text, latent, "linear", STEPS, 1.0, SEED, denoise)
        return WuerstchenPriorSample.execute(*arguments).args[0]["samples"]

    def with_decoder(model: Any, latent: Any, denoise: float = 1.0) -> Tensor:
        arguments = (model, text, latent, STEPS, 1.0, SEED, None, denoise)
        return WuerstchenDecoderSample.execute(*arguments).args[0]["samples"]

    stages = {
        "prior": (with_prior, bundle.prior, prior_text, features, guided(bundle.core.prior, *[(bundle.text,)] * 2)),
        "decoder": (
            with_decoder,
            bundle.decoder,
            text,
            latents,
            guided(bundle.core.decoder, *[(features, bundle.decoder_text)] * 2),
        ),
    }
    tensors, facts = {}, {}
    for name, (run, model, cond, x, denoiser) in stages.items():
        [differential] = DifferentialDiffusion.execute(model).args
        form, times = model.get_model_object("latent_format"), strength_times(linear_times(STEPS), STRENGTH)
        inner, outer = form.process_in, form.process_out
        for case, mask in cases.items():
            [latent] = nodes.SetLatentNoiseMask().set_mask({"samples": x}, mask)
            cells = latent_mask(mask[None], *x.shape[-2:])
            draw = seeded_noise(SEED, 1)
            noise = draw(x)
            start = diffuse(inner(x), times[:1], noise)
            core = sample(denoiser, start, times, draw=draw, init=inner(x), mask=cells, kept_noise=noise)
            tensors[f"want/{name} {case}"] = torch.where(cells > 0, outer(core), x)
            tensors[f"got/{name} {case}"] = run(model, latent, STRENGTH)
            for patcher in (model, differential):
                stock = nodes.common_ksampler(patcher, SEED, STEPS, 1.0, "euler", "simple", cond, cond, latent)[0]
                ours = comfy.sample.sample_custom(
                    patcher,
                    comfy.sample.prepare_noise(x, SEED),
                    1.0,
                    sampler_object("ddim"),
                    stage_sigmas(patcher, linear_times(STEPS)),
                    cond,
                    cond,
                    x,
                    noise_mask=latent["noise_mask"],
                    seed=SEED,
                )
                change = (stock["samples"] - x).square().mean().sqrt()
                difference = (ours - stock["samples"]).square().mean().sqrt()
                key = f"{name} {case}" + (" differential" if patcher is differential else "")
                facts[f"change/{key}"], facts[f"difference/{key}"] = float(change), float(difference)
        # With DifferentialDiffusion a soft mask keeps the image in the steps at times above its value.
        seen: list[Tensor] = []
        draw, until = seeded_noise(SEED, 1), kept_until(SOFT, inner(x), denoiser)
        sample(until, draw(x), linear_times(STEPS), draw=draw, callback=lambda *step, seen=seen: seen.append(step[3]))
        tensors[f"want/{name} differential"] = outer(seen[-1])
        tensors[f"got/{name} differential"] = run(differential, {"samples": x, "noise_mask": cases["soft"]})
    return tensors, {"masks": facts}


def reading(bundle: Bundle) -> Results:
    """Counts how often Stage C maps its texts in a run, without and with hooks that patch weights between the steps."""
    import comfy.hooks
    from pack.nodes.sampling import WuerstchenPriorSample

    network, calls = bundle.prior.model.diffusion_model, []
    handle = network.cond_mapper.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for options in ({}, {"hooks": comfy.hooks.create_hook_lora({}, 1.0, 0.0)}):
        calls.clear()
        positive, negative = [[bundle.text, options]], [[bundle.text * 0.5, {}]]
        empty = {"samples": torch.zeros(1, 16, 3, 5)}
        WuerstchenPriorSample.execute(bundle.prior, positive, negative, empty, "linear", STEPS, CFG, SEED)
        counts.append(len(calls))
    handle.remove()
    return {}, {"texts read": counts, "cache left": network.kv_cache is not None}


def interpolation(bundle: Bundle) -> Results:
    """Interpolates between two latents of each stage, and between two prompts."""
    from pack.nodes.host.conditioning import PRIOR_KEY, VERSION_KEY
    from pack.nodes.interpolate import WuerstchenConditioningInterpolate as Prompts
    from pack.nodes.interpolate import WuerstchenLatentInterpolate as Latents
    from pack.nodes.latents import tagged
    from pack.wuerstchen_core.diffusion.interpolate import TOKEN, slerp
    from pack.wuerstchen_core.models.prior import features_from_latents, latents_from_features

    import nodes

    def mix(a: dict[str, Any], b: dict[str, Any], factor: float) -> Tensor:
        return Latents.execute(a, b, factor).args[0]["samples"]

    c = seeded(3, 16, 3, 5)
    one, two = tagged(c[:1], "stage_c"), {"samples": c[1:]}  # without a tag, as from other nodes
    b = seeded(2, 4, 16, 16)
    tensors = {
        "want/c at 0": c[:1].expand(2, -1, -1, -1),
        "got/c at 0": mix(one, two, 0.0),
        "want/c at 1": c[1:],
        "got/c at 1": mix(one, two, 1.0),
        "want/c between": features_from_latents(
            slerp(latents_from_features(c[:1].expand(2, -1, -1, -1)), latents_from_features(c[1:]), 0.3)
        ),
        "got/c between": mix(one, two, 0.3),
        "want/b between": slerp(b[:1], b[1:], 0.7),
        "got/b between": mix({"samples": b[:1]}, {"samples": b[1:]}, 0.7),
    }
    width = bundle.text.shape[-1]
    raw = [{**x, VERSION_KEY: "v1"} for x in (tagged(c[:1], "stage_c"), tagged(c[1:2], "stage_c"))]
    tensors |= {"want/raw between": slerp(c[:1], c[1:2], 0.3), "got/raw between": mix(*raw, 0.3)}
    states = seeded(2, 77, width)
    first = [[states[:1], {PRIOR_KEY: c[:1], "strength": 0.5}]]
    second = [[states[1:], {PRIOR_KEY: c[1:2]}]]
    facts = {}
    for end in (0, 1):
        [[text, options]] = Prompts.execute(first, second, float(end)).args[0]
        facts[f"prompts at {end}"] = torch.equal(text, states[end : end + 1]) and options[PRIOR_KEY].equal(
            c[end : end + 1]
        )
    [[text, options]] = Prompts.execute(first, second, 0.3).args[0]
    facts["options"] = options["strength"]
    # ComfyUI's ConditioningAverage keeps the Stage C latents of the first.
    [[average, own]] = nodes.ConditioningAverage().addWeighted(first, second, 0.75)[0]
    facts["averaged latents"] = torch.equal(own[PRIOR_KEY], c[:1])
    tensors |= {"want/average": states[:1].lerp(states[1:], 0.25), "got/average": average}
    tensors |= {
        "want/prompts between": slerp(states[:1], states[1:], 0.3, TOKEN),
        "got/prompts between": text,
        "want/prompts' latents": tensors["want/c between"][:1],
        "got/prompts' latents": options[PRIOR_KEY],
    }
    return tensors, facts


def mistakes(bundle: Bundle) -> Results:
    """Returns the errors of wrong inputs."""
    from pack.nodes.host.conditioning import PRIOR_KEY, VERSION_KEY
    from pack.nodes.interpolate import WuerstchenConditioningInterpolate as Prompts
    from pack.nodes.interpolate import WuerstchenLatentInterpolate as Latents
    from pack.nodes.sampling import WuerstchenPriorSample
    from pack.nodes.vae import WuerstchenImageEncode as Encode
    from pack.nodes.vae import WuerstchenVAEDecode

    picture, c, b = image(pixels(64, 64, 3)), {"samples": seeded(2, 16, 2, 2)}, {"samples": seeded(1, 4, 16, 16)}
    text, long = [[seeded(1, 77, 8), {}]], [[seeded(1, 154, 8), {}]]
    wide, with_prior = [[seeded(1, 77, 9), {}]], [[seeded(1, 77, 8), {PRIOR_KEY: c["samples"]}]]
    sample = (bundle.prior, text, text)
    cases: dict[str, Callable[[], Any]] = {
        "stage a as encoder": lambda: Encode.execute(bundle.stage_a, picture),
        "encoder as stage a": lambda: Encode.execute(bundle.encoder, picture, vae=bundle.encoder),
        "encoder in decode": lambda: WuerstchenVAEDecode.execute(bundle.encoder, b),
        "sd latents in stage c": lambda: WuerstchenPriorSample.execute(*sample, b, "linear", 2, 1.0, 0, 0.5),
        "empty, denoise 0.5": lambda: WuerstchenPriorSample.execute(
            *sample, {"samples": torch.zeros(1, 16, 2, 2)}, "linear", 2, 1.0, 0, 0.5
        ),
        "two releases": lambda: WuerstchenPriorSample.execute(
            *sample, {**c, VERSION_KEY: "v1"}, "linear", 2, 1.0, 0, 0.5
        ),
        "latents of two releases": lambda: Latents.execute({**c, VERSION_KEY: "v1"}, {**c, VERSION_KEY: "v2"}, 0.5),
        "two stages": lambda: Latents.execute(c, b, 0.5),
        "two sizes": lambda: Latents.execute(c, {"samples": seeded(2, 16, 2, 3)}, 0.5),
        "two batches": lambda: Latents.execute(c, {"samples": seeded(3, 16, 2, 2)}, 0.5),
        "other latents": lambda: Latents.execute(b, {"samples": seeded(1, 8, 16, 16)}, 0.5),
        "two lengths": lambda: Prompts.execute(text, long, 0.5),
        "two towers": lambda: Prompts.execute(text, wide, 0.5),
        "one with latents": lambda: Prompts.execute(text, with_prior, 0.5),
        "several": lambda: Prompts.execute(text, text * 2, 0.5),
    }
    errors = {}
    for name, run in cases.items():
        try:
            run()
        except ValueError as error:
            errors[name] = str(error)
    return {}, {"mistakes": errors}


def main(path: str) -> Results:
    load_pack()
    bundle = Bundle(path)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for compute in (encode, saved, strength, masks, reading, interpolation, mistakes):
        more, found = compute(bundle)
        tensors |= more
        facts |= found
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
