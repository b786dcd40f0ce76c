"""The sources of a `[data]` table: its own `source`, or an array of tables `[[data.sources]]`, joined to one.

A key of `SourceOptions` or `ExampleConfig` is in `[data]`, for all sources, and may be in each of `[[data.sources]]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
from PIL import Image

from ...common.dataclass_config import MEANING, NotNegative, Positive, option
from .caption_edits import TAG_EDITS
from .examples import ExampleConfig
from .left_out import LeftOut
from .source import RECORD_FIELDS, ImageSource

JOINED_FIELDS = [*RECORD_FIELDS, ("digest", "u8")]  # the digest is of the source's whole record

# Keys of examples, and others that have an effect with one of them only.
_NEEDED = {("mask",): ("unmasked_weight", "normalize_masks"), TAG_EDITS: ("keep_tags", "tag_separator")}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Keys for Hugging Face datasets."""

    split: str | None = option(None, "of a Hugging Face dataset; default: train, or the only one")
    subset: str | None = option(None, "of a dataset on the Hugging Face Hub that has several")
    image_column: str | None = option(None, "of a Hugging Face dataset; default: its only one with images")
    caption_column: str | None = option(
        None, "of a Hugging Face dataset, with texts or lists of texts; default: caption, text, prompt or captions"
    )


EXAMPLE_KEYS: Any = make_dataclass(  # those of ExampleConfig; None: that of [data]
    "ExampleKeys",
    [
        (
            field.name,
            get_type_hints(ExampleConfig, include_extras=True)[field.name] | None,
            option(None, field.metadata[MEANING]),
        )
        for field in fields(ExampleConfig)
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(EXAMPLE_KEYS, SourceOptions):
    """A table of `[[data.sources]]`."""

    source: str | tuple[str, ...] = option(meaning="as [data] source, but no streams and caches")
    repeats: Positive = option(
        1.0, "how often an epoch has each picture; below 1, it has that fraction of the pictures"
    )
    weight: NotNegative = option(1.0, "factor of the loss of its pictures")
    regularisation: bool = option(
        False, "a regularisation set: repeats are chosen so that an epoch has as many of its pictures as of all others"
    )

    def __post_init__(self) -> None:
        if self.regularisation and self.repeats != 1:
            raise ValueError("[[data.sources]] a regularisation set has repeats, which are computed: remove repeats")

    @property
    def names(self) -> list[str]:
        """The folders and files, with {000..127} and {a,b} expanded."""
        names = [self.source] if isinstance(self.source, str) else list(self.source)
        if not any("{" in name for name in names):
            return names
        from braceexpand import braceexpand

        try:  # unescaped, so that Windows paths stay intact
            return [expanded for name in names for expanded in braceexpand(name, escape=False)]
        except ValueError as error:
            raise ValueError(f"[data] source {names[0]} has an unclosed brace: close it") from error

    def with_defaults(self, data: SourceOptions) -> SourceConfig:
        """Returns this table with the keys of `[data]` in place of those that it lacks.

        A regularisation set, which shows what has no trigger word, does not get one.
        """
        shared = [field.name for kind in (SourceOptions, ExampleConfig) for field in fields(kind)]
        values = {name: getattr(data, name) for name in shared if getattr(self, name) is None}
        if self.regularisation and "trigger_word" in values:
            values["trigger_word"] = ""
        merged = {name: values.get(name, getattr(self, name)) for name in shared}
        for switches, keys in _NEEDED.items():
            if not any(merged[name] for name in switches):  # those of `[data]` have no effect on this table's pictures
                values |= {x.name: x.default for x in fields(ExampleConfig) if x.name in keys and x.name in values}
        return replace(self, **values)

    @cached_property
    def examples(self) -> ExampleConfig:
        """What is done with the examples, if this table lacks no key. ValueError for keys without effect."""
        return ExampleConfig(**{field.name: getattr(self, field.name) for field in fields(ExampleConfig)})


def has_pictures(data: Any) -> bool:
    """True if a `[data]` table names sources; otherwise it is of the demo's drawings."""
    return isinstance(data, Mapping) and ("source" in data or "sources" in data)


class JoinedSource(ImageSource):
    """The examples of several sources, one source after another."""

    def __init__(self, sources: Sequence[ImageSource], names: Sequence[str]):
        """`names` are those of the sources, for the log."""
        self.sources, self.left_out = list(sources), LeftOut()
        self.names, self.bad = [], {}
        for source, name in zip(sources, names, strict=True):
            self.names += [f"{name}: {own}" for own in source.names]
            self.bad |= {f"{name}: {own}": reason for own, reason in source.bad.items()}
            self.left_out.take(source.left_out, f"{name}: ")
        self.records = np.concatenate([_joined_records(source.records) for source in sources])
        self._starts = np.cumsum([0, *map(len, sources)])

    @cached_property
    def origins(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sources)), np.diff(self._starts))

    def image(self, index: int) -> Image.Image:
        source, own = self._locate(index)
        return source.image(own)

    def caption(self, index: int) -> str:
        source, own = self._locate(index)
        return source.caption(own)

    def mask(self, index: int, kind: str) -> Image.Image | None:
        source, own = self._locate(index)
        return source.mask(own, kind)

    def hint(self, index: int) -> Image.Image:
        source, own = self._locate(index)
        return source.hint(own)

    def hint_size(self, index: int) -> tuple[int, int]:
        source, own = self._locate(index)
        return source.hint_size(own)

    def has_hint(self, index: int) -> bool:
        source, own = self._locate(index)
        return source.has_hint(own)

    def has_mask(self, index: int, kind: str) -> bool:
        source, own = self._locate(index)
        return source.has_mask(own, kind)

    def _locate(self, index: int) -> tuple[ImageSource, int]:
        """Returns the source of an example, and its index there."""
        number = int(self.origins[index])
        return self.sources[number], index - int(self._starts[number])


def _joined_records(records: np.ndarray) -> np.ndarray:
    """Returns records [N] of JOINED_FIELDS."""
    out = np.empty(len(records), dtype=JOINED_FIELDS)
    for name, _ in RECORD_FIELDS:
        out[name] = records[name]
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in records)
    out["digest"] = np.frombuffer(b"".join(digests), dtype="<u8")
    return out
