"""Streams: shards from the web or from a command's output, which `webdataset` reads from front to back."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...common.text import listed, one_line
from ...inference.images import open_picture, picture_size
from .error_budget import ErrorBudget
from .filters import rejected
from .loading import Batch, BatchLoader, Example, ReadResult, collate
from .sidecars import read_caption, read_table
from .source import IMAGE_SUFFIXES, RECORD_FIELDS, image_record

log = logging.getLogger(__name__)

STREAM = "stream"  # the fingerprint of every stream, since its contents are unknown


@dataclass(kw_only=True, eq=False)
class StreamLoader(BatchLoader, IterableDataset[ReadResult]):
    """Reads all shards in endless rounds, each round in another order. As a torch dataset, it yields results.

    Shards are numbered through all rounds. Process r of w reads the numbers n with n % w == r, which its workers divide
    in the same way. A run resumes at the first shard that its process had not begun; the unread rest of earlier shards
    is skipped. All processes must resume at the same number: the largest `next` of all.
    """

    urls: Sequence[str]
    batch: int
    seed: int
    start: int = 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        if start:
            log.info("the stream resumes at shard %d; the unread rest of earlier shards is skipped", start)
        images, shards = ErrorBudget("images", self.config.bad_share), ErrorBudget("shards", self.config.bad_share)
        unread, position = set(self.urls), start
        reasons: Counter[str] = Counter()
        for result in self._results(replace(self, start=start)):
            bad_shards = {without_secrets(url): reason for url, reason in result.shards.items() if reason}
            shards.add(len(result.shards), bad_shards)
            images.add(result.read, result.bad)
            reasons.update(result.reasons)
            first_round = bool(unread)
            unread -= result.shards.keys()
            if first_round and not unread:
                log.info("rejected in the first round of the stream: %s", rejected(reasons))
                if not reasons[""]:
                    raise ValueError(
                        f"no image of the stream can be used: of {images.read} images, {images.failed} are unreadable, "
                        f"and rejected are {rejected(reasons)}; bad shards are {listed(list(shards.names)) or 'none'}: "
                        "see the log for reasons, or choose other filters or a smaller size under [data]"
                    )
            if result.batch is not None:
                position = result.batch.next = max(position, result.batch.next)
                yield result.batch

    def fingerprint(self) -> str:
        return STREAM

    def __iter__(self) -> Iterator[ReadResult]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        waiting: dict[int, list[Example]] = defaultdict(list)  # the examples of incomplete batches, by bucket
        for number in itertools.count(self.start):
            if number % (self.world * workers) == worker * self.world + self.rank:
                yield from self._read_shard(number, waiting)

    def _read_shard(self, number: int, waiting: dict[int, list[Example]]) -> Iterator[ReadResult]:
        turn, position = divmod(number, len(self.urls))
        url = self.urls[np.random.default_rng((self.seed, turn)).permutation(len(self.urls))[position]]
        problems, result, found = list[str](), ReadResult(), 0
        for sample in _read_samples(url, problems):
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
            if suffix is None:
                continue
            found, name = found + 1, f"{without_secrets(sample['__url__'])}:{sample['__key__']}"
            result.read += 1
            try:
                reason, bucket, example = self._read_example(sample, suffix, name, number, found)
            except ValueError as error:
                result.bad[name] = str(error)
                continue
            result.reasons[reason] += 1
            if example is not None:
                waiting[bucket].append(example)
            if len(waiting[bucket]) == self.batch:
                result.batch = collate(waiting.pop(bucket), number + 1)
                yield result
                result = ReadResult()
        result.shards[url] = problems[0] if problems else "" if found else f"{without_secrets(url)} contains no image"
        yield result

    def _read_example(
        self, sample: dict[str, Any], suffix: str, name: str, *key: int
    ) -> tuple[str, int, Example | None]:  # fmt: skip
        """Returns why an example is rejected or "", its bucket, and the example if it is used."""
        table = read_table(sample.get("json"), name)
        record = image_record(picture_size(BytesIO(sample[suffix]), name), table, name)
        (reason,), (bucket,) = self.config.select(np.array([record], dtype=RECORD_FIELDS))
        if reason:
            return str(reason), int(bucket), None
        caption = read_caption(sample.get("txt"), table, name) if self.captions else ""
        image = self.config.crop_image(open_picture(BytesIO(sample[suffix]), name), bucket, self.seed, *key)
        return "", int(bucket), (image, caption, {})


def without_secrets(url: str) -> str:
    """Returns a shard's name for messages: its address without user, password and query."""
    parts = urlsplit(url)
    return url if parts.scheme == "pipe" else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read_samples(url: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the files of each example of a shard by suffix; appends an error that ends it early to `problems`."""
    import webdataset

    def stop(error: Exception) -> bool:
        status = re.search(r"exit \d+", str(error))  # of curl, or of a pipe's command
        reason = status[0] if status else one_line(error.args[0] if error.args else error)[:80]
        problems.append(f"{without_secrets(url)} cannot be read to its end: {reason}")
        return False

    shards = webdataset.SimpleShardList([url])
    yield from webdataset.DataPipeline(shards, webdataset.tarfile_to_samples(handler=stop))
