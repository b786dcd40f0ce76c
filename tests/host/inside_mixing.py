"""Run by ComfyUI's Python, `inside_mixing.py COMFYUI BUNDLE STAGE_A OUTPUT`: passes latents and images between
ComfyUI's nodes and ours, for test_host_mixing.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

SIDES = (256, 448, 832, 1024, 2048)  # of images, in pixels
Latent = dict[str, Any]


class Session:
    """The untrained model with a text for each stage, and short methods to sample."""

    def __init__(self, bundle: str):
        from pack.nodes.catalogue import NODES
        from pack.nodes.host import models
        from pack.wuerstchen_core.checkpoints import read_part

        self.ours = {node.__name__.removeprefix("Wuerstchen"): node for node in NODES}
        self.prior, self.decoder = (models.load_model(read_part(bundle, stage)) for stage in ("prior", "decoder"))
        networks = self.prior.model.diffusion_model, self.decoder.model.diffusion_model
        self.prior_text = [[seeded(1, 77, networks[0].params.c_cond), {}]]
        self.decoder_text = [[seeded(1, 77, networks[1].params.clip_embd), {}]]

    def empty(self, width: int, height: int, batch: int = 1) -> tuple[Latent, Latent]:
        return self.ours["EmptyLatents"].execute(width, height, batch).args

    def with_prior(self, stage_c: Latent) -> Any:
        return self.ours["DecoderConditioning"].execute(self.decoder_text, stage_c).args[0]

    def sample_c(self, stage_c: Latent, seed: int = 3) -> Latent:
        text = self.prior_text
        return self.ours["PriorSample"].execute(self.prior, text, text, stage_c, "linear", 2, 1.0, seed).args[0]

    def sample_b(self, positive: Any, stage_b: Latent, seed: int = 3) -> Latent:
        return self.ours["DecoderSample"].execute(self.decoder, positive, stage_b, 2, 1.0, seed).args[0]

    def ksampler(self, model: Any, positive: Any, latent: Latent) -> Latent:
        import nodes

        return nodes.common_ksampler(model, 3, 2, 1.0, "euler_ancestral", "simple", positive, positive, latent)[0]


def attempt(call: Callable[[], Latent]) -> Any:
    """Returns the shape of a call's latents, or the message of its ValueError."""
    try:
        return list(call()["samples"].shape)
    except ValueError as error:
        return str(error)


class Lines(logging.Handler):
    """The warnings of the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def units() -> dict[str, Tensor]:
    """Returns the same latents inside each family's sampler and outside it."""
    from comfy.latent_formats import SC_B
    from pack.nodes.host.models import DecoderLatents

    inner = {"ours": seeded(2, 4, 8, 6), "cascade": seeded(2, 4, 8, 6)}
    formats = {"ours": DecoderLatents(), "cascade": SC_B()}
    tensors = {}
    for one, other in (("ours", "cascade"), ("cascade", "ours")):
        outside = formats[one].process_out(inner[one])
        tensors |= {f"{one}/inside": inner[one], f"{one}/outside": outside}
        tensors[f"{one}/inside the other"] = formats[other].process_in(outside)
    return tensors


def stage_a(file: str) -> dict[str, Tensor]:
    """Decodes and encodes with ComfyUI's Stage A and ours, loaded from one file."""
    import comfy.sd
    import comfy.utils
    from pack.nodes.host.vae import load_stage_a
    from pack.wuerstchen_core.checkpoints import read_part

    import nodes

    vaes = {
        "stock": comfy.sd.VAE(sd=comfy.utils.load_torch_file(file)),
        "ours": load_stage_a(read_part(file, "vqgan")),
    }
    latent, pixels = {"samples": seeded(1, 4, 8, 12)}, seeded(1, 32, 48, 3).sigmoid()
    tensors = {"latents": latent["samples"], "pixels": pixels}
    for name, vae in vaes.items():
        tensors[f"{name}/decoded"] = nodes.VAEDecode().decode(vae, latent)[0]
        tensors[f"{name}/encoded"] = nodes.VAEEncode().encode(vae, pixels)[0]["samples"]
    return tensors


def cascade(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Samples with our nodes, and with Stable Cascade's nodes instead of ours."""
    from comfy_extras import nodes_stable_cascade as stock

    stage_c, stage_b = session.empty(256, 192)
    sampled = session.sample_c(stage_c)
    empty_c, empty_b = stock.StableCascade_EmptyLatentImage.execute(256, 192, 42).args
    tensors = {"ours": session.sample_b(session.with_prior(sampled), stage_b)["samples"]}
    stock_positive = stock.StableCascade_StageB_Conditioning.execute(session.decoder_text, sampled).args[0]
    tensors["stock"] = session.sample_b(stock_positive, empty_b)["samples"]
    sizes = {}
    for side in SIDES:
        latents = stock.StableCascade_EmptyLatentImage.execute(side, side, 42).args
        sizes[side] = [
            [latent["samples"].shape[-1] for latent in pair] for pair in (latents, session.empty(side, side))
        ]
    odd_c, odd_b = stock.StableCascade_EmptyLatentImage.execute(264, 256, 42).args
    return tensors, {
        "cascade sizes": sizes,
        "cascade empty c": attempt(lambda: session.sample_c(empty_c)),
        "cascade odd size": attempt(lambda: session.sample_b(session.with_prior(sampled), odd_b)),
        "cascade odd size in a KSampler": attempt(
            lambda: session.ksampler(session.decoder, session.with_prior(sampled), odd_b)
        ),
        "cascade odd size for stage c": attempt(lambda: session.sample_c(odd_c)),
    }


def others(session: Session) -> dict[str, Any]:
    """Passes other models' latents to KSampler and to our nodes."""
    from comfy_extras.nodes_sd3 import EmptySD3LatentImage

    import nodes

    sd = {side: nodes.EmptyLatentImage().generate(side, side)[0] for side in (256, 512)}
    sd3 = EmptySD3LatentImage.execute(512, 512).args[0]
    photo = {"samples": seeded(1, 4, 32, 32)}, {"samples": seeded(1, 16, 64, 64)}
    video = {"samples": seeded(1, 16, 1, 12, 12)}
    stage_c, stage_b = session.empty(256, 256)
    text, sampled = session.prior_text, session.sample_c(stage_c)
    positive = session.with_prior(sampled)
    lines = Lines()
    session.prior.model.trained = None  # no notices about its sizes
    logging.getLogger().addHandler(lines)
    facts = {
        "empty sd 512 in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, sd[512])),
        "empty sd3 512 in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, sd3)),
        "ours in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, stage_c)),
        "ours in a KSampler on stage b": attempt(lambda: session.ksampler(session.decoder, positive, stage_b)),
        "no warning": list(lines.lines),
        "empty sd 256 in a KSampler on stage b": attempt(lambda: session.ksampler(session.decoder, positive, sd[256])),
        "warning": list(lines.lines),
        "sd in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, photo[0])),
        "flux in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, photo[1])),
        "flux in a KSampler on stage b": attempt(lambda: session.ksampler(session.decoder, positive, photo[1])),
        "stage c in a KSampler on stage b": attempt(lambda: session.ksampler(session.decoder, positive, sampled)),
        "video in a KSampler on stage c": attempt(lambda: session.ksampler(session.prior, text, video)),
        "empty sd3 in our prior node": attempt(lambda: session.sample_c(sd3)),
        "flux in our conditioning node": attempt(lambda: session.with_prior(photo[1])),
        "empty sd in our decoder node": attempt(lambda: session.sample_b(positive, sd[256])),
    }
    logging.getLogger().removeHandler(lines)
    return facts


def another_model() -> Any:
    """Returns a small Stage C of Stable Cascade as a MODEL."""
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import Stable_Cascade_C

    sizes = {"c_hidden": [64], "nhead": [1], "blocks": [[1], [1]], "block_repeat": [[1], [1]], "level_config": ["C"]}
    more = {"c_cond": 64, "dropout": [0.0], "switch_level": [], "stable_cascade_stage": "c"}
    cpu = torch.device("cpu")
    return ModelPatcher(Stable_Cascade_C(sizes | more).get_model({}, device=cpu), cpu, cpu)


def other_models(session: Session) -> dict[str, Any]:
    """Passes another model's MODEL to our nodes."""
    stage_c, stage_b = session.empty(256, 256)
    positive = session.with_prior(stage_c)
    session.prior = session.decoder = another_model()
    return {
        "another model in our prior node": attempt(lambda: session.sample_c(stage_c)),
        "another model in our decoder node": attempt(lambda: session.sample_b(positive, stage_b)),
    }


def batches(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Passes our latents to ComfyUI's nodes for batches, sizes and masks."""
    import comfy_extras.nodes_post_processing  # noqa: F401 must come first: in one ComfyUI version it and the next import each other
    from comfy_extras.nodes_latent import LatentBatch

    import nodes

    take, repeat = nodes.LatentFromBatch().frombatch, nodes.RepeatLatentBatch().repeat
    stage_c, stage_b = session.empty(64, 128, batch=2)
    both_c = session.sample_c(stage_c)
    both_b = session.sample_b(session.with_prior(both_c), stage_b)
    second_c, second_b = session.sample_c(take(stage_c, 1, 1)[0]), take(stage_b, 1, 1)[0]
    tensors = {"both c": both_c["samples"], "both b": both_b["samples"], "second c": second_c["samples"]}
    tensors["second b"] = session.sample_b(session.with_prior(take(both_c, 1, 1)[0]), second_b)["samples"]
    tensors["repeated c"] = session.sample_c(repeat(session.empty(64, 128)[0], 2)[0])["samples"]
    mask = torch.zeros(1, 128, 64)
    mask[:, 64:] = 1
    masked = nodes.SetLatentNoiseMask().set_mask(take(both_c, 0, 1)[0], mask)[0]
    tensors["masked c"] = session.sample_c(masked, seed=9)["samples"]
    latents = {
        "LatentFromBatch": take(both_c, 1, 1)[0],
        "RepeatLatentBatch": repeat(both_c, 2)[0],
        "LatentBatch": LatentBatch.execute(both_c, second_c).args[0],
        "LatentUpscaleBy": nodes.LatentUpscaleBy().upscale(both_c, "bicubic", 2.0)[0],
        "SetLatentNoiseMask": masked,
        "KSampler": session.ksampler(session.prior, session.prior_text, stage_c),
    }
    return tensors, {f"after {name}": [x["wuerstchen"], list(x["samples"].shape)] for name, x in latents.items()}


def pictures(session: Session, bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scales and encodes our image with ComfyUI's nodes."""
    import comfy.model_management
    from pack.nodes.host.vae import load_stage_a
    from pack.wuerstchen_core.checkpoints import read_part

    import nodes

    vae = load_stage_a(read_part(bundle, "vqgan"))
    image = session.ours["VAEDecode"].execute(vae, {"samples": seeded(2, 4, 16, 24) * 3}).args[0]
    scaled = nodes.ImageScale().upscale(image, "lanczos", 128, 64, "disabled")[0]
    tensors = {"image": image, "scaled": scaled, "encoded": nodes.VAEEncode().encode(vae, scaled)[0]["samples"]}
    return tensors, {"on ComfyUI's device": image.device == comfy.model_management.intermediate_device()}


def main(bundle: str, file: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    session = Session(bundle)
    tensors, facts = {}, others(session)
    for group, found in {"units": units(), "stage a": stage_a(file)}.items():
        tensors |= {f"{group}/{key}": x for key, x in found.items()}
    results = {"cascade": cascade(session), "batches": batches(session), "pictures": pictures(session, bundle)}
    for group, (found, more) in results.items():
        tensors |= {f"{group}/{key}": x for key, x in found.items()}
        facts |= more
    return tensors, facts | other_models(session)


if __name__ == "__main__":
    write_results(main)
