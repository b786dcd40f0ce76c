"""Writes the weights of a checkpoint, or a folder with weights for others and a model card."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..checkpoints.bundle import parse_metadata
from ..checkpoints.components import TOWERS
from ..checkpoints.diffusers_layout import is_in_diffusers
from ..checkpoints.diffusers_pipeline import write_pipeline
from ..checkpoints.open import open_part
from ..checkpoints.weight_files import read_file_metadata
from ..common.atomic import check_room, draft_of, link_file, reason
from ..common.dataclass_config import from_table
from ..common.devices import pick_device
from ..common.lock import LOCK, folder_lock
from ..common.text import one_line, parse_json
from .card import write_card
from .checkpoint import load_checkpoint, newest_step, record_weights, weights_name
from .config import LoopConfig
from .ema import meta_copy
from .monitor import stage_samples
from .report import other_sources
from .run import open_run
from .run_folder import CONFIG
from .stage import Stage
from .stages.networks import weights_metadata

log = logging.getLogger(__name__)

FOLDER = "export"
PIPELINE_PARTS = {  # of a pipeline without the other stage, by the part that is trained
    "prior": (TOWERS[0],),
    "decoder": ("vqgan", TOWERS[1]),
}


def export(checkpoint: Path, overrides: list[str], output: Path | None = None) -> Path:
    """Writes the averaged weights of a checkpoint as training does, and returns their file.

    It is by default beside the checkpoint, such as lora-000500.safetensors. ValueError if it is in no run's folder.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is not a file: name a checkpoint, such as run/lora/checkpoint-00000500.pt")
    if not (checkpoint.parent / CONFIG).is_file():
        raise ValueError(f"{checkpoint} is not in the folder of a run, which has a {CONFIG}: leave it there")
    stage, _ = open_run(checkpoint.parent, overrides)
    contents, net = load_checkpoint(checkpoint), meta_copy(stage.net)
    net.load_state_dict(contents["average"], assign=True)
    step = contents["step"]
    file = output or checkpoint.parent / weights_name(stage.stem, step)
    stage.save(file, net, {**weights_metadata(stage), "training": {"step": step}})
    if output is None:
        record_weights(file, step)
    return file


def export_run(
    folder: Path, overrides: list[str], output: Path | None = None, step: int | None = None, name: str = ""
) -> Path:
    """Writes a folder with a run's weights as others load them, images of its prompts and a model card; returns it.

    It is by default `FOLDER` in the run's, which is replaced; another one must be new or empty. For v2's Stages B and C
    it is a diffusers pipeline with the other networks of the configuration, for others the files that training writes.
    `step` is that of weights that are kept or have a checkpoint (default: the newest), `name` the model's on the hub.
    ValueError if there are no such weights.
    """
    target = output or folder / FOLDER
    if output is not None:
        _check_new(output)
    check_room(target)
    stage, config = open_run(folder, overrides)
    file = folder / (f"{stage.stem}.safetensors" if step is None else weights_name(stage.stem, step))
    if step is not None and not file.is_file():
        file = export(folder / f"checkpoint-{step:08d}.pt", overrides)
    if not file.is_file():
        raise ValueError(f"{folder} has no weights yet: train first")
    try:
        with folder_lock(target):
            if output is not None:
                _check_new(output)
            _replace_content(target, lambda draft: _export(stage, config, folder, file, step, draft, name))
    finally:
        with suppress(OSError):  # it has files
            target.rmdir()
    _log_size(target)
    return target


def _check_new(folder: Path) -> None:
    """Raises ValueError if `folder` is a file, or has files other than the drafts of a killed export."""
    if folder.is_file() or (folder.is_dir() and any(not path.match(f".{FOLDER}.*.part") for path in _files(folder))):
        raise ValueError(f"{folder} exists: choose a new folder, whose files are all of this export")


def _replace_content(folder: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a new folder, whose files then replace all files of `folder`, or none if an error occurs."""
    with draft_of(folder / FOLDER) as draft:
        new, old = draft / "new", draft / "old"
        new.mkdir(parents=True)
        old.mkdir()
        write(new)
        moves = [(path, old / path.name) for path in _files(folder) if path != draft]
        moves += [(path, folder / path.name) for path in new.iterdir()]
        try:
            with ExitStack() as undo:
                for source, target in moves:
                    source.rename(target)
                    undo.callback(target.rename, source)
                undo.pop_all()
        except OSError as error:
            raise OSError(f"{folder} was not written: {reason(error)}") from error


def _export(
    stage: Stage[Any], config: Mapping[str, Any], folder: Path, file: Path, step: int | None, output: Path, name: str
) -> None:
    """Writes the files of `export_run` to a new folder."""
    own = output / f"{stage.stem}.safetensors"
    link_file(file, own)  # a training may replace the file meanwhile
    step = _step_of(own, newest_step(folder)) if step is None else step
    metadata = {**weights_metadata(stage), "training": {"step": step}}
    _open_pictures(stage, config, folder)
    images = _generate(stage, own)
    if parts := _pipeline(stage, config, own):
        write_pipeline(output, parts, metadata)
        own.unlink()
    else:
        stage.publish(own, output, metadata)
    write_card(output, name, stage, config, folder, step, images)


def _files(folder: Path) -> list[Path]:
    """Returns the files and subfolders of an export, without its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def _step_of(file: Path, newest: int) -> int:
    """Returns the step in the header of a weight file, or that of the newest checkpoint if it states none."""
    header = read_file_metadata(file)
    training = parse_metadata(file, header).get("training") or parse_json(header.get("training", "{}"))
    step = training.get("step") if isinstance(training, dict) else None
    return step if isinstance(step, int) else newest


def _open_pictures(stage: Stage[Any], config: Mapping[str, Any], folder: Path) -> None:
    """Opens the training images, of which the model card has the number and a caption, if they are still there."""
    train = from_table(LoopConfig, config.get("train", {}), "train")
    try:
        stage.dataset.start_reading(0, "", batch=train.batch, seed=train.seed, cache=folder, rank=0, world=1)
    except (OSError, ValueError) as error:
        log.warning("the model card lacks the number of pictures and a caption: %s", one_line(error))


def _generate(stage: Stage[Any], file: Path) -> list[Any]:
    """Returns images of the prompts in [sample], none if there are no prompts or networks are missing."""
    if "sample" not in stage.tables:
        return []
    if not stage.sample.prompts:
        log.info("there are no prompts for images on the model card: add --set 'sample.prompts=[\"...\"]'")
        return []
    if missing := stage.missing_for_samples():
        log.warning("there are no images on the model card, which need %s: add it with --set", missing)
        return []
    stage.net.to(pick_device("auto"))
    pipeline = stage.base_pipeline()
    stage.use_weights(pipeline, file)
    return stage_samples(stage, pipeline)


def _pipeline(stage: Stage[Any], config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the parts of a diffusers pipeline with a trained network; {} if there is no such pipeline."""
    own = stage.part
    if own not in PIPELINE_PARTS:
        return {}
    sources = other_sources(stage, config)
    known = {part: open_part(source, part) for part, source in sources.items() if source}
    parts = {own: open_part(file, own), **known}
    if not all(sources.values()) or not all(is_in_diffusers(part, x) for part, x in parts.items()):
        parts = {part: parts[part] for part in (own, *PIPELINE_PARTS[own]) if part in parts}
    complete = len(parts) > len(PIPELINE_PARTS[own])
    return parts if complete and all(is_in_diffusers(part, x) for part, x in parts.items()) else {}


def _log_size(folder: Path) -> None:
    """Logs the size of a folder, and what of it is hard-linked to files outside."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    here = Counter(file.st_ino for file in files)
    sizes = {file.st_ino: file.st_size for file in files}
    linked = sum({file.st_ino: file.st_size for file in files if file.st_nlink > here[file.st_ino]}.values())
    total = sum(sizes.values())
    log.info("%s: %.4g MB, %.4g MB of them hard links to other files", folder, total / 1e6, linked / 1e6)
