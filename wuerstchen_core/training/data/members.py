"""Assigns the members of a shard to examples, by webdataset's rule and, inside its groups, by the rest of the name.

webdataset's key ends at the first dot: `0003.jpg` and `0003.txt` have the key 0003. So have `0003.image.png` and
`0003.caption.txt`, which are one example, and `0003.a.jpg`, `0003.a.txt`, `0003.b.jpg` and `0003.b.txt`, which are two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from ...inference.image_files import image_suffixes
from .companions import ONE_TRAINER, is_companion
from .left_out import MASKS, LeftOut, kind_of
from .sidecars import TEXT_SUFFIXES

T = TypeVar("T")

PREFERRED = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # of two files of one image
IMAGE_NAMES = ("", "image", "img", "picture", "photo", "input", "target")  # NAME of KEY.NAME.png, the best first
TEXT_NAMES = ("", "caption", "text", "prompt")
LOSS_MASKS = ("mask", "masks", "masklabel")  # NAME of KEY.NAME.png, for the loss of a single image
MASK_NAMES = {*LOSS_MASKS, "condlabel", "conditioning", "conditioning_image", "control", "depth"}


class Example(NamedTuple, Generic[T]):
    """The members of one example."""

    image: T
    text: T | None
    table: T | None
    mask: T | None


def split_name(name: str) -> tuple[str, str]:
    """Returns the key and the suffix, without its dot and in lower case, of a member's name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}" if folder and stem else stem, suffix.lower()


def is_companion_key(
    key: str, members: Mapping[str, T], keys: Collection[str] | None = None, stems: Collection[str] = ()
) -> bool:
    """True if the members of a key are a mask or conditioning image, and no image with a caption.

    `keys` and `stems` as in `is_companion`.
    """
    texts = any(f".{suffix}".endswith((*TEXT_SUFFIXES, ".json")) for suffix in members)
    return is_companion(key, keys, stems) and (not texts or ONE_TRAINER.fullmatch(key) is not None)


def examples_of(key: str, members: Mapping[str, T], left_out: LeftOut) -> Iterator[tuple[str, Example[T]]]:
    """Yields the examples among the members (suffix → contents) of one key, with their names.

    The mask of an example is not counted in `left_out`.
    """
    images: dict[str, dict[str, T]] = {}  # by what is between the key and the last suffix
    texts: dict[str, dict[str, T]] = {suffix: {} for suffix in (*TEXT_SUFFIXES, ".json")}
    rest = set(members)
    for suffix, member in members.items():
        name, _, last = suffix.rpartition(".")
        if f".{last}" in image_suffixes():
            images.setdefault(name, {})[f".{last}"] = member
        elif f".{last}" in texts:
            texts[f".{last}"][name] = member
    others = images.keys() & MASK_NAMES if images.keys() - MASK_NAMES else set()
    masks = {name: images.pop(name) for name in sorted(others)}
    own = [name for name in images if any(name in found for found in texts.values())]
    chosen = own or [name for name in IMAGE_NAMES if name in images][:1] or list(images)
    mask = next((name for name in LOSS_MASKS if name in masks and len(chosen) == 1), None)
    mask_file = None if mask is None else f"{mask}{next(iter(masks[mask]))}"
    for file in [f"{name}{last}" for name, files in masks.items() for last in files]:
        rest.discard(file)
        if file != mask_file:
            left_out.add(MASKS, f"{key}.{file}")
    for name in chosen:
        last = next((suffix for suffix in PREFERRED if suffix in images[name]), next(iter(images[name])))
        used = {last: name}
        for suffix, found in texts.items():
            if (text := _text_name(name, found, len(chosen) == 1)) is not None:
                used[suffix] = text
        if ".txt" in used:
            used.pop(".caption", None)
        files = {suffix: _join(text, suffix) for suffix, text in used.items()}
        rest -= set(files.values())
        text_file = next((files[suffix] for suffix in TEXT_SUFFIXES if suffix in files), None)
        yield (
            f"{key}.{name}" if name and len(chosen) > 1 else key,
            Example(
                images[name][last],
                None if text_file is None else members[text_file],
                members[files[".json"]] if ".json" in files else None,
                None if mask_file is None else members[mask_file],
            ),
        )
    for suffix in sorted(rest):
        last = f".{suffix.rpartition('.')[2]}"
        if last in image_suffixes():
            kind = "further images of an example"
        else:
            kind = "texts without an image, or beside another" if last in texts else kind_of(last.removesuffix("."))
        left_out.add(kind, f"{key}.{suffix}")


def _join(name: str, suffix: str) -> str:
    return f"{name}{suffix}" if name else suffix[1:]


def _text_name(image: str, texts: Mapping[str, object], alone: bool) -> str | None:
    """Returns the name of an image's text: its own, a common one or, of a single image, the only one."""
    common = [name for name in (image, *TEXT_NAMES) if name in texts]
    return common[0] if common else next(iter(texts)) if alone and len(texts) == 1 else None
