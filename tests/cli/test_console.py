"""Commands print to consoles and pipes of every encoding, and to closed ones."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli_runs import run

from tools.bench.__main__ import main as bench
from wuerstchen_core.cli.console import READER_GONE
from wuerstchen_core.cli.main import main

NAME = "яблоко é 🍎.png"  # none of these encodings but the last two has all of it
ENCODINGS = ("cp932", "cp949", "cp1252", "ascii", "utf-16", "utf-8")
HELP = ("", "generate", "inpaint", "inspect", "convert", "train")


def printed(encoding: str, *arguments: str | Path, main: Callable[[list[str]], int] = main) -> str:
    """Runs a command whose stdout is a pipe of the encoding, and returns what it printed."""
    pipe = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(pipe, encoding=encoding))
        assert run(*arguments, main=main) == 0
        return pipe.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_is_printed(encoding: str) -> None:
    for command in HELP:
        assert f"wuerstchen_core {command}" in printed(encoding, *command.split(), "--help")
    assert "bench" in printed(encoding, "--help", main=bench)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_file_name_is_printed(encoding: str, bundle: Path, tmp_path: Path) -> None:
    command = "generate", "a red apple", "--model", bundle, "--output", tmp_path / NAME
    assert printed(encoding, *command).endswith(".png\n") and (tmp_path / NAME).exists()
    report = printed(encoding, *command, "--json")
    assert report.isascii() and Path(json.loads(report)["images"][0]["path"]) == tmp_path / NAME


@pytest.mark.skipif(os.name == "nt", reason="Windows' names are Unicode")
def test_a_name_in_another_encoding_is_printed(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / os.fsdecode(b"caf\xe9.png")
    assert r"caf\udce9.png" in printed("utf-8", "generate", "a red apple", "--model", bundle, "--output", target)
    assert target.exists()


@pytest.mark.parametrize("command", [["--help"], ["inspect", "demo"]], ids=" ".join)
def test_a_closed_pipe_ends_the_command_silently(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert run(*command) == READER_GONE
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["inspect", "demo"]], ids=" ".join)
def test_a_full_disk_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run(*command) == 2
    monkeypatch.undo()
    err = capfd.readouterr().err
    assert "stdout" in err and err.count("\n") == 1
    for wrong in (["inspect", "nowhere"], ["dream"]):
        with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr("sys.stderr", full)
            assert run(*wrong) == 2


@pytest.mark.parametrize("command", [["--help"], ["inspect", "demo"]], ids=" ".join)
def test_a_process_without_a_console(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert run(*command) == 0
    assert run("inspect", "nowhere") == 2
