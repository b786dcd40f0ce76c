"""Uploads a folder to the Hugging Face hub, on request only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.published import HUB, SETS
from ..common.dataclass_config import option
from ..common.lock import LOCK
from ..common.text import one_line

# The hub's names of licences that models often have.
LICENCES = (
    "mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "openrail", "openrail++", "creativeml-openrail-m",
)  # fmt: skip


@dataclass(frozen=True)
class HubConfig:
    """The `[hub]` table."""

    base_model: str = option(
        "", "base model's name on the Hugging Face hub, for the model card; empty: as far as known"
    )
    license: str = option("", "licence by the hub's names, such as mit; empty: the base model's")


def hub_name(source: str | Path) -> str:
    """Returns the hub's name of a model in its cache, or of a published file by its name here; "" for others."""
    path = Path(source)
    if folder := next((part for part in path.parts if part.startswith("models--")), ""):
        return folder.removeprefix("models--").replace("--", "/")
    return next((file.repo for files in SETS.values() for file in files if file.name == path.name), "")


def check_push(name: str) -> str:
    """Returns a model's name on the hub with its owner, by default the token's.

    Raises ValueError if huggingface_hub or a token is missing, or `name` is not a model's name.
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
        raise ValueError(f"{name!r} is not a model's name on the hub: use NAME or OWNER/NAME")
    if not _hub().get_token():
        raise ValueError(f"there is no token for {HUB}: run `hf auth login`, or set HF_TOKEN, with one that may write")
    if "/" in name:
        return name
    try:
        return f"{_hub().HfApi().whoami()['name']}/{name}"
    except Exception as error:  # as in `push_to_hub`
        raise ValueError(f"{HUB} does not say whose the token is: use --push OWNER/{name}") from error


def push_to_hub(folder: Path, name: str, private: bool) -> str:
    """Uploads all files of a folder but its lock to the model OWNER/NAME, and returns its address.

    A new model is created. ValueError if the hub cannot be reached or refuses.
    """
    api = _hub().HfApi()
    try:
        created = api.create_repo(name, private=private or None, exist_ok=True)
        message = "Upload weights and model card"
        api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message=message, ignore_patterns=[LOCK, f"*/{LOCK}"]
        )
    except Exception as error:  # of huggingface_hub and of the HTTP library that it uses, which differ by version
        raise ValueError(_reason(name, folder, error)) from error
    return f"{HUB}/{created.repo_id}"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError("--push needs huggingface_hub: run `pip install huggingface_hub`") from error
    return huggingface_hub


def _reason(name: str, folder: Path, error: Exception) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = f"{folder} is complete: run the command again"
    if status in (401, 403):
        return f"{HUB} refuses {name} with this token: use one that may write there (`hf auth login`); {again}"
    if status is None and _has(kinds, "Connect", "Timeout", "Offline"):
        return f"{HUB} cannot be reached: check the connection; {again}"
    return f"{name} was not uploaded ({one_line(error)[:150] or kinds[0]}); {again}"


def _has(kinds: Iterable[str], *parts: str) -> bool:
    return any(part in kind for kind in kinds for part in parts)
