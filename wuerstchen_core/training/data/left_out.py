"""Counts the files that are no examples, by kind: masks, hidden files, files of unknown suffixes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from ...common.text import listed, parse_json
from ...inference.image_files import image_suffixes

log = logging.getLogger(__name__)

MASKS = "masks and conditioning images"  # a kind of file
NAMED = 3  # names of each kind in the log
# Masks of OneTrainer (-masklabel, -condlabel) and others; those of kohya and diffusers are in folders of their own.
ONE_TRAINER = re.compile(r".+-(?:mask|cond)label", re.IGNORECASE)
MASK = re.compile(
    r"(.+?)[-_. ]\(?(?:masks?|mask[-_]?label|condlabel|conditioning(?:[-_]image)?|control|depth|alpha|seg|segmentation)"
    r"[-_.]?\d{0,3}\)?",
    re.IGNORECASE,
)
MASK_FIRST = re.compile(r"masks?[-_. ](.+)", re.IGNORECASE)
MASK_FOLDER = re.compile(r"masks?|mask[-_]?labels?|conditioning(?:[-_].*)?|condlabels?|controls?", re.IGNORECASE)
PACKAGES = {  # for Pillow, by suffix
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
    ".jxl": "pillow-jxl-plugin",
}
# Also the companions ._NAME of files from a Mac, and Synology's folder of thumbnails.
HIDDEN = re.compile(r"\..*|__MACOSX|PaxHeaders?(?:\..*)?|@eaDir")


class LeftOut:
    """The number of files of each kind that are not used, and the first names."""

    def __init__(self, kinds: dict[str, Any] | None = None):
        self._counts: Counter[str] = Counter({kind: count for kind, (count, _) in (kinds or {}).items()})
        self._names = {kind: list(names) for kind, (_, names) in (kinds or {}).items()}

    def add(self, kind: str, name: str) -> None:
        """Counts a file."""
        self._counts[kind] += 1
        if len(names := self._names.setdefault(kind, [])) < NAMED:
            names.append(name)

    def take(self, other: LeftOut, prefix: str = "") -> None:
        """Moves the counts of another here; its names get a prefix."""
        self._counts.update(other._counts)
        for kind, names in other._names.items():
            own = self._names.setdefault(kind, [])
            own += [prefix + name for name in names[: NAMED - len(own)]]
        other._counts.clear()
        other._names.clear()

    def log(self, where: str = "") -> None:
        """Logs a line for each kind."""
        for kind, count in sorted(self._counts.items()):
            names = self._names[kind]
            log.info("left out%s: %d %s: %s", where, count, kind, listed(names + [""] * (count - len(names)), NAMED))

    @property
    def kinds(self) -> set[str]:
        """The kinds that were counted."""
        return set(self._counts)

    def __getitem__(self, kind: str) -> int:
        return self._counts[kind]

    def to_json(self) -> str:
        """Returns what `from_json` reads."""
        return json.dumps({kind: (count, self._names[kind]) for kind, count in self._counts.items()})

    @classmethod
    def from_json(cls, text: str) -> LeftOut:
        return cls(parse_json(text))


def kind_of(suffix: str) -> str:
    """Returns the kind of a file that is not read, from its suffix such as ".npz"."""
    suffix = suffix.lower()
    package = f", which need {PACKAGES[suffix]}" if suffix in PACKAGES else ""
    return f"{suffix} files{package}" if suffix else "files without a suffix"


def in_mask_folder(name: str) -> bool:
    """True if a folder of a path contains masks by its name."""
    return any(map(MASK_FOLDER.fullmatch, name.split("/")[:-1]))


def is_mask(name: str, names: Collection[str] | None, stems: Collection[str]) -> bool:
    """True if an image is a mask or conditioning image of another, by its path without the last suffix.

    `names` are those of all images, None if they are unknown, and `stems` the file names outside of mask folders.
    """
    parts = name.split("/")
    stem = parts[-1]
    if ONE_TRAINER.fullmatch(stem):
        return True
    if names is None:
        return in_mask_folder(name) or _masked_image(stem) is not None
    for number, part in enumerate(parts):
        image = _masked_image(part)
        if image is not None and "/".join([*parts[:number], image, *parts[number + 1 :]]) in names:
            return True
    return in_mask_folder(name) and not {stem, _masked_image(stem), without_suffix(stem)}.isdisjoint(stems)


def _masked_image(stem: str) -> str | None:
    """Returns the stem of the image that a mask belongs to, by the mask's name; None for other names."""
    match = MASK.fullmatch(stem) or MASK_FIRST.fullmatch(stem)
    return without_suffix(match[1]) if match else None


def without_suffix(name: str) -> str:
    """Returns a name without its suffix, if that is an image's."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image_suffixes() else name
