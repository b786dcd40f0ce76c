"""The oldest versions that are allowed, and the installed ones, against the advisories that pypi.org has of them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from wuerstchen_core.common.versions import OLDEST_FOR_PICKLES

ROOT = Path(__file__).parents[2]
ADDRESS = "https://pypi.org/pypi/{}/{}/json"
TIMEOUT = 10  # seconds
ACCEPTED = {  # of older versions that are allowed, and why
    "CVE-2026-57845": "datasets' pandas builder, which reads pickles, is for callers that name it: no file does",
    "CVE-2025-47273": "setuptools' easy_install downloads; it only builds this package",
}


def required() -> Iterator[tuple[str, str]]:
    """Yields the names in the requirements files, each with its lower bound or ""."""
    for path in sorted(ROOT.glob("requirements*.txt")):
        for line in path.read_text("utf-8").splitlines():
            if found := re.match(r"([\w.-]+)(?:>=([\d.]+))?", line):
                yield found[1], found[2] or ""


def advisories(name: str, number: str) -> set[str]:
    """Returns the advisories of a version that a newer one mends. Skips the test if pypi.org cannot be asked."""
    try:
        with urlopen(ADDRESS.format(name, number), timeout=TIMEOUT) as answer:
            found = json.load(answer)["vulnerabilities"]
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"the advisories of pypi.org cannot be read here: {error!r}")
    return {
        next((x for x in one["aliases"] if x.startswith("CVE-")), one["id"])
        for one in found
        if one["fixed_in"] and not one["withdrawn"]
    }


def answer(monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    """Replaces pypi.org."""

    def open_address(address: str, timeout: float) -> io.BytesIO:
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(json.dumps(content).encode())

    monkeypatch.setitem(globals(), "urlopen", open_address)


def test_advisories_that_a_newer_version_mends_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one: dict[str, Any] = {"id": "PYSEC-1", "aliases": ["GHSA-1", "CVE-1"], "fixed_in": ["2"], "withdrawn": None}
    others = [
        {**one, "id": "PYSEC-2", "aliases": []},
        {**one, "aliases": ["CVE-3"], "fixed_in": []},
        {**one, "aliases": ["CVE-4"], "withdrawn": "2026-01-01"},
    ]
    answer(monkeypatch, {"vulnerabilities": [one, *others]})
    assert advisories("x", "1") == {"CVE-1", "PYSEC-2"}


@pytest.mark.parametrize("content", [HTTPError("x", 404, "Not Found", {}, None), TimeoutError(), {}])  # type: ignore[arg-type]
def test_it_is_skipped_where_they_cannot_be_read(monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    answer(monkeypatch, content)
    with pytest.raises(pytest.skip.Exception):
        advisories("x", "1")


@pytest.mark.long
def test_lower_bounds_have_no_advisory() -> None:
    bounds = {(name, bound) for name, bound in required() if bound} | set(OLDEST_FOR_PICKLES.items())
    assert {"webdataset", "datasets", "torch"} <= {name for name, _ in bounds}
    found = {f"{name} {bound}": advisories(name, bound) - set(ACCEPTED) for name, bound in sorted(bounds)}
    assert not {name: ids for name, ids in found.items() if ids}


@pytest.mark.long
def test_installed_versions_have_no_advisory() -> None:
    found = {}
    for name, _ in required():
        try:
            number = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
        found[f"{name} {number}"] = advisories(name, number)
    assert not {name: ids for name, ids in found.items() if ids}
