"""Trains the shipped model from scratch, or further: `python -m tools.demo.build [--start demo] [--run DIR]`.

The five stages train one after the other with the TOML files in `wuerstchen_core/demo/recipe`, then all but the image
encoder a second time from their own weights, Stage C with its ControlNets (`joint`). With `--start`, only this second
training runs, from the weights of a bundle. Interrupted trainings resume. The weights become the bundle and the
ControlNets, and the logs are copied to `logs`. Afterwards `remake` regenerates everything that depends on the weights.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wuerstchen_core.checkpoints import PARTS_OF, Part, demo_path, read_metadata, read_part, save_bundle
from wuerstchen_core.checkpoints.bundle import TABLE
from wuerstchen_core.checkpoints.components import TOWERS
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import source_path
from wuerstchen_core.checkpoints.shipped import SHIPPED
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, known_words
from wuerstchen_core.models.text_encoder import tokenize
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.demo import DemoDataConfig
from wuerstchen_core.training.stages.networks import source_exists

from . import joint

RECIPE = demo_path().parent / "recipe"
LOGS = Path(__file__).parent / "logs"
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # in this order: later ones need the earlier ones
AGAIN = (
    "vqgan",
    "text",
    "decoder",
    "prior",
)  # trained a second time; the image encoder defines what C and text learned
STAGE_OF_PART = {
    "vqgan": "vqgan",
    "image_encoder": "encoder",
    "decoder": "decoder",
    "token_decoder": "token-decoder",
    "prior": "prior",
}
# As accurate as the published steps (docs/steps.md); one step of Stage B is nearest to the drawings.
SAMPLING = {
    "width": 256,
    "height": 256,
    "schedule": "fast",
    "sampler": "ddim",
    "prior_steps": 6,
    "prior_guidance": 3.0,
    "decoder_steps": 1,
}
SINGLE_BYTES = 512  # CLIP's first tokens: each byte, inside a word and at its end
LICENCE = "Weights: MIT. Trained on drawings of Google's Noto Emoji (Apache License 2.0), see ARTWORK-LICENSE.txt."


def data_config(config: Path) -> DemoDataConfig:
    """Returns the [data] table of a stage's TOML file."""
    return from_table(DemoDataConfig, read_config(config, []).get("data", {}), "data")


def vocabulary(data: DemoDataConfig) -> dict[str, Any]:
    """Returns the vocabulary of a model trained on this data, for the bundle's metadata."""
    things = THINGS[: data.things]
    return {
        "words": known_words(things, data.layouts),
        "things": [thing.name for thing in things],
        "colours": list(COLOURS),
        "sizes": list(SIZES),
        "layouts": data.layouts,
        "shapes": data.shapes,
        "larger": data.larger,
    }


def trained_tokens() -> set[int]:
    """Returns the tokens that captions contain, and all single characters: the encoder was trained on no others."""
    words = [tokenize([word])[0] for word in known_words()]
    return {*range(SINGLE_BYTES), *torch.cat(words).flatten().tolist()}


def stage_folders(run: Path, start: str = "") -> dict[str, Path]:
    """Returns the folder of each training of a run, by the name of its TOML file; with `start`, of the second ones."""
    first = {} if start else {stage: run / stage for stage in STAGES}
    return first | {f"{stage}_again": run / "again" / stage for stage in AGAIN}


def keep_start(run: Path, source: str) -> str:
    """Copies the bundle to train further into a run's folder, where it stays when the shipped one is replaced."""
    kept = run / "start.safetensors"
    if not kept.exists():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_path(source), kept)
    return str(kept)


def weights_file(folder: Path, stage: str) -> Path:
    """Returns the file of a stage's weights in its folder."""
    return folder / f"{stage}.safetensors"


def final_weights(run: Path, start: str = "") -> dict[str, str | Path]:
    """Returns the source of each stage's weights after all trainings of a run; `start` has those not trained again."""
    sources: dict[str, str | Path] = {stage: start or weights_file(run / stage, stage) for stage in STAGES}
    return sources | {stage: weights_file(run / "again" / stage, stage) for stage in AGAIN}


def collect_parts(sources: Mapping[str, str | Path], version: str) -> dict[str, Part]:
    """Returns the trained parts of a release from the stages' sources, with only the trained token embeddings."""
    parts: dict[str, Part] = {}
    tokens = trained_tokens()
    for part in PARTS_OF[version]:
        stage = STAGE_OF_PART.get(part, "text")
        if not source_exists(sources[stage]):
            raise ValueError(f"{sources[stage]} is missing: train the {stage} first")
        read = read_part(sources[stage], part)
        parts[part] = drop_token_rows(read, tokens) if part in TOWERS else read
    return parts


def drop_token_rows(tower: Part, rows: Iterable[int]) -> Part:
    """Returns a text encoder with only these rows of its token embedding (see `restore_token_rows`)."""
    indices = torch.tensor(sorted(set(rows)), dtype=torch.int32)
    table = tower.state_dict[f"{TABLE}.weight"][indices.long()]
    return replace(tower, state_dict={**tower.state_dict, f"{TABLE}.weight": table, f"{TABLE}.rows": indices})


def bundle_metadata(sampling: Mapping[str, Any], training: Mapping[str, Any], data: DemoDataConfig) -> dict[str, Any]:
    """Returns the metadata of a bundle."""
    return {"vocabulary": vocabulary(data), "sampling": sampling, "licence": LICENCE, "training": training}


def assemble(run: Path, target: Path, start: str = "") -> None:
    """Writes the trained stages of a run as one bundle in bf16, with those of `start` that were not trained again.

    The ControlNets are written beside it, in fp8.
    """
    parts = collect_parts(final_weights(run, start), "v2")
    training = joined(read_metadata(start)["training"]) if start else {}
    training |= {name: last_step(folder) for name, folder in stage_folders(run, start).items()}
    metadata = bundle_metadata(SAMPLING, training, data_config(RECIPE / "prior_again.toml"))
    save_bundle(target, parts, metadata, dtype=torch.bfloat16)
    for kind in joint.RECIPES:
        source = weights_file(run / "again" / "prior", kind)
        convert([source], target.with_name(f"{target.stem}-{kind}.safetensors"), dtype="fp8", force=True)


def continued(first: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the log of a second training as one of the first, of which `first` is the last row."""
    return {**row, **{key: row[key] + first[key] for key in ("step", "seconds")}}


def joined(training: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the last rows of the stages' trainings with the second ones counted to the first."""
    again = {stage: training.get(f"{stage}_again") for stage in STAGES}
    return {stage: continued(training[stage], row) if row else training[stage] for stage, row in again.items()}


def joined_log(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the rows of a stage's log, followed by those of its second training if there is one."""
    first, more = (read_log(folder / f"{name}.jsonl") for name in (stage, f"{stage}_again"))
    return [*first, *(continued(first[-1], row) for row in more)]


def join_logs(folder: Path) -> None:
    """Counts the second trainings among the copied logs to the first ones, before those of another second training."""
    for stage in AGAIN:
        rows = joined_log(folder, stage)
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{stage}_again.jsonl").unlink(missing_ok=True)
        (folder / f"{stage}_again.webp").unlink(missing_ok=True)


def read_log(log: Path) -> list[dict[str, Any]]:
    """Returns the rows of a stage's log; none if there is no log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def last_step(folder: Path) -> dict[str, Any]:
    """Returns the last row of a stage's log. Raises ValueError if there is none."""
    path = folder / "log.jsonl"
    rows = read_log(path)
    if not rows:
        raise ValueError(f"{path} is missing or empty: train the {folder.name} first")
    return rows[-1]


def copy_logs(folders: Mapping[str, Path], target: Path) -> None:
    """Copies the logs and the left halves of the last sample grids of trainings to a folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        shutil.copyfile(folder / "log.jsonl", target / f"{name}.jsonl")
        for grid in sorted(folder.glob("sheet-*.png"))[-1:]:
            picture = Image.open(grid).convert("RGB")
            half = picture.crop((0, 0, picture.width // 2, picture.height))
            half.save(target / f"{name}.webp", quality=80, method=6)


def second_overrides(run: Path, stage: str, start: str = "") -> list[str]:
    """Returns the overrides of a stage's second training: its first weights, and the final ones of earlier stages."""
    sources = final_weights(run, start)
    inputs = [f"inputs.{name}='{sources[name]}'" for name in STAGES[: STAGES.index(stage)]]
    return [f"run='{run / 'again'}'", f"start='{start or weights_file(run / stage, stage)}'", *inputs]


def parse_options(
    arguments: Sequence[str] | None, name: str, description: str | None, run: str, target: Path, start: bool = False
) -> argparse.Namespace:
    """Returns the options of a command that builds a bundle; `start` adds one of that name."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.demo.{name}", description=description)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the run")
    parser.add_argument("--output", type=Path, default=target, help="bundle to write")
    if start:
        parser.add_argument("--start", default="", help="bundle to train further, such as demo")
    parser.add_argument("--assemble-only", action="store_true", help="do not train, use the existing weights")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the stages that are not finished, then writes the bundle."""
    from wuerstchen_core.training.run import run

    options = parse_options(arguments, "build", __doc__, "runs/demo", demo_path(), start=True)
    start = keep_start(options.run, options.start) if options.start else ""
    shipped = {kind: f"demo-{kind}" for kind in joint.RECIPES if f"demo-{kind}" in SHIPPED}
    control_nets = shipped if options.start == "demo" else {}
    if not options.assemble_only:
        for stage in () if start else STAGES:
            run(stage, RECIPE / f"{stage}.toml", [f"run='{options.run}'"])
        for stage in AGAIN:
            create = partial(joint.JointStage, control_nets=control_nets) if stage == "prior" else None
            run(stage, RECIPE / f"{stage}_again.toml", second_overrides(options.run, stage, start), create)
    further = start and filecmp.cmp(start, demo_path(), shallow=False)  # the logs are those of `start`
    assemble(options.run, options.output, start)
    if options.output == demo_path():
        if further:
            join_logs(LOGS)
        copy_logs(stage_folders(options.run, start), LOGS)


if __name__ == "__main__":
    main()
