"""Shards that can only be read front to back: from the web, or from a command's output. Read through `webdataset`."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...inference.images import open_picture, picture_size
from .buckets import fit
from .error_budget import ErrorBudget, listed
from .filters import Choice, left_out
from .loading import Batch, Pictures, Reading, crop_centre
from .sidecars import caption_from_table, caption_from_text, scores_from_table, table_from_json
from .source import ENTRY, SUFFIXES, entry

log = logging.getLogger(__name__)


Example = tuple[Tensor, str, str]  # picture, caption, name


class StreamedPictures(Pictures):
    """Batches out of endless rounds through the shards, each round in an order of its own, by the seed.

    Shards are numbered through all rounds; process r of w takes the numbers ≡ r (mod w), and so do its workers among
    themselves. A run resumes at the first shard that its process had not begun: what the others still held is skipped.
    Processes of one run start at the same number, best the largest that any had as its `next`.
    """

    exact = False

    def __init__(
        self, urls: Sequence[str], choice: Choice, batch: int, seed: int, *, workers: int = 0,
        bad_share: float = 0.05, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        super().__init__(choice, workers, bad_share)
        self.urls = urls
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world

    def batches(self, start: int = 0) -> Iterator[Batch]:
        if start:
            log.info("the stream goes on at its next shard, number %d: the rest of those before is skipped", start)
        shards = _Shards(self.urls, self.choice, self.batch, self.seed, self.rank, self.world, start)
        pictures, tars = ErrorBudget("pictures", self.bad_share), ErrorBudget("shards", self.bad_share)
        every, seen = set(self.urls), set[str]()
        reasons: Counter[str] = Counter()
        following = start
        for reading in self._readings(shards, None):
            tars.add(len(reading.shards), {shown(url): reason for url, reason in reading.shards.items() if reason})
            pictures.add(reading.pictures, reading.bad)
            reasons.update(reading.reasons)
            if seen != every:
                seen |= set(reading.shards)
                if seen == every:
                    self._say(reasons, pictures, tars)
            if reading.batch is not None:
                following = reading.batch.next = max(following, reading.batch.next)
                yield reading.batch

    def _say(self, reasons: Counter[str], pictures: ErrorBudget, tars: ErrorBudget) -> None:
        """Say once, after all shards, what was left out; ValueError if it was everything."""
        if not pictures.read:
            raise ValueError(
                f"no shard of the stream holds a picture that can be read: {listed(list(tars.named))}; the log has the "
                "reason for each"
            )
        if not reasons[""]:
            raise ValueError(
                f"none of the {pictures.read} pictures of the stream is left, without {left_out(reasons)} and "
                f"{pictures.failed} that cannot be used: choose other filters or a smaller size under [data]"
            )
        log.info("left out of the stream, after all its shards: %s", left_out(reasons))


@dataclass
class _Shards(IterableDataset[Reading]):
    """Shards read front to back: what workers run."""

    urls: Sequence[str]
    choice: Choice
    batch: int
    seed: int
    rank: int
    world: int
    start: int

    def __iter__(self) -> Iterator[Reading]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        waiting: dict[int, list[Example]] = defaultdict(list)  # for a batch, by bucket
        for number in itertools.count(self.start):
            if number % (self.world * workers) == worker * self.world + self.rank:
                yield from self._read(number, waiting)

    def _read(self, number: int, waiting: dict[int, list[Example]]) -> Iterator[Reading]:
        """Read a shard through; what doesn't fill a batch stays in `waiting`."""
        turn, place = divmod(number, len(self.urls))
        url = self.urls[np.random.default_rng((self.seed, turn)).permutation(len(self.urls))[place]]
        problems, out, found = list[str](), Reading(), 0
        for sample in _samples(url, problems):
            kind = next((kind for kind in SUFFIXES if kind in sample), None)
            if kind is None:
                continue
            found += 1
            bucket = self._take(sample, kind, (number, found), waiting, out)
            if bucket is not None and len(waiting[bucket]) == self.batch:
                images, captions, names = zip(*waiting.pop(bucket), strict=True)
                out.batch = Batch(torch.stack(images), list(captions), list(names), number + 1)
                yield out
                out = Reading()
        out.shards[url] = problems[0] if problems else "" if found else f"{shown(url)} holds no picture"
        yield out

    def _take(
        self, sample: dict[str, Any], kind: str, place: tuple[int, int], waiting: dict[int, list[Example]], out: Reading
    ) -> int | None:  # fmt: skip
        """Put an example where it waits for its batch; its bucket, or None if it's left out."""
        name, choice = f"{shown(sample['__url__'])}:{sample['__key__']}", self.choice
        out.pictures += 1
        try:
            table = table_from_json(sample["json"], f"the .json of {name}") if "json" in sample else {}
            size = picture_size(BytesIO(sample[kind]), name)
            (reason,), (bucket,) = choice.of(np.array([entry(size, scores_from_table(table, name))], dtype=ENTRY))
            if not reason:
                caption = _caption(sample, table, name) if choice.captions else ""
                picture = open_picture(BytesIO(sample[kind]), name)
                image = fit(picture, choice.sizes[bucket], crop_centre(choice.random_crop, self.seed, *place))
                waiting[bucket].append((image, caption, name))
        except ValueError as error:
            out.bad[name] = str(error)
            return None
        out.reasons[str(reason)] += 1
        return None if reason else int(bucket)


def shown(url: str) -> str:
    """A shard's name for the log: an address without what may be secret in it."""
    parts = urlsplit(url)
    return url if parts.scheme == "pipe" else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _samples(url: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The examples of a shard, by kind; what ends it too early is put into `problems`."""
    import webdataset

    def stop(error: Exception) -> bool:
        status = re.search(r"exit \d+", str(error))  # of curl, or of a pipe's command
        why = status[0] if status else " ".join(str(error.args[0] if error.args else error).split())[:80]
        problems.append(f"{shown(url)} cannot be read, or not to its end: {why}")
        return False

    shard = webdataset.SimpleShardList([url])
    yield from webdataset.DataPipeline(shard, webdataset.tarfile_to_samples(handler=stop))


def _caption(sample: dict[str, Any], table: dict[str, Any], name: str) -> str:
    if "txt" in sample:
        return caption_from_text(sample["txt"], name)
    return caption_from_table(table, name)
