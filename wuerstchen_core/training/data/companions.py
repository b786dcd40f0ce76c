"""Images that belong to others, by the names of their files and folders: masks, and conditioning images (hints)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from os.path import commonprefix

from ...inference.image_files import image_suffixes

# Of OneTrainer, also with captions. Those of kohya and diffusers are in folders of their own.
ONE_TRAINER = re.compile(r".+-(?:mask|cond)label", re.IGNORECASE)
_NEVER = "(?!)"


class Names:
    """How the files and folders of a kind of images are named, by regular expressions.

    `last` stands behind the name of the other image, `first` before it. `folder` is the whole name of a folder.
    """

    def __init__(self, last: str, first: str = _NEVER, folder: str = _NEVER):
        patterns = rf"(.+?)[-_. ]\(?(?:{last})[-_.]?\d{{0,3}}\)?", rf"(?:{first})[-_. ](.+)", folder
        *self._files, self._folder = (re.compile(pattern, re.IGNORECASE) for pattern in patterns)

    def owner(self, name: str) -> str | None:
        """Returns the name of the image that a file's name, without its suffix, contains; None if it contains none."""
        match = next(filter(None, (pattern.fullmatch(name) for pattern in self._files)), None)
        return _without_suffix(match[1]) if match else None

    def in_folder(self, path: str) -> bool:
        """True if a folder of a path contains such images by its name."""
        return any(map(self._folder.fullmatch, path.split("/")[:-1]))


_MASK = r"masks?|mask[-_]?label", "masks?", r"masks?|mask[-_]?labels?"
_HINT = (
    r"control|conditioning(?:[-_]image)?|condlabel|depth|seg|segmentation",
    _NEVER,
    r"controls?|conditioning(?:[-_].*)?|condlabels?",
)
MASK_NAMES, HINT_NAMES = Names(*_MASK), Names(*_HINT)
COMPANION_NAMES = Names(*map("|".join, zip(_MASK, _HINT, ("alpha", _NEVER, _NEVER), strict=True)))


def is_companion(name: str, names: Collection[str] | None, stems: Collection[str]) -> bool:
    """True if an image is a mask or conditioning image of another, by its path without the last suffix.

    `names` are those of all images, None if they are unknown, and `stems` the file names outside of the companions'
    folders.
    """
    stem = name.rpartition("/")[2]
    if ONE_TRAINER.fullmatch(stem):
        return True
    if names is None:
        return COMPANION_NAMES.in_folder(name) or COMPANION_NAMES.owner(stem) is not None
    if _beside(name, names, COMPANION_NAMES) is not None:
        return True
    return COMPANION_NAMES.in_folder(name) and not _stems(stem, COMPANION_NAMES).isdisjoint(stems)


def match_companions(companions: Iterable[str], images: Collection[str], names: Names) -> dict[str, str]:
    """Returns the companion of each image that has one of the kind `names`, by paths without their last suffix.

    For masks, `a_mask`, `a-masklabel` and `mask_a` belong to `a` in the same folder, `cats_mask/a` to `cats/a`, and
    `mask/a` to the nearest `a`, if there is one nearest. Of several companions of an image the first counts.
    """
    by_stem: dict[str, list[str]] = {}
    for image in images:
        by_stem.setdefault(image.rpartition("/")[2], []).append(image)
    found: dict[str, str] = {}
    for companion in sorted(companions):
        if owner := _beside(companion, images, names) or _nearest(companion, by_stem, names):
            found.setdefault(owner, companion)
    return found


def _beside(companion: str, images: Collection[str], names: Names) -> str | None:
    """Returns the image that a companion's own name, or that of its folder beside the images, contains."""
    parts = companion.split("/")
    for number, part in enumerate(parts):
        if (owner := names.owner(part)) is not None:
            image = "/".join([*parts[:number], owner, *parts[number + 1 :]])
            if image in images:
                return image
    return None


def _nearest(companion: str, by_stem: dict[str, list[str]], names: Names) -> str | None:
    """Returns the image that has the most folders in common with one in a companions' folder; None if several have."""
    if not names.in_folder(companion):
        return None
    *folders, stem = companion.split("/")
    found = (image for own in _stems(stem, names) for image in by_stem.get(own, ()))
    ranked = sorted((_common(folders, image.split("/")[:-1]), image) for image in found)
    if not ranked or (len(ranked) > 1 and ranked[-2][0] == ranked[-1][0]):
        return None
    return ranked[-1][1]


def _stems(stem: str, names: Names) -> set[str]:
    """Returns the names that the image of a companion in a folder of its own may have."""
    return set(filter(None, (stem, names.owner(stem), _without_suffix(stem))))


def _common(one: list[str], other: list[str]) -> int:
    """Returns the number of folders that two paths have in common at their start and at their end."""
    return len(commonprefix([one, other])) + len(commonprefix([one[::-1], other[::-1]]))


def _without_suffix(name: str) -> str:
    """Returns a name without its suffix, if that is an image's."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image_suffixes() else name
