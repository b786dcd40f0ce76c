"""Versions of the packages that this library needs."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# The oldest that work. requirements.txt has no bounds, since pip must not replace the torch of a ComfyUI.
OLDEST = {
    "torch": "2.4",
    "open_clip_torch": "2.20",
    "safetensors": "0.4.2",
    "numpy": "1.24",
    "pillow": "9.5",
}
OLDEST_FOR_TRAINING = {"torch": "2.5", "pillow": "10.1"}  # torch.distributed.tensor, ImageFont.load_default(size)

# Whose weights_only keeps a file from running code (CVE-2025-32434) and from writing over memory (CVE-2026-24747).
OLDEST_FOR_PICKLES = {"torch": "2.10"}
OLDEST_FOR_HUB = {"datasets": "2.20"}  # whose load_dataset runs no code of a dataset


def check_versions(oldest: Mapping[str, str] = OLDEST) -> None:
    """Raises ValueError if an installed package is older than in `oldest`. Does not import the packages."""
    found = {name: _version(name) for name in oldest}
    old = [name for name, number in found.items() if number and _numbers(number) < _numbers(oldest[name])]
    if old:
        needed = ", ".join(f"{name} {found[name]} is too old ({oldest[name]} or newer is needed)" for name in old)
        how = ", torch with the command that pytorch.org gives" if "torch" in old else ""  # pip's may be for CPUs only
        raise ValueError(f"{needed}: update {'it' if len(old) == 1 else 'them'}{how}")


def summary(own: str) -> str:
    """Returns one line with the library's `own` version and those of Python and the packages."""
    others = [f"{name} {_version(name) or '(not installed)'}" for name in OLDEST]
    return f"wuerstchen {own} (Python {platform.python_version()}, {', '.join(others)})"


@cache
def _version(name: str) -> str | None:
    """Returns a package's version; None if pip does not know it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    """Returns the first three numbers of a version such as 2.10.0a0+git12."""
    return [*map(int, re.findall(r"\d+", text)), 0, 0, 0][:3]
