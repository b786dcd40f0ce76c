"""Counts the files that are no examples, by kind: masks, hidden files, files of unknown suffixes."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from typing import Any

from ...common.text import listed, parse_json

log = logging.getLogger(__name__)

MASKS = "masks and conditioning images"  # a kind of file
NAMED = 3  # names of each kind in the log
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
