"""Shared fixtures, the grouping of tests by process, and the summary of host tests at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each process, and for those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny v2 model; tests must not change it."""
    from helpers.tiny_model import write_tiny_bundle

    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the demo's two build commands on tiny configurations, with their bundles."""
    from helpers.tiny_stages import write_configs

    from tools.demo import build, build_v1

    folder = tmp_path_factory.mktemp("run")
    write_configs(folder, Path("overridden"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "RECIPE", folder)
        build.main(["--run", str(folder), "--output", str(folder / "bundle.safetensors")])
        patch.setattr(build_v1, "RECIPE", folder)
        patch.setattr(build_v1, "LOGS", folder / "logs")
        patch.setattr(build_v1, "demo_path", lambda name="demo": folder / "bundle.safetensors")
        build_v1.main(["--run", str(folder / "v1"), "--output", str(folder / "v1" / "bundle.safetensors")])
    return folder


@pytest.fixture(params=[True, False], ids=["kernels", "plain torch"])
def kernels(request: pytest.FixtureRequest) -> Generator[bool]:
    """Runs a test twice: with the kernels and with plain torch."""
    from wuerstchen_core.kernels.dispatch import use_kernels

    with use_kernels(request.param):
        yield request.param


@pytest.fixture
def inputs(run_folder: Path) -> list[str]:
    """Overrides that make a stage in another folder use the networks of `run_folder`."""
    from helpers.tiny_stages import input_overrides

    return input_overrides(run_folder)


def _process_group(item: pytest.Item) -> str:
    """Returns the group that shares one process: tests of a ComfyUI's server, of scripts in it, of `run_folder`, or of
    one file."""
    function = item if isinstance(item, pytest.Function) else None
    if function and "install" in function.fixturenames:
        install = str(function.callspec.params["install"])
        return install if "server" in function.fixturenames else f"{install} scripts"
    return "run_folder" if function and "run_folder" in function.fixturenames else item.path.name


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_process_group(item)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Prints, after pytest's summary, how many host tests ran, and in which versions (property `host_version`)."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    ran = [report for report in reporter.stats.get("passed", []) if "host" in report.keywords]
    versions = {value for report in ran for name, value in report.user_properties if name == "host_version"}
    where = ", ".join(sorted(versions)) or "(none found)"
    in_browser = sum("browser" in report.keywords for report in ran)
    reporter.write_line(f"{len(ran)} host tests ran in ComfyUI versions {where}, {in_browser} of them in a browser")
