"""Run by ComfyUI's Python, `inside_conditioning.py COMFYUI BUNDLE EMBEDDINGS JSON OUTPUT`: token ids of the JSON file's
texts, text states, and one call of each stage with conditioning from ComfyUI's own nodes, for
test_host_conditioning.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from conditioning_walk import walk
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

STAGES = ("prior", "decoder")
A, B = "a red apple", "a small cat on a yellow background"
LONG = "a red apple on a blue background, and behind it the sun, " * 8
# Texts by name; some are the name of an embedding file.
TEXTS = {
    "weighted": "a (red:1.3) apple, ((small))",
    "weight of 1": "a (red:1.0) apple",
    "long": LONG,
    "weighted long": f"{LONG} (red:0.6) apple",
    "75 tokens": "a " * 75,
    "76 tokens": "a " * 76,
    "sdxl": "a embedding:sdxl apple",
    "own": "a embedding:own apple",
    "a1111": "a embedding:a1111 apple",
    "narrow": "a embedding:narrow apple",
    "missing": "a embedding:missing apple",
}
# Texts with embeddings that the core must encode as ComfyUI does.
WITH_EMBEDDINGS = {
    "alone": "embedding:own",
    "two": "embedding:own, a red embedding:own.safetensors apple, embedding:own,",
    "weight": "a (embedding:own:1.3) apple",
    "weights": "a ((red embedding:own) and:0.7) (big) apple",
    "escaped": r"a \(red\) embedding:own (apple",
    "line": "a red\nembedding:own apple",
    "pt": "a embedding:webui apple",
    "bin": "a embedding:learned_embeds apple",
    "bundled": "a embedding:lora apple",
    "at the end": f"{'a ' * 73} embedding:own apple",
    "many": "a embedding:own " * 30,
    "long vectors": f"{'a ' * 70} embedding:eleven apple (red:1.2)",
    "trained": "a embedding:my-fox apple",
}
X = {"prior": (2, 16, 6, 9), "decoder": (2, 4, 48, 64)}  # Stage B: 192 x 256 pixels
PRIORS = (2, 16, 5, 6)
T = 0.5
THIN = 65  # column of a mask, in pixels
HALF = (0.0, 0.0, 0.5, 1.0)  # fractions of the image: x, y, width, height
ODD = (0.25, 0.3, 0.3, 0.35)  # not a size that Stage B can halve
PIXELS = (128, 64, 128, 128)  # x, y, width, height


class Once:
    """A sampler that calls the model once, at time T, and keeps x and the denoised latents."""

    def __init__(self) -> None:
        self.x = self.denoised = torch.empty(0)

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, **_: Any) -> Tensor:
        self.x, self.denoised = x, model(x, sigmas[0].expand(len(x)), **extra_args)
        return self.denoised


def conditionings(nodes: Any, a: Any, b: Any, long: Any) -> dict[str, tuple[Any, Any, float]]:
    """Returns cases (positive, negative, guidance) made by ComfyUI's own nodes."""
    combine = nodes.ConditioningCombine().combine

    def when(cond: Any, start: float, end: float) -> Any:
        return nodes.ConditioningSetTimestepRange().set_range(cond, start, end)[0]

    def masked(cond: Any, left: bool, strength: float = 1.0, bounds: bool = False) -> Any:
        mask = torch.zeros(1, 192, 256)
        mask[..., :128] = float(left)
        mask[..., 128:] = float(not left)
        area = "mask bounds" if bounds else "default"
        return nodes.ConditioningSetMask().append(cond, mask, area, strength)[0]

    def thin(cond: Any) -> Any:
        mask = torch.zeros(1, 192, 256)
        mask[..., THIN] = 1.0
        return nodes.ConditioningSetMask().append(cond, mask, "default", 1.0)[0]

    def area(cond: Any, x: float, y: float, width: float, height: float) -> Any:
        return nodes.ConditioningSetAreaPercentage().append(cond, width, height, x, y, 1.0)[0]

    x, y, width, height = PIXELS
    return {
        "plain": (a, b, 1.0),
        "guided": (a, b, 3.0),
        "long": (long, b, 3.0),
        "combined": (combine(a, b)[0], b, 1.0),
        "concatenated": (nodes.ConditioningConcat().concat(a, b)[0], b, 1.0),
        "averaged": (nodes.ConditioningAverage().addWeighted(a, b, 0.25)[0], b, 1.0),
        "strengths": (combine(nodes.ConditioningSetAreaStrength().append(a, 3.0)[0], b)[0], b, 1.0),
        "until later": (combine(when(a, 0.0, 0.51), when(b, 0.51, 1.0))[0], b, 1.0),
        "since earlier": (combine(when(a, 0.0, 0.49), when(b, 0.49, 1.0))[0], b, 1.0),
        "halves": (combine(masked(a, True), masked(b, False))[0], b, 1.0),
        "mask over all": (combine(masked(a, True, 0.5), b)[0], b, 1.0),
        "thin mask": (combine(thin(a), b)[0], b, 1.0),
        "bounds": (masked(a, False, 1.0, True), b, 1.0),
        "area": (area(a, *HALF), b, 1.0),
        "odd area": (area(a, *ODD), b, 1.0),
        "guided area": (area(a, *HALF), b, 3.0),
        "pixels": (nodes.ConditioningSetArea().append(a, width, height, x, y, 1.0)[0], b, 1.0),
        "beyond the edge": (area(a, 1.0, 0.99, 1.0, 1.0), b, 1.0),
    }


def texts(clips: dict[str, Any], nodes: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the states of every text and stage, and the warnings that were logged meanwhile."""
    tensors, facts = {}, {}
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    for stage, clip in clips.items():
        encode = nodes.CLIPTextEncode().encode
        for name, text in (TEXTS | WITH_EMBEDDINGS).items():
            logged.clear()
            tensors[f"{name}/{stage}"] = encode(clip, text)[0][0][0]
            facts[f"{name}/{stage}"] = " ".join(logged)
        for layer in (-1, -2):
            [clone] = nodes.CLIPSetLastLayer().set_last_layer(clip, layer)
            tensors[f"layer {layer}/{stage}"] = encode(clone, A)[0][0][0]
        tensors[f"plain/{stage}"] = encode(clip, A)[0][0][0]  # last: the others must not have an effect
    logging.getLogger().removeHandler(handler)
    return tensors, facts


def token_ids(clip: Any, text: str) -> list[list[int]]:
    """Returns the ids of a text's chunks; a parenthesis behind a backslash is no weight."""
    [chunks] = clip.tokenize(text.replace("(", "\\(").replace(")", "\\)")).values()
    return [[token for token, _ in chunk] for chunk in chunks]


def main(bundle: str, embeddings: str, literal: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.sample
    import comfy.samplers
    import folder_paths

    import nodes

    load_pack()
    from pack.nodes.host import conditioning, models
    from pack.nodes.host.clip import load_clip
    from pack.nodes.host.vae import load_stage_a
    from pack.nodes.sampling import WuerstchenDecoderConditioning
    from pack.nodes.text import WuerstchenTextEncode
    from pack.wuerstchen_core.checkpoints import read_part

    folder_paths.add_model_folder_path("embeddings", embeddings)
    clips = {stage: load_clip(read_part(bundle, f"{stage}_text_encoder")) for stage in STAGES}
    tensors, facts = texts(clips, nodes)
    for stage, clip in clips.items():
        facts[f"ids/{stage}"] = [
            token_ids(clip, text) for text in json.loads(Path(literal).read_text(encoding="utf-8"))
        ]
        outside = Path(embeddings).parent / "outside"
        states = [
            nodes.CLIPTextEncode().encode(clip, f"a embedding:{name} cat")[0][0][0]
            for name in ("missing", "../outside", outside.as_posix(), "own")
        ]
        facts[f"outside/{stage}"] = [torch.equal(states[0], other) for other in states[1:]]
    for name, text in (("weighted", TEXTS["weighted"]), ("trained", WITH_EMBEDDINGS["trained"])):
        for states, stage in zip(WuerstchenTextEncode.execute(*clips.values(), text).args, STAGES, strict=True):
            tensors[f"both/{name}/{stage}"] = states[0][0]

    priors = seeded(*PRIORS)
    stage_c = {"samples": priors}
    with_prior = lambda cond, latent=stage_c: WuerstchenDecoderConditioning.execute(cond, latent).args[0]  # noqa: E731
    patchers = {stage: models.load_model(read_part(bundle, stage)) for stage in STAGES}
    patchers["prior"].model.trained = None  # no notices about its sizes

    def once(stage: str, positive: Any, negative: Any, cfg: float, count: int = 2) -> Once:
        patcher, sampler = patchers[stage], Once()
        sigma = patcher.get_model_object("model_sampling").sigma(torch.tensor(T))
        noise = seeded(*X[stage])[torch.arange(count) % 2]
        comfy.sample.sample_custom(
            patcher, noise, cfg, comfy.samplers.KSAMPLER(sampler), torch.stack([sigma, sigma * 0]), positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return sampler

    # Stage B's area is the right half of an image whose halves have six columns of Stage C latents each.
    cells = torch.arange(72.0).reshape(1, 1, 6, 12)
    half = conditioning.PriorCond(cells, (64, 128)).process_cond(batch_size=2, area=(64, 64, 0, 64))
    facts["half of Stage C"] = half.cond.tolist()

    # The upper and the lower half of an image 1216 pixels high (29 rows in Stage C), in ComfyUI's units.
    facts["parts in rows"] = [conditioning.scale_area((76, 8, top, 0), 8 / (128 / 3)) for top in (0, 76)]

    left_mask = torch.zeros(1, 192, 256)
    left_mask[..., :128] = 1
    for stage, clip in clips.items():
        a, b, long = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (A, B, LONG))
        if stage == "decoder":
            a, long = with_prior(a), with_prior(long)
            b_plain, b = b, with_prior(b)
        cases = conditionings(nodes, a, b, long)
        if stage == "decoder":  # a negative without Stage C latents, and a mask set before they are added
            cases["guided without"] = (a, b_plain, 3.0)
            cases["guided area without"] = (*cases["guided area"][:1], b_plain, 3.0)
            early = conditionings(nodes, nodes.CLIPTextEncode().encode(clip, A)[0], b_plain, long)
            cases["halves, latents last"] = (with_prior(early["halves"][0]), b, 1.0)
        tensors |= {f"states/{name}/{stage}": states[0][0] for name, states in (("a", a), ("b", b), ("long", long))}
        for name, case in cases.items():
            ran = once(stage, *case)
            tensors[f"x/{name}/{stage}"], tensors[f"denoised/{name}/{stage}"] = ran.x, ran.denoised
        if stage == "decoder":
            tensors["repeated"] = once(stage, a, b, 1.0, 4).denoised
        mistakes = {
            "texts": ([[a[0][0].repeat(3, 1, 1), a[0][1]]], b, 1.0),
            "no text": ([[None, a[0][1]]], b, 1.0),
            "text not finite": ([[a[0][0] / 0, a[0][1]]], b, 1.0),
        }
        if stage == "decoder":
            mistakes |= {
                "stage c": (with_prior(a, {"samples": seeded(3, 16, 5, 6)}), b, 1.0),
                "not finite": (with_prior(a, {"samples": seeded(1, 16, 5, 6) / 0}), b, 1.0),
                "half a positive": (nodes.ConditioningCombine().combine(a, b_plain)[0], b, 1.0),
            }
        else:
            mistakes["for stage b"] = (with_prior(a), b, 1.0)
        for name, case in mistakes.items():
            try:
                once(stage, *case)
            except ValueError as error:
                facts[f"mistake: {name}/{stage}"] = str(error)
        stage_a = load_stage_a(read_part(bundle, "vqgan"))
        left_a, left_b = cases["halves"][0][:1], nodes.ConditioningSetMask().append(b, left_mask, "default", 1.0)[0]
        facts[f"nodes/{stage}"] = walk(
            # A second text, so that strengths count; both leave half of the image to a default conditioning.
            lambda positive, negative, stage=stage, left_b=left_b: (
                once(stage, [*positive, *left_b], negative, 3.0).denoised
            ),
            left_a, b, clip, stage_a,
        )  # fmt: skip
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
