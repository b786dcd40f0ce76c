"""Trains the shipped model from scratch: `python -m tools.demo.build [--run DIR]`.

The five stages train one after the other with the TOML files in `wuerstchen_core/demo/recipe`, then Stages B and C a
second time from their own weights. Interrupted trainings resume. The weights become the bundle, and the logs are copied
to `logs`. Afterwards `remake` regenerates everything that depends on the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wuerstchen_core.checkpoints import PARTS_OF, Part, demo_path, read_part, save_bundle
from wuerstchen_core.checkpoints.bundle import TABLE
from wuerstchen_core.checkpoints.components import TOWERS
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, known_words
from wuerstchen_core.models.text_encoder import tokenize
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.demo import DemoDataConfig

RECIPE = demo_path().parent / "recipe"
LOGS = Path(__file__).parent / "logs"
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # in this order: later ones need the earlier ones
AGAIN = ("decoder", "prior")  # trained a second time, with a new learning rate schedule
STAGE_OF_PART = {
    "vqgan": "vqgan",
    "image_encoder": "encoder",
    "decoder": "decoder",
    "token_decoder": "token-decoder",
    "prior": "prior",
}
# As accurate as the published steps, nearer to the drawings, in a third of the time (docs/steps.md).
SAMPLING = {
    "width": 256,
    "height": 256,
    "schedule": "fast",
    "sampler": "ddim",
    "prior_steps": 6,
    "prior_guidance": 3.0,
    "decoder_steps": 4,
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


def stage_folders(run: Path) -> dict[str, Path]:
    """Returns the folder of each training of a run, by the name of its TOML file."""
    return {stage: run / stage for stage in STAGES} | {f"{stage}_again": run / "again" / stage for stage in AGAIN}


def collect_parts(folders: Mapping[str, Path], version: str) -> dict[str, Part]:
    """Returns the trained parts of a release in the stages' folders, with only the trained token embeddings."""
    parts: dict[str, Part] = {}
    tokens = trained_tokens()
    for part in PARTS_OF[version]:
        stage = STAGE_OF_PART.get(part, "text")
        weights = folders[stage] / f"{stage}.safetensors"
        if not weights.exists():
            raise ValueError(f"{weights} is missing: train the {stage} first")
        read = read_part(weights, part)
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


def assemble(run: Path, target: Path) -> None:
    """Writes the trained stages of a run as one bundle in bf16."""
    folders = stage_folders(run)
    parts = collect_parts(folders | {stage: folders[f"{stage}_again"] for stage in AGAIN}, "v2")
    training = {name: last_step(folder) for name, folder in folders.items()}
    metadata = bundle_metadata(SAMPLING, training, data_config(RECIPE / "prior.toml"))
    save_bundle(target, parts, metadata, dtype=torch.bfloat16)


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


def second_overrides(run: Path, stage: str) -> list[str]:
    """Returns the overrides of a stage's second training: its own weights, and those of the stages before it."""
    weights = {name: run / name / f"{name}.safetensors" for name in STAGES}
    inputs = [f"inputs.{name}='{weights[name]}'" for name in STAGES if name not in AGAIN]
    return [f"run='{run / 'again'}'", f"start='{weights[stage]}'", *inputs]


def parse_options(
    arguments: Sequence[str] | None, name: str, description: str | None, run: str, target: Path
) -> argparse.Namespace:
    """Returns the options of a command that builds a bundle: `run`, `output` and `assemble_only`."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.demo.{name}", description=description)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the run")
    parser.add_argument("--output", type=Path, default=target, help="bundle to write")
    parser.add_argument("--assemble-only", action="store_true", help="do not train, use the existing weights")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the stages that are not finished, then writes the bundle."""
    from wuerstchen_core.training.run import run

    options = parse_options(arguments, "build", __doc__, "runs/demo", demo_path())
    if not options.assemble_only:
        for stage in STAGES:
            run(stage, RECIPE / f"{stage}.toml", [f"run='{options.run}'"])
        for stage in AGAIN:
            run(stage, RECIPE / f"{stage}_again.toml", second_overrides(options.run, stage))
    assemble(options.run, options.output)
    if options.output == demo_path():
        copy_logs(stage_folders(options.run), LOGS)


if __name__ == "__main__":
    main()
