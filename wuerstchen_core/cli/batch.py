"""`generate --prompts`: paint what a file asks for, in one process or a share of it in each of many.

The processes never talk: whose a line is follows from its number, and what is there already is seen in the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..common.text import listed
from .batch_output import PictureFolder, Shard, check_form, shard_path
from .options import load, numbers_of
from .progress import Lines, Progress
from .prompt_file import KEYS, NUMBERS, Wanted, read_lines, wanted

if TYPE_CHECKING:
    from ..inference.pipeline import WuerstchenPipeline

log = logging.getLogger(__name__)

# What launchers tell a process, in the order in which accelerate looks for it: torchrun, Intel's MPI, Open MPI.
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclass
class BatchPlan:
    """This process's share: pictures by shard (all under 0 if there are none), and why lines are left out."""

    pictures: dict[int, list[Wanted]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


def run(options: argparse.Namespace) -> None:
    """Paint what is missing, say how much that was, and raise ValueError at the end if lines could not be painted.

    One of many processes only logs these: its failure would make the launcher stop the others.
    """
    rank, world, local = (_told(names, default) for names, default in ((RANK, 0), (WORLD, 1), (LOCAL, 0)))
    if not 0 <= rank < world:
        raise ValueError(
            f"the environment says that this is process {rank} of {world}: unset RANK and WORLD_SIZE, or start it by "
            "accelerate launch or torchrun"
        )
    for name, value in (("--shards", options.shards), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} cannot be used: give a number of at least 1")
    if options.output is None:
        raise ValueError("--prompts needs a folder to paint into: give one as --output")
    if not options.prompts.exists():
        raise ValueError(f"{options.prompts} does not exist: name a file with a JSON table in each line as --prompts")
    check_form(options.output, options.shards)
    options.device = device_of(options.device, local)
    if (options.batch or 1) > 1:
        options.smaller = "choose a smaller --batch"
    started = time.perf_counter()
    pipeline, models = load(options)
    plan = read_plan(options, pipeline, rank, world)
    painted, there = _paint_all(options, pipeline, plan, models, shown=rank == 0)
    report = {
        "output": str(options.output), "process": rank, "processes": world, "device": str(pipeline.device),
        "painted": painted, "there": there, "left_out": plan.bad, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    words = f"{painted} painted, {there} there already, lines left out: {len(plan.bad)}"
    words += f" (process {rank + 1} of {world})" if world > 1 else ""
    sys.stdout.write(f"{json.dumps(report) if options.json else words}\n")
    if plan.bad and world == 1:
        numbers = listed([str(number) for number in plan.bad])
        raise ValueError(
            f"left out of {options.prompts}, for the reasons above, were lines {numbers}; all else is painted"
        )


def device_of(device: str, local: int) -> str:
    """The device of a machine's process number `local`: where nothing is asked for, each has a GPU of its own."""
    import torch

    if device != "auto" or not torch.cuda.device_count():
        return device
    return f"cuda:{local % torch.cuda.device_count()}"  # 0 where the launcher shows each process its own alone


def read_plan(options: argparse.Namespace, pipeline: WuerstchenPipeline, rank: int, world: int) -> BatchPlan:
    """The share of process `rank`; lines that can't be painted are logged."""
    given = {**vars(options), **numbers_of(options)}
    defaults = {name: given[name] for name in KEYS if given.get(name) is not None and name not in ("prompt", "seed")}
    pipeline.sampling.changed(**{name: defaults.get(name) for name in NUMBERS})  # else every line would be left out
    plan, lines = BatchPlan(), options.shards or 1
    for number, raw in read_lines(options.prompts):
        shard = (number - 1) // lines
        if shard % world != rank:
            continue
        try:
            pictures = wanted(number, raw, defaults, pipeline.sampling, options.seed)
        except (ValueError, OverflowError, RecursionError) as error:
            plan.bad[number] = " ".join(str(error).split())
            log.warning("line %d of %s is left out: %s", number, options.prompts, plan.bad[number])
            continue
        plan.pictures.setdefault(shard if options.shards else 0, []).extend(pictures)
    return plan


def _paint_all(
    options: argparse.Namespace, pipeline: WuerstchenPipeline, plan: BatchPlan, models: Mapping[str, Any], shown: bool
) -> tuple[int, int]:
    """How many pictures were painted, and how many were there. Raises ValueError before it paints."""
    work: list[tuple[PictureFolder, list[Wanted]]] = []
    for number, pictures in plan.pictures.items():
        place = PictureFolder(options.output)
        if options.shards:
            place = Shard(shard_path(options.output, number, options.shards))
        work.append((place, _missing(pictures, place, models)))
    total, painted = sum(map(len, plan.pictures.values())), 0
    there, told = total - sum(len(missing) for _, missing in work), Lines()
    for place, missing in work:
        for alike in _batches(missing, options.batch or 1):
            progress = Progress(f"picture {there + painted + 1} of {total}: ") if shown else None
            how = {**alike[0].sampling.numbers(), "negative": alike[0].negative, "callback": progress}
            try:
                images = pipeline.generate([one.prompt for one in alike], seed=[one.seed for one in alike], **how)
            finally:
                if progress is not None:
                    progress.clear()
            for one, image in zip(alike, images, strict=True):
                place.add(one.name, image, one.made(models))
            painted += len(images)
            told.show(f"{there + painted} of {total} pictures are there")
        place.close()
    return painted, there


def _batches(pictures: Sequence[Wanted], size: int) -> Iterator[list[Wanted]]:
    """Pictures that can be painted together: of one size, and sampled alike."""
    alike: dict[Any, list[Wanted]] = {}
    for one in pictures:
        alike.setdefault((one.sampling, one.negative), []).append(one)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _missing(pictures: Sequence[Wanted], place: PictureFolder, models: Mapping[str, Any]) -> list[Wanted]:
    """Those that are not there; ValueError if one was made otherwise."""
    made, missing = place.made(one.name for one in pictures), []
    for one in pictures:
        if one.name not in made:
            missing.append(one)
        elif made[one.name] != one.made(models):
            raise ValueError(
                f"{place} holds {one.name} of another prompt, seed, model or option than is asked for now: "
                "remove it, or give another --output"
            )
    return missing


def _told(names: Sequence[str], default: int) -> int:
    """What a launcher told this process by one of some variables."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
