"""Folders of images, whose captions are in files of the same name or in a table such as metadata.jsonl."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ...inference.image_files import image_suffixes
from ...inference.images import has_alpha, open_grey, open_opacity, open_picture, picture_size
from .companions import COMPANION_NAMES, HINT_NAMES, MASK_NAMES, ONE_TRAINER, Names, is_companion, match_companions
from .left_out import HIDDEN, MASKS, LeftOut, kind_of
from .masks import ALPHA, check_shape
from .metadata import METADATA, ImagePlaces, companion_names, hint_name, image_name, mask_name, read_rows
from .sidecars import TEXT_SUFFIXES, caption_names, has_caption, read_captions, read_table
from .source import RECORD_FIELDS, ImageSource, image_record, read_at, read_bytes

# The digest is of the file's size, its caption and two samples, so that a run's fingerprint depends on the contents.
FOLDER_FIELDS = [*RECORD_FIELDS, ("digest", "u8")]
SAMPLE = 4096  # bytes in each of a digest's two samples of the image file: one page


class Sidecars(NamedTuple):
    """The files and rows with an image's captions and scores."""

    text: Path | None
    table: Path | None
    rows: list[Mapping[str, Any]]  # of metadata files

    @property
    def used(self) -> set[Path]:
        """The files that are read."""
        files = () if any(map(has_caption, self.rows)) else (self.text, self.table)
        return {path for path in files if path is not None}

    def read_table(self, name: str) -> Mapping[str, Any]:
        """Returns the first row, else the JSON table, of the image called `name`."""
        return self.rows[0] if self.rows else read_table(_read(self.table), name)

    def captions(self, name: str) -> list[str]:
        """Returns the captions in the rows, else in the text file, else in the JSON table."""
        if captions := [text for row in self.rows if has_caption(row) for text in read_captions(None, row, name)]:
            return list(dict.fromkeys(captions))
        return read_captions(_read(self.text), read_table(_read(self.table), name), name)


class FolderSource(ImageSource):
    """All images in and below some folders, sorted by path within each, and those that a table in them names.

    Captions come from the rows of a table that name the image, else from .txt or .caption, else from .json; scores from
    the table or .json. Only headers and samples of the image files are read until an image is needed.
    """

    def __init__(self, roots: Sequence[Path], use_masks: bool = False, use_hints: bool = False):
        """`use_masks`: True if the loss is weighted by the mask files beside the images; `use_hints`: True if a
        ControlNet reads the hint pictures beside them."""
        self.names, self.bad, self.left_out = [], {}, LeftOut()
        self._paths: list[Path] = []
        self._masks: list[Path | None] = []
        self._hints: list[Path | None] = []
        self._sidecars: list[Sidecars] = []
        names: dict[Path, str] = {}
        files: list[Path] = []
        for root in roots:
            found = find_files(root, self.left_out)
            names |= {path: (path.relative_to(root) if len(roots) == 1 else path).as_posix() for path in found}
            files += found
        images = list(filter(is_image, files))
        rows, named_companions, named_masks, named_hints = self._read_tables(files, names, images)
        images += [path for path in rows if path not in names]
        texts = {(os.path.splitext(path)[0], path.suffix.lower()): path for path in names if not is_image(path)}
        sidecars = {path: _sidecars(path, texts, rows.get(path, [])) for path in images}
        named = {path: names.get(path, str(path)) for path in images}
        captioned = {x for x, own in sidecars.items() if (own.text or own.rows) and not ONE_TRAINER.fullmatch(x.stem)}
        companions = named_companions | (find_companions(named, named_companions) - captioned)
        mask_of = (_match(named, companions, MASK_NAMES) | named_masks) if use_masks else {}
        hint_of = (_match(named, companions, HINT_NAMES) | named_hints) if use_hints else {}
        records: list[tuple[float, ...]] = []
        used = {path for path in names if path.name.lower() in METADATA} | {*mask_of.values(), *hint_of.values()}
        for path in images:
            if path not in companions:
                used |= sidecars[path].used
                name = names.get(path, os.path.relpath(path, roots[0]))
                self._add_image(path, name, sidecars[path], mask_of.get(path), hint_of.get(path), records)
            elif path not in used:
                self.left_out.add(MASKS, named[path])
        for path in files:
            if path not in used and not is_image(path):
                self.left_out.add(_kind(path), names[path])
        self.records = np.array(records, dtype=FOLDER_FIELDS)

    def image(self, index: int) -> Image.Image:
        return open_picture(self._paths[index], self.names[index])

    def caption(self, index: int) -> str:
        captions = self._sidecars[index].captions(self.names[index])
        return captions[min(int(self.records["line"][index]), len(captions) - 1)]

    def mask(self, index: int, kind: str) -> Image.Image | None:
        if kind == ALPHA:
            return open_opacity(self._paths[index], self.names[index])
        if (path := self._masks[index]) is None:
            return None
        mask, record = open_grey(path, str(path)), self.records[index]
        check_shape(mask.size, (int(record["width"]), int(record["height"])), self.names[index])
        return mask

    def has_mask(self, index: int, kind: str) -> bool:
        return has_alpha(self._paths[index], self.names[index]) if kind == ALPHA else self._masks[index] is not None

    def has_hint(self, index: int) -> bool:
        return self._hints[index] is not None

    def hint(self, index: int) -> Image.Image:
        path = self._hint_path(index)
        return open_picture(path, str(path))

    def hint_size(self, index: int) -> tuple[int, int]:
        path, record = self._hint_path(index), self.records[index]
        size = picture_size(path, str(path))
        check_shape(size, (int(record["width"]), int(record["height"])), self.names[index], "hint")
        return size

    def _hint_path(self, index: int) -> Path:
        """Returns the file of an example's hint picture. ValueError if it has none."""
        if (path := self._hints[index]) is None:
            name = self.names[index]
            raise ValueError(f"{name} has no hint picture: add {Path(name).stem}.control.png, or another file of it")
        return path

    def _add_image(
        self,
        path: Path,
        name: str,
        sidecars: Sidecars,
        mask: Path | None,
        hint: Path | None,
        records: list[tuple[float, ...]],
    ) -> None:
        """Adds the examples of an image, or the reason for which it is unreadable."""
        try:
            captions = sidecars.captions(name)
        except ValueError:  # reported when the caption is needed
            captions = [""]
        try:
            table, extra = sidecars.read_table(name), b""
            for companion in filter(None, (mask, hint)):
                with companion.open("rb") as file:
                    extra += read_samples(file)
            with path.open("rb") as file:
                own = example_records(file, name, table, captions, extra)
        except OSError as error:
            self.bad[name] = f"{name} cannot be read: {error.strerror}"
            return
        except ValueError as error:
            self.bad[name] = str(error)
            return
        records += own
        self.names += caption_names(name, len(own))
        self._paths += [path] * len(own)
        self._masks += [mask] * len(own)
        self._hints += [hint] * len(own)
        self._sidecars += [sidecars] * len(own)

    def _read_tables(
        self, files: Sequence[Path], names: Mapping[Path, str], images: Sequence[Path]
    ) -> tuple[dict[Path, list[Mapping[str, Any]]], set[Path], dict[Path, Path], dict[Path, Path]]:
        """Returns the rows of the tables by image, their masks and hints, and the masks and the hints by image."""
        rows: dict[Path, list[Mapping[str, Any]]] = {}
        masks: dict[Path, Path] = {}
        hints: dict[Path, Path] = {}
        companions: set[Path | None] = set()
        places = ImagePlaces(images)
        for table in files:
            for where, row in read_rows(table, names[table]) if table.name.lower() in METADATA else ():
                try:
                    if isinstance(row, ValueError):
                        raise row
                    name = image_name(row, where)
                    if (image := places.find(table.parent, name)) is None:
                        raise ValueError(f"{where} names {name}, which does not exist: correct the file_name")
                    rows.setdefault(image, []).append(row)
                    companions |= {places.find(table.parent, name) for name in companion_names(row)}
                    for found, name_of in ((masks, mask_name), (hints, hint_name)):
                        if (other := name_of(row)) and (place := places.find(table.parent, other)):
                            found[image] = place
                except ValueError as error:
                    self.bad[where] = str(error)
        return rows, {path for path in companions if path and path in names and path not in rows}, masks, hints


def _read(path: Path | None) -> bytes | None:
    return None if path is None else read_bytes(path)


def find_files(root: Path, left_out: LeftOut) -> list[Path]:
    """Returns the files in and below a folder, sorted by path. Links are followed, and each folder is read once.

    Hidden files and folders, and what cannot be read, are counted in `left_out`.
    """
    files, folders, seen = [], deque([root]), set()
    while folders:
        folder = folders.popleft()
        if (place := os.path.realpath(folder)) in seen:
            left_out.add("links to folders that are read already", folder.relative_to(root).as_posix())
            continue
        seen.add(place)
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            left_out.add("folders that cannot be read", f"{folder} ({error.strerror})")
            continue
        for entry in entries:
            path = folder / entry.name
            if HIDDEN.fullmatch(entry.name):
                left_out.add("hidden files and folders", path.relative_to(root).as_posix())
            elif entry.is_dir():
                (folders.append if entry.is_symlink() else folders.appendleft)(path)  # links last: the folder counts
            elif entry.is_file():
                files.append(path)
            else:
                left_out.add("broken links and devices", path.relative_to(root).as_posix())
    return sorted(files)


def is_image(path: Path) -> bool:
    """True if a path has the suffix of an image."""
    return path.suffix.lower() in image_suffixes()


def find_companions(images: Mapping[Path, str], named: set[Path]) -> set[Path]:
    """Returns the images (path → name) that are masks or conditioning images of others, by their names and folders.

    `named` are those that a table names.
    """
    names = {path: os.path.splitext(name)[0] for path, name in images.items()}
    stems = {path.stem for path, name in names.items() if not COMPANION_NAMES.in_folder(name)}
    others = {name for path, name in names.items() if path not in named}
    return {path for path, name in names.items() if is_companion(name, others, stems)}


def _match(images: Mapping[Path, str], companions: set[Path], kind: Names) -> dict[Path, Path]:
    """Returns the mask or hint of each image (path → name) that has one among `companions`, by their names."""
    stems = {path: os.path.splitext(name)[0] for path, name in images.items()}
    paths = {stem: path for path, stem in stems.items() if path in companions}
    found = match_companions(paths, {stem for path, stem in stems.items() if path not in companions}, kind)
    return {path: paths[found[stem]] for path, stem in stems.items() if path not in companions and stem in found}


def _sidecars(image: Path, texts: Mapping[tuple[str, str], Path], rows: list[Mapping[str, Any]]) -> Sidecars:
    """Returns the sidecars of an image: NAME.txt or, for NAME.jpg, NAME.jpg.txt."""
    stems = os.path.splitext(image)[0], str(image)
    text = next((texts[stem, suffix] for stem in stems for suffix in TEXT_SUFFIXES if (stem, suffix) in texts), None)
    table = next((texts[stem, ".json"] for stem in stems if (stem, ".json") in texts), None)
    return Sidecars(text, table, rows)


def example_records(
    file: BinaryIO, name: str, table: Mapping[str, Any], captions: Sequence[str], extra: bytes = b""
) -> list[tuple[float, ...]]:
    """Returns the records of FOLDER_FIELDS of an image, one for each caption, from its open file.

    `extra`: more that the digests depend on.
    """
    pixels, size = picture_size(file, name), file.seek(0, os.SEEK_END)
    samples = read_samples(file) + extra
    digests = (hashlib.blake2b(f"{size} {text}".encode() + samples, digest_size=8).digest() for text in captions)
    return [
        (*image_record(pixels, table, name, line), int.from_bytes(digest, "little"))
        for line, digest in enumerate(digests)
    ]


def read_samples(file: BinaryIO) -> bytes:
    """Returns two samples of a file, since the end of a BMP can be a plain border."""
    size = file.seek(0, os.SEEK_END)
    return b"".join(read_at(file, start, SAMPLE) for start in (size // 2, max(0, size - SAMPLE)))


def _kind(path: Path) -> str:
    texts = (*TEXT_SUFFIXES, ".json")
    return "texts without an image, or beside another" if path.suffix.lower() in texts else kind_of(path.suffix)
