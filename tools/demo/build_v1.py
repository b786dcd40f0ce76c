"""Trains the shipped v1 model from scratch: `python -m tools.demo.build_v1 [--run DIR]`.

It reuses Stage A, the text encoder and the image encoder of the shipped v2 model, the encoder rescaled to v1's units,
and trains v1's Stages B and C on top (`token_decoder.toml`, `prior_v1.toml`). Everything is stored in fp8. It knows
only the first things of the demo's vocabulary: it shows that v1's pipeline works, and trains in half an hour.
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

from .build import (
    LOGS,
    RECIPE,
    bundle_metadata,
    collect_parts,
    copy_logs,
    data_config,
    last_step,
    parse_options,
    weights_file,
)

REUSED = {"vqgan": "vqgan", "encoder": "image_encoder", "text": "prior_text_encoder"}  # of v2, by stage
STAGES = {"token-decoder": "token_decoder.toml", "prior": "prior_v1.toml"}  # the prior's sample grids need the decoder
EVALUATION = LOGS.parent / "evaluation_v1.json"  # written by `remake`
# Guidance and steps that `evaluate` found to be sufficient for this model. On every third held-out scene, "quantised"
# has 1.0 dB more PSNR than v1's published mode, "multinomial", which leaves single wrong tokens; both show the right
# things.
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
    """Returns an encoder with the features that v2's prior works on, (features + 1) / 42; v1 has no such scaling."""
    state, units = dict(encoder.state_dict), PriorParams()
    state["mapper.1.weight"] = state["mapper.1.weight"] / units.feature_scale
    state["mapper.1.bias"] = (state["mapper.1.bias"] + units.feature_shift) / units.feature_scale
    return replace(encoder, state_dict=state)


def copy_from_v2(run: Path, source: Path) -> None:
    """Writes the reused networks to a run's folder. Raises ValueError if the run has those of another v2 model."""
    mark, digest = run / "taken_from", hashlib.sha256(source.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") != digest:
        raise ValueError(f"{run} was started with another v2 model than {source}: choose another --run, or delete it")
    run.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest, encoding="utf-8")
    for stage, name in REUSED.items():
        part = read_part(source, name)
        part = in_v1_units(part) if name == "image_encoder" else part
        save_bundle(run / stage / f"{stage}.safetensors", {kind_of(name): part}, {}, dtype=FP8)


def assemble(run: Path, target: Path, source: Path) -> None:
    """Writes the reused and the trained networks as one bundle in fp8."""
    training = read_metadata(source)["training"]
    training = {stage: training[stage] for stage in REUSED} | {stage: last_step(run / stage) for stage in STAGES}
    metadata = bundle_metadata(SAMPLING, training, data_config(RECIPE / STAGES["prior"]))
    parts = collect_parts({stage: weights_file(run / stage, stage) for stage in (*REUSED, *STAGES)}, "v1")
    save_bundle(target, parts, metadata, dtype=FP8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the stages that are not finished, then writes the bundle."""
    from wuerstchen_core.training.run import run

    options = parse_options(arguments, "build_v1", __doc__, "runs/demo-v1", demo_path("demo-v1"))
    if not options.assemble_only:
        copy_from_v2(options.run, demo_path())
        files = {stage: weights_file(options.run / stage, stage) for stage in (*REUSED, *STAGES)}
        inputs = [f"inputs.{stage}='{file}'" for stage, file in files.items()]
        for stage, config in STAGES.items():
            run(stage, RECIPE / config, [f"run='{options.run}'", *inputs])
    assemble(options.run, options.output, demo_path())
    if options.output == demo_path("demo-v1"):
        copy_logs({stage: options.run / stage for stage in STAGES}, LOGS / "v1")


if __name__ == "__main__":
    main()
