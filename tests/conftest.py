"""What every test run shares: a tiny model, and the last line, which says how many host tests ran and in which
ComfyUI versions."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of v2 as a file, which nobody changes."""
    from tiny_model import write_tiny_bundle

    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Count after pytest's own summary: host tests tell their version by `record_property("host_version", ...)`."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    ran = [report for report in reporter.stats.get("passed", []) if "host" in report.keywords]
    versions = {value for report in ran for name, value in report.user_properties if name == "host_version"}
    where = ", ".join(sorted(versions)) or "(none found)"
    browsed = sum("browser" in report.keywords for report in ran)
    reporter.write_line(f"{len(ran)} host tests ran in ComfyUI versions {where}, {browsed} of them in a browser")
