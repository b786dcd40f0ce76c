"""Retrain the shipped v1 model: `python -m tools.demo.build_v1 [--run DIR]`.

v1 has Stage A, the text tower and the image encoder of the shipped v2 model, in fp8, the encoder in v1's units. On top
of them its own Stages B and C are trained as `token_decoder.toml` and `prior_v1.toml` say, and stored in fp8 too. It
knows the first things of the demo's world alone: it is there to show that v1's chain works, and trains in half an hour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wuerstchen_core.checkpoints import Part, demo_path, read_metadata, read_part, save_bundle
from wuerstchen_core.checkpoints.components import kind_of
from wuerstchen_core.checkpoints.quant import FP8
from wuerstchen_core.models.prior import PriorParams

from .build import RECIPE, collect, keep_logs, last_step, metadata, told, trained_on

TAKEN = {"vqgan": "vqgan", "encoder": "image_encoder", "text": "prior_text_encoder"}  # from v2, by stage
STAGES = {"token-decoder": "token_decoder.toml", "prior": "prior_v1.toml"}  # the prior's sheets need the decoder
EVALUATION = RECIPE / "evaluation_v1.json"  # which `remake` writes
# Guidance and steps that `evaluate` found to be enough for this model. On every third held-out scene the mode is worth
# 1.0 dB over v1's published one, multinomial, which leaves single tokens astray; what they show is right in both.
SAMPLING = {
    "width": 256,
    "height": 256,
    "schedule": "linear",
    "prior_steps": 20,
    "prior_guidance": 3.0,
    "decoder_steps": 8,
    "decoder_guidance": 1.0,
    "token_mode": "quantised",
}


def in_v1_units(encoder: Part) -> Part:
    """The encoder whose features are what v2's prior works on, (features + 1) / 42: v1 has no such step."""
    state, units = dict(encoder.state_dict), PriorParams()
    state["mapper.1.weight"] = state["mapper.1.weight"] / units.feature_scale
    state["mapper.1.bias"] = (state["mapper.1.bias"] + units.feature_shift) / units.feature_scale
    return replace(encoder, state_dict=state)


def take_over(run: Path, source: Path) -> None:
    """Put what v1 has from v2 into a run's folder, as if it had been trained there. ValueError if it has another's."""
    mark, digest = run / "taken_from", hashlib.sha256(source.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") != digest:
        raise ValueError(f"{run} stands on another v2 model than {source}: give another --run, or remove it")
    run.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest, encoding="utf-8")
    for stage, name in TAKEN.items():
        part = read_part(source, name)
        part = in_v1_units(part) if name == "image_encoder" else part
        save_bundle(run / stage / f"{stage}.safetensors", {kind_of(name): part}, {}, dtype=FP8)


def assemble(run: Path, target: Path, source: Path) -> None:
    """Put what was taken and what was trained together as one bundle in fp8."""
    training = read_metadata(source)["training"]
    training = {stage: training[stage] for stage in TAKEN} | {stage: last_step(run / stage) for stage in STAGES}
    about = metadata(SAMPLING, training, trained_on(RECIPE / STAGES["prior"]))
    parts = collect({stage: run / stage for stage in (*TAKEN, *STAGES)}, "v1")
    save_bundle(target, parts, about, dtype=FP8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, then write the bundle."""
    from wuerstchen_core.training.run import run

    options = told(arguments, "build_v1", __doc__, "runs/demo-v1", demo_path("demo-v1"))
    if not options.assemble_only:
        take_over(options.run, demo_path())
        for stage, file in STAGES.items():
            run(stage, RECIPE / file, [f"run='{options.run}'"])
    assemble(options.run, options.output, demo_path())
    if options.output == demo_path("demo-v1"):
        keep_logs({stage: options.run / stage for stage in STAGES}, RECIPE / "logs" / "v1")


if __name__ == "__main__":
    main()
