"""Run by ComfyUI's Python, `inside.py COMFYUI BUNDLE OUTPUT`: results of our objects in ComfyUI, for
test_host_inside.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

PROMPTS = ("a red apple", "", "a very small cat on a yellow background, and behind it the sun!")


def calls(width_c: int, width_b: int) -> dict[str, tuple[Any, ...]]:
    """Returns the inputs of each stage's network: x, t, text, and Stage B's prior latents."""
    t = torch.tensor([1.0, 0.37])
    return {
        "prior": (seeded(2, 16, 5, 6), t, seeded(2, 77, width_c)),
        "decoder": (seeded(2, 4, 16, 24), t, seeded(2, 77, width_b), seeded(2, 16, 2, 3)),
    }


AREA = (16, 12, 0, 12)  # height, width, top, left in Stage B's latents of `calls`; off Stage C's grid


def preview(latent_format: Any, x: Tensor) -> Tensor:
    """Returns ComfyUI's live preview [h, w, 3] in 0..255 of a sampler's latents; empty if it has none."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    args.preview_method = LatentPreviewMethod.Latent2RGB
    previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format)
    if previewer is None:
        return torch.empty(0)
    return torch.from_numpy(np.array(previewer.decode_latent_to_preview_image("JPEG", x)[1]))


class Stream:
    """A stream that copies offloaded weights, and must wait for their use before it copies the next."""

    def __init__(self) -> None:
        self.released = 0

    def wait_stream(self, _: Any) -> None:
        self.released += 1

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def counting_casts() -> Iterator[dict[str, int]]:
    """Counts the weights copied to the device "meta": at once, by a stream, and released by that stream's wait."""
    import comfy.model_management as management
    import comfy.ops

    stream, counts = Stream(), {"at once": 0, "by a stream": 0, "released": 0}
    cast, uncast = comfy.ops.cast_bias_weight, getattr(comfy.ops, "uncast_bias_weight", None)
    if uncast is None:  # an older ComfyUI
        yield {}
        return

    def counted_cast(layer: Any, x: Tensor, **options: Any) -> Any:
        if x.is_meta and not layer.weight.is_meta:
            counts["by a stream" if options.get("offloadable") else "at once"] += 1
        return cast(layer, x, **options)

    def counted_uncast(*cast_weights: Any) -> None:
        before = stream.released
        uncast(*cast_weights)
        counts["released"] += stream.released - before

    with (
        patch.object(comfy.ops, "cast_bias_weight", counted_cast),
        patch.object(comfy.ops, "uncast_bias_weight", counted_uncast),
        patch.object(management, "get_offload_stream", lambda _: stream),
    ):
        yield counts


def unchecked(schema: Any) -> list[str]:
    """Returns the values beyond its widgets that a node's check lets pass, and those within that it refuses."""
    from comfy_api.latest import io
    from pack.nodes.schema import check_values

    def refused(name: str, value: Any) -> bool:
        try:
            check_values(schema, {name: value})
        except ValueError as error:
            return schema.display_name in str(error) and name in str(error) and "\n" not in str(error)
        return False

    found = []
    for item in schema.inputs:
        wrong, right = [], [item.default] if getattr(item, "default", None) is not None else []
        if isinstance(item, io.Int.Input | io.Float.Input):
            wrong = [float("nan"), float("inf"), -float("inf"), item.min - 1, item.max + 1, "1", [item.min]]
            wrong += [item.min + 0.5] if isinstance(item, io.Int.Input) else []
            right += [item.min, item.max]
        elif isinstance(item, io.Combo.Input):
            wrong, right = (
                ["no such choice", "../" * 9 + "etc/passwd", 1, None][: 3 if item.optional else 4],
                item.options,
            )
        elif isinstance(item, io.Boolean.Input):
            wrong, right = [1, None, "false", []], [True, False]
        elif isinstance(item, io.String.Input):
            wrong = [1, None, ["a"]]
        found += [f"{schema.node_id}.{item.id} {value!r} passes" for value in wrong if not refused(item.id, value)]
        found += [f"{schema.node_id}.{item.id} {value!r} is refused" for value in right if refused(item.id, value)]
    return found


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.model_management as management
    import comfy.model_patcher

    load_pack()
    from pack.nodes.catalogue import NODES
    from pack.nodes.host import clip, model_sampling, models, previews
    from pack.nodes.loaders import WuerstchenBundleLoader
    from pack.wuerstchen_core.checkpoints import read_part

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"fingerprint of None": WuerstchenBundleLoader.fingerprint_inputs(None)}
    facts["unchecked"] = [case for node in NODES for case in unchecked(node.define_schema())]
    for stage in ("prior", "decoder"):
        text_encoder = clip.load_clip(read_part(bundle, f"{stage}_text_encoder"))
        for i, prompt in enumerate(PROMPTS):
            [[states, _]] = text_encoder.encode_from_tokens_scheduled(text_encoder.tokenize(prompt))
            tensors[f"text/{stage}/{i}"] = states

    schedule = model_sampling.WuerstchenSampling()
    tensors["times"] = torch.linspace(0, 1, 10_001)
    tensors["sigmas"] = schedule.sigma(tensors["times"])
    tensors["times_again"] = schedule.timestep(tensors["sigmas"])
    tensors["table"] = schedule.sigmas

    parts = {stage: read_part(bundle, stage) for stage in ("prior", "decoder")}
    inputs = calls(parts["prior"].params.c_cond, parts["decoder"].params.clip_embd)
    # Read before the loop below replaces the factors.
    facts |= {f"{stage} shipped factors": previews.preview_factors(stage) for stage in parts}
    for stage, part in parts.items():
        patcher = models.load_model(part)
        network = patcher.model.diffusion_model
        extra = dict(zip(("stable_cascade_prior",), inputs[stage][3:], strict=False))
        tensors[f"network/{stage}"] = network(*inputs[stage][:3], **extra)
        facts[f"{stage} training"] = network.training or any(p.requires_grad for p in network.parameters())
        facts[f"{stage} comfy layers"] = sum(hasattr(layer, "comfy_cast_weights") for layer in network.modules())

        # A partial load: most layers stay on the offload device and are copied for each call. The compute device is
        # "meta", on which any tensor that was not copied fails.
        meta = torch.device("meta")
        partial = comfy.model_patcher.ModelPatcher(patcher.model, load_device=meta, offload_device=torch.device("cpu"))
        partial.patch_model(meta, lowvram_model_memory=60_000)
        facts[f"{stage} offloaded"] = sum(not p.is_meta for p in network.parameters())
        with counting_casts() as facts[f"{stage} casts"]:
            out = network(*(x.to(meta) for x in inputs[stage][:3]), **{key: x.to(meta) for key, x in extra.items()})
        facts[f"{stage} partial"] = list(out.shape)

        management.unet_dtype, chosen = (lambda **_: torch.bfloat16), management.unet_dtype
        half = models.load_model(part).model
        management.unet_dtype = chosen
        facts[f"{stage} half"] = [str(half.get_dtype()), str(half.manual_cast_dtype)]
        tensors[f"half/{stage}"] = half.diffusion_model(*inputs[stage][:3], **extra)

        x = inputs[stage][0]
        for name, bias in (("no preview", None), ("preview", [0.0, 0.0, 0.5])):
            fitted = {stage: {"factors": torch.eye(x.shape[1], 3).mul(0.1).tolist(), "bias": bias}} if bias else {}
            previews._read = lambda fitted=fitted: fitted
            tensors[f"{name}/{stage}"] = preview(models.load_model(part).model.latent_format, x)

    x, _, text, prior_latents = inputs["decoder"]
    conds = models.load_model(parts["decoder"]).model.extra_conds(
        noise=x, cross_attn=text, stable_cascade_prior=prior_latents
    )
    cond = conds["stable_cascade_prior"]
    tensors["whole prior"], tensors["cropped prior"] = (
        cond.process_cond(batch_size=2, area=area).cond for area in (None, AREA)
    )
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
