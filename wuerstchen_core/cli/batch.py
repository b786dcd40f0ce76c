"""`generate --prompts`: generates the images of a file of prompts, in one or several processes.

The processes do not communicate: the line number determines the process, and the output folder shows which images
exist already.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from ..common.atomic import check_room
from ..common.lock import folder_lock
from ..common.text import listed, one_line
from ..inference.pipeline import WuerstchenPipeline
from ..inference.records import hint_records, provenance
from .batch_output import ImageFolder, check_folder, open_output
from .options import chosen_settings, load_pipeline, read_control
from .progress import StepBar
from .prompt_file import ImageRequest, PromptLine, parse_line, read_lines

log = logging.getLogger(__name__)

MOST_IMAGES = 1_000_000  # of a process: their list takes 0.25 GB
LINE_INTERVAL = 30.0  # seconds between lines of progress, if stderr is not a terminal

# Environment variables with the rank, the number of processes and the rank on the machine, as set by torchrun and
# accelerate, Intel MPI, and Open MPI.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def run(options: argparse.Namespace) -> None:
    """Generates the images that do not exist yet and prints a summary.

    Finally raises ValueError if lines were skipped; one of several processes does not, since the launcher would then
    stop the others.
    """
    rank, world, local_rank = _ranks()
    if not 0 <= rank < world:
        raise ValueError(
            f"the environment variables describe process {rank} of {world}: unset RANK and WORLD_SIZE, or use "
            "accelerate launch"
        )
    for name, value in (("--shards", options.shards), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if options.output is None:
        raise ValueError("--prompts needs a folder for the images: add --output FOLDER")
    if not options.prompts.exists():
        raise ValueError(f"{options.prompts} does not exist: give a file with a prompt or a JSON object per line")
    check_room(options.output)
    check_folder(options.output, options.shards)
    options.device = process_device(options.device, local_rank)
    if (options.batch or 1) > 1:
        options.memory_hint = "choose a smaller --batch"
    options.control = read_control(options.control)
    started = time.perf_counter()
    pipeline = load_pipeline(options)
    models = provenance(pipeline)
    if options.control:
        models["control"] = hint_records(options.control)
    requests, skipped = _read_requests(options, pipeline, rank, world)
    with folder_lock(options.output, rank):
        generated, existing = _generate_missing(options, pipeline, requests, models, show_progress=rank == 0)
    summary = f"generated: {generated}, existing: {existing}, skipped lines: {len(skipped)}"
    if world > 1:
        summary += f" (process {rank + 1} of {world})"
    if options.json:
        seconds = round(time.perf_counter() - started, 3)
        summary = json.dumps({
            "output": str(options.output), "process": rank, "processes": world, "device": str(pipeline.device),
            "generated": generated, "existing": existing, "skipped": skipped, "seconds": seconds,
        })  # fmt: skip
    sys.stdout.write(f"{summary}\n")
    if skipped and world == 1:
        raise ValueError(f"{options.prompts}: lines {listed(list(map(str, skipped)))} were skipped, see above")


def process_device(device: str, local_rank: int) -> str:
    """Returns the device of a process; with "auto" the processes of a machine get its GPUs in turn."""
    gpus = torch.cuda.device_count() if device == "auto" else 0
    return f"cuda:{local_rank % gpus}" if gpus else device  # cuda:0 where the launcher shows each process one GPU


def _read_requests(
    options: argparse.Namespace, pipeline: WuerstchenPipeline, rank: int, world: int
) -> tuple[dict[int, list[ImageRequest]], dict[int, str]]:
    """Returns the images of process `rank` by shard (all in 0 without --shards), and the error of each invalid line.

    Logs these errors. Invalid options raise ValueError at once, since with them every line would be invalid.
    """
    keys = {field.name for field in fields(PromptLine)} - {"seed"}
    defaults = {key: value for key, value in vars(options).items() if key in keys and value is not None}
    pipeline.sampling.updated(**chosen_settings(options))
    requests: dict[int, list[ImageRequest]] = {}
    skipped: dict[int, str] = {}
    total = 0
    for number, raw in read_lines(options.prompts).items():
        shard = (number - 1) // (options.shards or 1)
        if shard % world != rank:
            continue
        try:
            images = parse_line(number, raw, defaults, pipeline.sampling, options.seed)
        except (ValueError, OverflowError, RecursionError) as error:
            skipped[number] = one_line(error)
            log.warning("%s: line %d skipped: %s", options.prompts, number, skipped[number])
            continue
        requests.setdefault(shard if options.shards else 0, []).extend(images)
        total += len(images)
        if total > MOST_IMAGES:
            raise ValueError(f"{options.prompts} has more than {MOST_IMAGES:,} images: divide it into several files")
    return requests, skipped


def _generate_missing(
    options: argparse.Namespace,
    pipeline: WuerstchenPipeline,
    requests: Mapping[int, Sequence[ImageRequest]],
    models: Mapping[str, Any],
    show_progress: bool,
) -> tuple[int, int]:
    """Returns the numbers of images that were generated and that existed. Generates none if any check fails."""
    work = []
    for shard, images in requests.items():
        output = open_output(options.output, options.shards, shard)
        work.append((output, _missing(images, output, models)))
    texts = (text for _, images in work for one in images for text in (one.prompt, one.negative))
    pipeline.warn_of_unknown_words(dict.fromkeys(texts))
    total, generated, reported = sum(map(len, requests.values())), 0, time.monotonic()
    existing = total - sum(len(missing) for _, missing in work)
    for output, missing in work:
        for batch in _batches(missing, options.batch or 1):
            prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
            kwargs = {**batch[0].settings.as_dict(), "negative": batch[0].negative, "control": options.control}
            with StepBar(f"image {existing + generated + 1} of {total}: ", show_progress) as callback:
                results = pipeline.generate(prompts, seed=seeds, callback=callback, **kwargs)
            for one, image in zip(batch, results, strict=True):
                output.add(one.name, image, one.metadata(models), options.metadata)
            generated += len(batch)
            if not sys.stderr.isatty() and time.monotonic() - reported >= LINE_INTERVAL:
                reported = time.monotonic()
                sys.stderr.write(f"{existing + generated} of {total} images exist\n")
        output.close()
    return generated, existing


def _batches(images: Sequence[ImageRequest], size: int) -> Iterator[list[ImageRequest]]:
    """Yields lists of up to `size` images with equal settings, which are generated together."""
    groups: dict[Any, list[ImageRequest]] = {}
    for one in images:
        groups.setdefault((one.settings, one.negative), []).append(one)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _missing(images: Sequence[ImageRequest], output: ImageFolder, models: Mapping[str, Any]) -> list[ImageRequest]:
    """Returns the images that do not exist yet. ValueError if one exists with other metadata."""
    existing = output.prepare([one.name for one in images])
    for one in (one for one in images if one.name in existing):
        expected = {**one.metadata(models), "dtype": ""}  # another machine may compute in another dtype
        if {**existing[one.name], "dtype": ""} != expected:
            raise ValueError(
                f"{output.path} contains {one.name} with another prompt, seed, model or option: remove it, or give "
                "another --output"
            )
    return [one for one in images if one.name not in existing]


def _ranks() -> tuple[int, int, int]:
    """Returns this process's rank, the number of processes, and its rank on this machine."""
    for rank, world, local_rank in LAUNCHERS:
        if os.environ.get(rank):
            return int(os.environ[rank]), int(os.environ.get(world) or 1), int(os.environ.get(local_rank) or 0)
    return 0, 1, 0
