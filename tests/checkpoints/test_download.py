"""`download` fetches sets of published files from a stand-in of huggingface_hub; no test uses the network."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_model import tiny_parts
from safetensors.torch import save

from wuerstchen_core.checkpoints import describe, download, published
from wuerstchen_core.checkpoints.download import comfyui_targets, folder_targets
from wuerstchen_core.checkpoints.published import SETS, PublishedFile
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.lock import folder_lock

CONTENT = {"a/one.bin": b"first file", "b/two.bin": b"second file", "three.pt": b"third"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


TINY = (
    PublishedFile("one/repo", "a/one.bin", "one.safetensors", "prior", 10, digest(b"first file")[:8], "abc"),
    PublishedFile("two/repo", "b/two.bin", "two.safetensors", "vqgan", 11),
    PublishedFile("two/repo", "three.pt", "three.pt", "decoder_text_encoder", 5),
)


class Hub:
    """A stand-in of huggingface_hub that serves CONTENT and counts requests."""

    def __init__(self) -> None:
        self.content, self.requests, self.errors = dict(CONTENT), [], {}
        self.etags = {path: digest(x) for path, x in CONTENT.items()}

    def hf_hub_url(self, repo_id: str, filename: str, *, revision: str) -> str:
        return f"{repo_id}@{revision}:{filename}"

    def get_hf_file_metadata(self, url: str) -> Any:
        return SimpleNamespace(etag=self.etags[url.partition(":")[2]])

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str, local_dir: Path) -> str:
        self.requests.append((repo_id, filename, revision))
        if error := self.errors.get(filename):
            raise error
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content[filename])
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(SETS, "tiny", TINY)
    yield hub


def comfyui(root: Path) -> Path:
    (root / "ComfyUI" / "models").mkdir(parents=True)
    return root / "ComfyUI"


def fail(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Runs the command, which must fail in one line, and returns the line."""
    assert main(["download", "tiny", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_files_go_where_comfyui_finds_them(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comfyui(tmp_path)
    assert main(["download", "tiny", "--comfyui", str(folder)]) == 0
    expected = {
        folder / "models/diffusion_models/one.safetensors": b"first file",
        folder / "models/vae/two.safetensors": b"second file",
        folder / "models/text_encoders/three.pt": b"third",
    }
    assert capsys.readouterr().out.splitlines() == [str(path) for path in expected]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == expected
    assert hub.requests[0] == ("one/repo", "a/one.bin", "abc")
    assert main(["download", "tiny", "--comfyui", str(folder / "models")]) == 0  # nothing is fetched twice
    assert len(hub.requests) == 3


def test_files_go_into_one_folder(hub: Hub, tmp_path: Path) -> None:
    assert main(["download", "tiny", "--to", str(tmp_path / "new" / "folder")]) == 0
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [
        "one.safetensors", "three.pt", "two.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONTENT)
def test_other_content_is_not_kept(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    hub.content[path] = b"<html>"
    assert path in (line := fail(capsys, "--to", tmp_path)) and "sha256" in line
    kept = [file.name for file in tmp_path.iterdir() if file.is_file()]
    assert kept == [["one.safetensors", "two.safetensors"][i] for i in range(list(CONTENT).index(path))]
    hub.content[path] = CONTENT[path]
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0  # goes on with the missing ones
    assert len(hub.requests) == len(CONTENT) + 1


def test_a_second_download_to_the_folder_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder_lock(tmp_path / ".wuerstchen-download"):
        assert str(os.getpid()) in fail(capsys, "--to", tmp_path) and not hub.requests
    (tmp_path / ".wuerstchen-download").mkdir(exist_ok=True)
    (tmp_path / ".wuerstchen-download" / ".lock").touch()  # of a killed process
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "three.pt", "two.safetensors"]


def test_nothing_is_locked_if_nothing_is_missing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0
    with folder_lock(tmp_path / ".wuerstchen-download"):
        assert main(["download", "tiny", "--to", str(tmp_path)]) == 0
    left = tmp_path / ".wuerstchen-download" / "one--repo"
    left.mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0 and left.exists()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(SETS, "tiny", TINY)
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0 and not left.parent.exists()


@pytest.mark.parametrize(("name", "other"), [("v2-base", "v2"), ("v1", ""), ("v2", "")])
def test_an_old_torch_is_named_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, other: str
) -> None:
    monkeypatch.setattr("wuerstchen_core.common.versions._version", lambda package: "2.9.1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (10**12, 0, 0))
    with pytest.raises(OSError, match="the download needs"):
        download.download(folder_targets(name, tmp_path))
    assert ("2.10" in caplog.text) == (name != "v2")
    assert (f"download {other}," in caplog.text) == bool(other)


def test_another_file_of_that_name_is_kept(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"mine")
    assert "one.safetensors" in fail(capsys, "--to", tmp_path)
    assert (tmp_path / "one.safetensors").read_bytes() == b"mine" and not hub.requests


def test_a_file_without_known_checksum_is_kept(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.etags["three.pt"] = "0123abcd"  # git's, of a small file
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0
    assert "three.pt" in caplog.text and "one.safetensors" not in caplog.text


class LocalEntryNotFoundError(FileNotFoundError):
    """huggingface_hub's, without a connection."""


class RepositoryNotFoundError(Exception):
    """huggingface_hub's."""


class ConnectError(Exception):
    """httpx's."""


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (LocalEntryNotFoundError("An error happened while trying to locate the file\non the Hub"), "reached"),
        (ConnectError("[Errno -2] Name or service not known"), "reached"),
        (ConnectionError("offline mode is enabled"), "reached"),
        (TimeoutError(), "reached"),
        (RepositoryNotFoundError("401 Client Error"), "login"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (PermissionError(errno.EACCES, "denied"), "read-only"),
        (RuntimeError("Consistency check failed"), "Consistency check"),
    ],
)
def test_failures_are_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, fact: str
) -> None:
    hub.errors["b/two.bin"] = error
    assert fact in (line := fail(capsys, "--to", tmp_path)) and "two" in line
    assert (tmp_path / "one.safetensors").is_file()  # what is complete stays
    del hub.errors["b/two.bin"]
    assert main(["download", "tiny", "--to", str(tmp_path)]) == 0


def test_disk_space_is_checked_first(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tuple(replace(file, size=3_000_000_000) for file in SETS["tiny"])
    monkeypatch.setitem(SETS, "tiny", large)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (10**12, 0, 8_000_000_000))
    line = fail(capsys, "--to", tmp_path / "new")
    assert "8,000 MB" in line and "9,010 MB" in line and not hub.requests and not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "two.safetensors").touch()  # is there already
    assert main(["download", "tiny", "--to", str(tmp_path / "new")]) == 0


def test_huggingface_hub_is_named_if_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["download", "v2", "--to", str(tmp_path)]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_wrong_folders_are_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "models" in fail(capsys, "--comfyui", tmp_path)
    (tmp_path / "file").touch()
    assert "file" in fail(capsys, "--to", tmp_path / "file")
    assert not hub.requests


def test_the_names_are_those_of_the_workflows_and_the_readme() -> None:
    root = Path(__file__).parents[2]
    readme, page = (root / name for name in ("README.md", "docs/weights.md"))
    workflows = {"v2": "18_wuerstchen_v2_1024.json", "v1": "19_wuerstchen_v1_512.json"}
    for name, workflow in workflows.items():
        text = (root / "workflows" / workflow).read_text("utf-8")
        assert all(f'"{file.name}"' in text for file in SETS[name])
    for file in SETS["v2"]:
        assert f"({file.url})" in readme.read_text("utf-8") and f"`{file.folder}/` **{file.name}**" in readme.read_text(
            "utf-8"
        )
    table = page.read_text("utf-8").partition("## Published files")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for file in {file for name in SETS for file in SETS[name] if file.repo == "dome272/wuerstchen"}:
        [row] = [row for row in rows if f"`{file.path}`" in row]
        assert f"`{file.sha256}`" in row or not file.sha256
        assert f"{file.size:,}" in row or file.size % 1_000_000 == 0
    complete = {"prior", "vqgan", "prior_text_encoder", "decoder_text_encoder"}
    for name in SETS.keys() - {"v1"}:
        assert {file.part for file in SETS[name]} == complete | {"decoder"}
    assert {file.part for file in SETS["v1"]} == complete - {"prior_text_encoder"} | {"token_decoder"}


def test_a_folder_of_downloaded_files_is_a_model(tmp_path: Path) -> None:
    """Files of any names, found by their content."""
    parts = tiny_parts()
    for i, name in enumerate(("prior", "decoder", "vqgan")):
        (tmp_path / f"{i}.safetensors").write_bytes(save(dict(parts[name].state_dict())))
    description = describe(tmp_path)
    assert [part.name for part in description.parts] == ["prior", "decoder", "vqgan"]
    assert not description.problems
    (tmp_path / "3.safetensors").write_bytes(save(dict(parts["prior"].state_dict())))
    with pytest.raises(ValueError, match=r"0\.safetensors.*3\.safetensors"):
        describe(tmp_path)


def test_nothing_else_reaches_the_hub() -> None:
    """Nothing is fetched or uploaded unasked: of training, `train export --push` uploads, and cards are written."""
    root = Path(published.__file__).parents[1]
    users = {file.name for file in root.rglob("*.py") if "import huggingface_hub" in file.read_text("utf-8")}
    assert users == {Path(download.__file__).name, "hub.py"}


def test_targets(tmp_path: Path) -> None:
    folder = comfyui(tmp_path)
    assert set(comfyui_targets("v1", folder)) == set(folder_targets("v1", tmp_path / "x")) == set(SETS["v1"])
    with pytest.raises(ValueError, match="v9.*v2"):
        folder_targets("v9", tmp_path)
