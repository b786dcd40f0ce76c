"""What every test run shares: its last line, which says how many host tests ran and in which ComfyUI versions."""

from __future__ import annotations

from collections.abc import Generator

import pytest


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
