"""Downloads published files with huggingface_hub, on request only, and checks them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..common.atomic import NO_SPACE, check_room, nearest_folder
from ..common.lock import folder_lock
from ..common.text import check_choice, listed, one_line
from ..common.versions import OLDEST_FOR_PICKLES, check_versions
from .published import HUB, SETS, PublishedFile

logger = logging.getLogger(__name__)

_DRAFTS = ".wuerstchen-download"  # subfolder for incomplete files, from which downloads resume
_SHA256 = re.compile(r"[0-9a-f]{64}")


def comfyui_targets(name: str, comfyui: Path) -> dict[PublishedFile, Path]:
    """Returns the files of a set by the paths where ComfyUI's loaders find them; `comfyui` is its folder."""
    models = comfyui if comfyui.name == "models" else comfyui / "models"
    if not models.is_dir():
        raise ValueError(f"{comfyui} is not a ComfyUI folder: it has no folder `models`")
    return {file: models / file.folder / file.name for file in files_of(name)}


def folder_targets(name: str, folder: Path) -> dict[PublishedFile, Path]:
    """Returns the files of a set by their paths in one folder, which is then a model for Python and the CLI."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder")
    return {file: folder / file.name for file in files_of(name)}


def files_of(name: str) -> tuple[PublishedFile, ...]:
    """Returns the files of a set. Raises ValueError for unknown names."""
    check_choice("model", name, SETS)
    return SETS[name]


def download(targets: Mapping[PublishedFile, Path]) -> list[Path]:
    """Downloads the files that are not at their targets yet, and returns all paths. Resumes an interrupted download.

    A file appears complete and checked, or not at all. Raises ValueError if huggingface_hub is missing, the hub cannot
    be reached or has another file, or another process downloads to the same folder, and OSError if a disk is too small
    or read-only.
    """
    hub = _hub()
    missing = {file: path for file, path in targets.items() if not path.exists()}
    for file, path in targets.items():
        if file not in missing:
            _check_existing(file, path)
    _check_torch([file for file in missing if _is_pickle(file)], {file.part for file in targets})
    _check_space(missing)
    with ExitStack() as locks:
        for folder in sorted({path.parent / _DRAFTS for path in missing.values()}):
            locks.enter_context(_locked(folder))
        for file, path in missing.items():
            if not path.exists():  # else another process has just downloaded it
                _fetch(hub, file, path)
    for file, path in targets.items():
        if (path.parent / _DRAFTS).is_dir():  # what this download or an interrupted one has left
            with suppress(OSError, ValueError), _locked(path.parent / _DRAFTS):
                shutil.rmtree(_drafts(file, path), ignore_errors=True)
    return list(targets.values())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder for drafts while a `with` block runs, and then removes it if it is empty."""
    try:
        with folder_lock(folder):
            yield
    finally:
        with suppress(OSError):  # it has an interrupted download, or another process has locked it
            folder.rmdir()


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError("download needs huggingface_hub: run `pip install huggingface_hub`") from error
    return huggingface_hub


def _check_existing(file: PublishedFile, path: Path) -> None:
    """Raises ValueError if a file that is there already is another one."""
    if file.sha256 and not _checksum(path).startswith(file.sha256):
        raise ValueError(f"{path} is there already but is not {file.url}: rename or remove it")
    logger.info(f"{path} is there already")


def _check_torch(pickles: Sequence[PublishedFile], parts: Collection[str]) -> None:
    """Warns if torch is too old to read files, and names a set of safetensors files of these parts, if any.

    It does not refuse, since the files may be for another machine.
    """
    try:
        if pickles:
            check_versions(OLDEST_FOR_PICKLES)
    except ValueError as error:
        sets = {name: {file.part for file in files} for name, files in SETS.items() if not any(map(_is_pickle, files))}
        instead = "".join(f", or download {name}, which is safetensors files" for name in sets if sets[name] == parts)
        names = listed([file.name for file in pickles])
        logger.warning(f"PyTorch files ({names}) are not read here, since {error}{instead}")


def _is_pickle(file: PublishedFile) -> bool:
    return not file.name.endswith(".safetensors")


def _check_space(missing: Mapping[PublishedFile, Path]) -> None:
    """Raises OSError if a disk has less space than the files need, without what is downloaded already."""
    needed: dict[int, tuple[Path, int]] = {}
    for file, path in missing.items():
        device = nearest_folder(path).stat().st_dev
        first, size = needed.get(device, (path, 0))
        needed[device] = first, size + max(0, file.size - _downloaded(file, path))
    for path, size in needed.values():
        check_room(path, size, "the download")


def _drafts(file: PublishedFile, path: Path) -> Path:
    return path.parent / _DRAFTS / file.repo.replace("/", "--")


def _downloaded(file: PublishedFile, path: Path) -> int:
    """Returns the bytes of an interrupted download."""
    drafts = _drafts(file, path) / ".cache" / "huggingface" / "download" / Path(file.path).parent
    return max((part.stat().st_size for part in drafts.glob("*.incomplete")), default=0)


def _fetch(hub: Any, file: PublishedFile, path: Path) -> None:
    """Downloads one file to `path`."""
    drafts, log = _drafts(file, path), logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # not a line for each attempt
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = file.sha256 or _hubs_checksum(hub, file)
        draft = Path(hub.hf_hub_download(file.repo, file.path, revision=file.revision, local_dir=drafts))
    except Exception as error:  # of huggingface_hub and of the HTTP library that it uses, which differ by version
        raise _failure(file, path, error) from error
    finally:
        log.setLevel(level)
    if expected and not _checksum(draft).startswith(expected):
        draft.unlink()
        raise ValueError(f"{file.url} was not kept, since its sha256 is not {expected[:8]}...: try again later")
    if not expected:
        logger.warning(f"{path} could not be checked: the hub gave no sha256")
    os.replace(draft, path)


def _hubs_checksum(hub: Any, file: PublishedFile) -> str:
    """Returns the sha256 that the hub states for a file; "" if it states none."""
    etag = ""
    with suppress(Exception):  # downloading will fail too, and say why
        etag = hub.get_hf_file_metadata(hub.hf_hub_url(file.repo, file.path, revision=file.revision)).etag or ""
    return etag if _SHA256.fullmatch(etag) else ""


def _failure(file: PublishedFile, path: Path, error: Exception) -> ValueError:
    """Returns the error for a failed download."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, OSError) and error.errno is not None and error.errno in NO_SPACE:
        return ValueError(f"{path} was not written: the disk is full; free some space and run the command again")
    if isinstance(error, PermissionError):
        return ValueError(f"{path} was not written: the folder is read-only; choose another one")
    if _has(names, "RepositoryNotFound", "EntryNotFound", "RevisionNotFound", "GatedRepo") and not _has(names, "Local"):
        return ValueError(f"{file.url} is not on the hub any more, or needs a login: see `huggingface-cli login`")
    if _has(names, "Connect", "Timeout", "Offline", "LocalEntryNotFound"):
        return ValueError(
            f"{HUB} cannot be reached for {file.name}: check the connection and run the command again, which resumes, "
            f"or save {file.url} as {path}"
        )
    reason = one_line(error)[:100] or names[0]
    return ValueError(f"{file.url} could not be downloaded ({reason}): run the command again, which resumes")


def _has(names: Iterable[str], *parts: str) -> bool:
    return any(part in name for name in names for part in parts)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
