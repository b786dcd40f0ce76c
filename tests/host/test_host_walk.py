"""Every input of every node with hostile values, in a running ComfyUI: refused in one line, or harmless."""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import shutil
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from errors import check_error
from hostile import cases, prompt, spoil
from node_list import NODES

from tools.comfyui.client import Server
from wuerstchen_core.checkpoints import demo_path

ALL_EVENTS = 0xFFF  # inotify's IN_ALL_EVENTS


@contextmanager
def watching(folder: Path) -> Iterator[list[bytes]]:
    """Collects the system's events of a folder: whatever opens, reads, lists or changes it or its files."""
    libc, events = ctypes.CDLL(None, use_errno=True), []
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(folder), ALL_EVENTS) > 0
    try:
        yield events
        while True:
            events.append(os.read(watch, 4096))
    except BlockingIOError:
        pass
    finally:
        os.close(watch)


def test_the_watch_sees_a_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with watching(tmp_path) as events:
        pass
    assert not events
    with watching(tmp_path) as events:
        (tmp_path / "file").read_text()
    assert events


@pytest.fixture
def outside(server: Server, tmp_path: Path) -> Path:
    """A folder beside ComfyUI's, with a model that loads and a file that does not."""
    shutil.copy(demo_path(), tmp_path / "secret.safetensors")
    (tmp_path / "secret.pt").write_bytes(b"canary")
    return tmp_path


def walk(server: Server, object_info: dict[str, Any], outside: Path, chosen: list[tuple[Any, ...]]) -> None:
    """Runs prompts with one hostile value each, and checks what they answer and what they touch."""
    server.get("/probe/events")
    with watching(outside) as touched:
        for node, name, kind, value, linked in sorted(chosen, key=lambda case: case[0]):
            graph, case = prompt(node, object_info), f"{node}.{name} {value!r:.100} {'linked' if linked else ''}"
            spoil(graph, node, name, value, linked)
            try:
                outcome = server.run(graph)
            except urllib.error.URLError as error:
                pytest.fail(f"{case}: {error}")
            if outcome.status == "execution_error":
                check_error(outcome.error)
                assert outcome.error.isprintable(), case
            elif outcome.status == "invalid":
                assert json.loads(outcome.error)["error"]["message"].isprintable(), case
            elif value is None:  # an optional input that is not connected
                continue
            elif kind == "COMBO" or (isinstance(value, float) and not math.isfinite(value) and kind != "BOOLEAN"):
                pytest.fail(f"{case} is accepted")
    assert not touched
    allowed = (server.folder, server.install.root, Path(server.install.python).parents[1])
    roots = [os.path.realpath(path) for path in (*allowed, server.folder / "models", *server.folder.glob("*_nodes/*"))]
    system = ("/usr", "/proc", "/sys", "/dev", "/etc", os.path.realpath(os.path.dirname(os.__file__)))
    events = server.get("/probe/events")
    assert any(path.startswith(os.path.realpath(server.folder)) for _, path in events)
    strange = [(event, path) for event, path in events if not os.path.realpath(path).startswith((*roots, *system))]
    assert not strange


@pytest.mark.newest
def test_hostile_values_are_harmless(server: Server, object_info: dict[str, Any], outside: Path) -> None:
    """Some of them for some inputs; the next test does all."""
    inputs: dict[tuple[str, str], list[Any]] = {}
    for case in cases(object_info, outside):
        if case[2] in ("STRING", "COMBO"):
            inputs.setdefault(case[:2], []).append(case)
    rng = random.Random(22)
    walk(server, object_info, outside, [rng.choice(found) for found in inputs.values()])


@pytest.mark.long
def test_all_hostile_values_are_harmless(server: Server, object_info: dict[str, Any], outside: Path) -> None:
    for node in NODES:
        assert server.run(prompt(node, object_info)).status == "execution_success", node
    walk(server, object_info, outside, list(cases(object_info, outside)))
