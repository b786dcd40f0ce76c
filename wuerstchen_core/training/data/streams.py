"""Streams: shards from the web, from stores that fsspec knows or from a command's output, read from front to back."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
from fsspec.registry import get_filesystem_class
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ...common.memory import is_out_of_memory
from ...common.text import listed, one_line
from ...inference.image_files import turn
from ...inference.images import open_grey, open_opacity, open_picture, picture_size
from .buckets import Size
from .caption_edits import RANDOM
from .draws import Purpose, generator
from .error_budget import ErrorBudget
from .filters import rejected
from .left_out import MASKS, LeftOut
from .loading import Batch, BatchLoader, Example, ReadResult, collate
from .masks import ALPHA, FILE, check_shape
from .members import Example as Members
from .members import examples_of, is_companion_key, split_name
from .sidecars import MissingCaption, caption_names, read_captions, read_table
from .source import RECORD_FIELDS, image_record
from .tars import open_stream, read_members

log = logging.getLogger(__name__)

PIPE = "pipe"
CURL = ("http", "https")  # schemes of addresses that are read through curl
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
        left_out = LeftOut()
        for result in self.results(replace(self, start=start)):
            bad_shards = {without_secrets(url): reason for url, reason in result.shards.items() if reason}
            shards.add(len(result.shards), bad_shards)
            images.add(result.read, result.bad)
            reasons.update(result.reasons)
            if new := result.left_out.kinds - left_out.kinds:
                log.info("the stream has %s, which are left out", ", ".join(sorted(new)))
            left_out.take(result.left_out)
            first_round = bool(unread)
            unread -= result.shards.keys()
            if first_round and not unread:
                left_out.log(" in the first round of the stream")
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
        epoch, position = divmod(number, len(self.urls))
        url = self.urls[np.random.default_rng((self.seed, epoch)).permutation(len(self.urls))[position]]
        problems, result, found = list[str](), ReadResult(), 0
        left_out = LeftOut()
        for key, members in _read_groups(url, problems, left_out):
            if is_companion_key(key, members):
                left_out.add(MASKS, f"{key}.{next(iter(members))}")
                continue
            for name, files in examples_of(key, members, left_out):
                if files.mask is not None and self.config.mask != FILE:
                    left_out.add(MASKS, f"{name}.mask")
                for example_name, read in self._read_examples(files, f"{without_secrets(url)}:{name}", number, found):
                    found += 1
                    result.read += 1
                    if isinstance(read, ValueError):
                        result.bad[example_name] = str(read)
                        continue
                    reason, bucket, example = read
                    result.reasons[reason] += 1
                    if example is not None:
                        waiting[bucket].append(example)
                    if len(waiting[bucket]) == self.batch:
                        result.batch = collate(waiting.pop(bucket), number + 1)
                        result.left_out.take(left_out, f"{without_secrets(url)}:")
                        yield result
                        result = ReadResult()
        result.left_out.take(left_out, f"{without_secrets(url)}:")
        result.shards[url] = problems[0] if problems else "" if found else f"{without_secrets(url)} contains no image"
        yield result

    def _read_examples(
        self, files: Members[bytes], name: str, number: int, found: int
    ) -> list[tuple[str, ValueError | tuple[str, int, Example | None]]]:
        """Returns the examples of an image, one for each caption: why it is rejected or "", its bucket, and itself.

        `found` is the number of examples before it in shard `number`.
        """
        try:
            table = read_table(files.table, name)
            width, height = picture_size(BytesIO(files.image), name)
            record = image_record((width, height), table, name)
            (reason,), (bucket,) = self.config.select(np.array([record], dtype=RECORD_FIELDS))
            if reason:
                return [(name, (str(reason), int(bucket), None))]
            captions = self._read_captions(files, table, name) if self.captions else [""]
            with turn(width * height):
                return list(self._cropped(files, name, captions, int(bucket), number, found))
        except ValueError as error:
            return [(name, error)]

    def _cropped(
        self, files: Members[bytes], name: str, captions: list[str], bucket: int, number: int, found: int
    ) -> Iterator[tuple[str, ValueError | tuple[str, int, Example | None]]]:
        """Yields the examples of an image that belongs to a bucket, as `_read_examples`."""
        image = open_picture(BytesIO(files.image), name)
        mask = self._read_mask(files, image.size, name)
        if self.config.captions == RANDOM:
            captions = [generator((self.seed, number, found + 1), Purpose.CAPTION).choice(captions).item()]
        for line, (caption, own) in enumerate(zip(captions, caption_names(name, len(captions)), strict=True)):
            key = self.seed, number, found + line + 1
            picture = self.config.recoloured(self.config.crop_image(image, bucket, *key), key)
            example = Example(picture, self.config.edit(caption, key), {})
            if self.config.mask:
                cropped = None if mask is None else self.config.crop_mask(mask, bucket, *key)
                try:
                    weights = self.config.pixel_weights(cropped, self.config.sizes[bucket], own)
                except ValueError as error:
                    yield own, error
                    continue
                example = example._replace(pixel_weights=weights)
            yield own, ("", bucket, example.mirrored() if self.config.flips(key) else example)

    def _read_captions(self, files: Members[bytes], table: Mapping[str, Any], name: str) -> list[str]:
        try:
            return read_captions(files.text, table, name)
        except MissingCaption:
            if not self.config.fixed_edits:
                raise
            return [""]

    def _read_mask(self, files: Members[bytes], size: Size, name: str) -> Image.Image | None:
        """Returns the mask of the image called `name`, of a size, in grey; None if it has none."""
        if self.config.mask == ALPHA:
            return open_opacity(BytesIO(files.image), name)
        if self.config.mask != FILE or files.mask is None:
            return None
        mask = open_grey(BytesIO(files.mask), f"the mask of {name}")
        check_shape(mask.size, size, name)
        return mask


def is_stream(name: str) -> bool:
    """True if a source is an address or a command."""
    return name.startswith("pipe:") or "://" in name


def check_streams(names: Sequence[str], allow_pipe: bool) -> None:
    """Raises ValueError unless all names are streams, and may and can be read."""
    if not all(map(is_stream, names)):
        raise ValueError("[data] source names both streams and files: download the shards, or remove the files")
    schemes = {name.partition(":")[0]: name for name in names}
    if "pipe" in schemes and not allow_pipe:
        raise ValueError(
            f"[data] source {schemes['pipe']} runs a command on this machine: if you trust it, set allow_pipe = true "
            "in [data]"
        )
    if schemes.keys() & set(CURL) and shutil.which("curl") is None:
        raise ValueError("[data] source has shards from the web, which need curl: install it")
    for scheme in schemes.keys() - {*CURL, PIPE}:
        try:
            get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:  # with the package to install
            raise ValueError(f"[data] source {scheme}:// cannot be read by fsspec: {one_line(error)}") from None
    import_module("webdataset")  # fails here, not in a worker, if the package is missing


def without_secrets(url: str) -> str:
    """Returns a shard's name for messages: its address without user, password and query."""
    parts = urlsplit(url)
    return url if parts.scheme == "pipe" else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read_groups(url: str, problems: list[str], left_out: LeftOut) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the neighbouring members of each key by suffix; appends an error that ends the shard to `problems`."""
    key, members, last = "", dict[str, bytes](), 0
    try:
        file = open_stream(_open_url(url))
        for archive, member in read_members(file, left_out):
            own, suffix = split_name(member.name)
            if members and (own, archive) != (key, last):
                yield key, members
                members = {}
            key, last = own, archive
            if suffix in members:
                left_out.add("members that a later one of their name replaces", member.name)
            file.seek(member.offset_data)
            data = file.read(member.size)
            if len(data) < member.size:
                raise ValueError("unexpected end of data")
            members[suffix] = data
    except Exception as error:  # webdataset's and tarfile's, in many classes
        if is_out_of_memory(error):
            raise
        problems.append(f"{without_secrets(url)} cannot be read to its end: {_reason(error, url)}")
    if members:
        yield key, members


def _open_url(url: str) -> Any:
    """Opens a shard: by webdataset if it is from the web or a command, else by fsspec."""
    if url.partition(":")[0] in (*CURL, PIPE):
        from webdataset.gopen import gopen

        return gopen(url)
    return fsspec.open(url, "rb").open()


def _reason(error: Exception, url: str) -> str:
    """Returns why a shard cannot be read, without what messages of storage libraries may contain: signed addresses."""
    if match := re.search(r"exit \d+", str(error)):  # of curl, or of a pipe's command
        return match[0]
    if url.partition(":")[0] in (*CURL, PIPE) or isinstance(error, tarfile.TarError):
        return one_line(error.args[0] if error.args else error)[:80]
    status = getattr(getattr(error, "response", None), "status_code", "")
    return f"{type(error).__name__} {status}".rstrip()
