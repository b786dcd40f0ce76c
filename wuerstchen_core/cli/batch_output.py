"""The output of `generate --prompts`: a folder of image files, or webdataset shards. Both can be trained on.

A file under its final name is complete. The next run removes the drafts of a killed process.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.atomic import remove_drafts, replace_file, write_text
from ..training.data.metadata import METADATA, image_name, read_rows
from ..training.data.shards import add_member
from ..training.data.sidecars import parse_json_table
from .save import save_image


class ImageFolder:
    """A folder with two files per image: NAME.json with its metadata, and NAME.png, which is written last.

    Its metadata.jsonl has a row per image, as Hugging Face's `imagefolder` reads it.
    """

    def __init__(self, folder: Path):
        self.folder = self.path = folder

    def prepare(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """Removes drafts of these images, and returns the metadata of those that exist.

        No other process may be writing them. ValueError if a file of such a name comes from another program.
        """
        files, existing = {path.name for path in self.folder.glob("*")}, {}
        for name in sorted(names):
            png, file = f"{name}.png" in files, self.folder / f"{name}.json"
            table = parse_json_table(file.read_bytes(), str(file)) if file.name in files else None
            if png and table is not None:
                existing[name] = table
            elif png or (table is not None and "weights" not in table):
                raise ValueError(
                    f"{self.folder} contains {name}.{'png' if png else 'json'}, which is not from --prompts: move it, "
                    "or choose another --output"
                )
        remove_drafts(self.folder, {f"{name}{suffix}" for name in names for suffix in (".json", ".png")})
        return existing

    def add(self, name: str, image: Image.Image, table: Mapping[str, Any], metadata: bool = True) -> None:
        """Writes an image and its table; `metadata` as in `save_image`."""
        write_text(self.folder / f"{name}.json", json.dumps(table, ensure_ascii=False))
        save_image(image, self.folder / f"{name}.png", metadata)

    def close(self) -> None:
        """Writes metadata.jsonl with the rows of all images in the folder, also those of other processes and runs."""
        path, tables = self.folder / METADATA[0], {}
        while new := [name for name in self._names() if name not in tables]:  # other processes may add images meanwhile
            for file in (self.folder / f"{name}.json" for name in new):
                tables[file.stem] = parse_json_table(file.read_bytes(), str(file))
            rows = self._other_rows(path, tables)
            rows += [
                json.dumps({"file_name": f"{name}.png", "text": table["prompt"], **table}, ensure_ascii=False)
                for name, table in sorted(tables.items())
                if "weights" in table  # from --prompts
            ]
            write_text(path, "".join(f"{row}\n" for row in rows))

    def _names(self) -> list[str]:
        """Returns the names of all images in the folder that have a .json file."""
        files = {path.name for path in self.folder.iterdir()}
        return [name[:-4] for name in files if name.endswith(".png") and f"{name[:-4]}.json" in files]

    def _other_rows(self, path: Path, tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Returns the rows of metadata.jsonl for existing files that are not from `--prompts`.

        ValueError if a row cannot be read.
        """
        kept = []
        for where, row in read_rows(path, str(path)) if path.is_file() else ():
            if isinstance(row, ValueError):
                raise row
            file = image_name(row, where)
            if "weights" not in tables.get(file.removesuffix(".png"), {}) and (self.folder / file).is_file():
                kept.append(json.dumps(row, ensure_ascii=False))
        return kept


class Shard(ImageFolder):
    """A tar file. New images are in a hidden folder next to it until all of them are generated."""

    def __init__(self, path: Path):
        super().__init__(path.with_name(f".{path.stem}"))
        self.path = path

    def prepare(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        remove_drafts(self.path.parent, {self.path.name})
        packed = {
            name[:-5]: parse_json_table(content, f"{self.path}: {name}") for name, content in self._members(".json")
        }
        return {**packed, **super().prepare(set(names) - packed.keys())}

    def close(self) -> None:
        """Unpacks the old tar file into the hidden folder, packs all images into a new one and removes the folder."""
        if not self.folder.is_dir():
            return
        for name, content in self._members():
            (self.folder / Path(name).name).write_bytes(content)
        replace_file(self.path, self._pack)
        shutil.rmtree(self.folder)

    def _pack(self, draft: Path) -> None:
        with tarfile.open(draft, "w") as tar:
            for image in sorted(self.folder.glob("*.png"), key=lambda file: file.stem):
                if (metadata := image.with_suffix(".json")).exists():
                    for file in (metadata, image):
                        add_member(tar, file.name, file.read_bytes())

    def _members(self, suffix: str = "") -> Iterator[tuple[str, bytes]]:
        """Yields the files in the tar file whose names end with `suffix`; nothing if there is none yet."""
        if not self.path.exists():
            return
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if member.name.endswith(suffix) and (file := tar.extractfile(member)) is not None:
                        yield member.name, file.read()
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} cannot be read ({error}): remove it to generate its images again") from error


def open_output(folder: Path, lines: int | None, shard: int) -> ImageFolder:
    """Returns the output for a shard of `lines` lines (None: the folder itself)."""
    return Shard(folder / f"{shard:06d}-by-{lines}.tar") if lines else ImageFolder(folder)


def check_folder(folder: Path, lines: int | None) -> None:
    """Raises ValueError if the output folder is a file, or holds images of a run with another --shards."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: with --prompts, --output is a folder")
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".tar", ".png"))
    names += sorted(f"{path.name}.tar" for path in folder.glob(".*-by-*") if path.is_dir())  # unfinished shards
    suffix = f"-by-{lines}.tar" if lines else ".png"
    if other := next((name for name in names if not name.endswith(suffix)), ""):
        raise ValueError(f"{folder} contains {other} from a run with other --shards: use the same, or another folder")
