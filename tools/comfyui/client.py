"""Runs ComfyUI as a subprocess, and a client for it: find, start, queue, listen, stop."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from PIL import Image
from safetensors import safe_open
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = "ComfyUI-Wuerstchen"
START_SECONDS, RUN_SECONDS = 300, 300  # for busy machines; usually 10 and 3
TEXT_EVENT = (3).to_bytes(4, "big")  # of a binary message: the length of a node's id, the id, a text
PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")


@dataclass(frozen=True)
class Install:
    """A ComfyUI installation."""

    root: Path

    @property
    def version(self) -> str:
        text = (self.root / "comfyui_version.py").read_text(encoding="utf-8")
        found = re.search(r'__version__ = "([^"]+)"', text)
        return found[1] if found else "unknown"

    @cached_property
    def frontend(self) -> str:
        """The installed frontend's version; "" without the package."""
        code = "import importlib.metadata as data; print(data.version('comfyui-frontend-package'))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()

    @property
    def has_own_packages(self) -> bool:
        """True if the frontend is the one that this ComfyUI requires."""
        requirements = (self.root / "requirements.txt").read_text(encoding="utf-8")
        return f"comfyui-frontend-package=={self.frontend}" in requirements.split()

    @property
    def name(self) -> str:
        """The version, and the frontend's if it is another than this ComfyUI requires."""
        own = self.has_own_packages or not self.frontend
        return self.version if own else f"{self.version} with frontend {self.frontend}"

    @property
    def python(self) -> str:
        """COMFYUI_PYTHON, or else the installation's virtual environment, or else this Python."""
        own = (self.root / python for python in PYTHONS)
        return os.environ.get("COMFYUI_PYTHON") or str(next(filter(Path.is_file, own), sys.executable))


def installs() -> list[Install]:
    """Returns the ComfyUIs in COMFYUI_PATH (separated as in PATH), or else ~/ComfyUI and ~/ComfyUI-*."""
    paths = os.environ.get("COMFYUI_PATH")
    home = Path.home()
    roots = map(Path, paths.split(os.pathsep)) if paths else [home / "ComfyUI", *sorted(home.glob("ComfyUI-*"))]
    return [Install(root) for root in roots if (root / "main.py").is_file()]


Inside = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and facts from a script inside ComfyUI


@cache
def _script_server(install: Install) -> subprocess.Popen[str]:
    """Starts the process that runs all scripts in a ComfyUI; it ends with this one."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [install.python, "-m", "tools.comfyui.script_server", str(install.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def run_inside(install: Install, script: str, folder: Path, *arguments: str | Path) -> Inside:
    """Runs a script of tests/host with ComfyUI's Python in `folder`, and returns its tensors and facts."""
    output, log = folder / "tensors.safetensors", folder / "log.txt"
    command = [REPOSITORY / "tests" / "host" / script, install.root, *arguments, output]
    job = {"command": command, "folder": folder, "log": log, "seconds": 2 * RUN_SECONDS}
    server = _script_server(install)
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(job, default=str), file=server.stdin, flush=True)
    code = server.stdout.readline().strip()
    assert code == "0", log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.is_file() else "no answer"
    with safe_open(output, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])


@dataclass
class Outcome:
    """The result of one prompt."""

    status: str = ""  # execution_success, execution_error, execution_interrupted, or invalid
    error: str = ""
    progress: dict[str, list[int]] = field(default_factory=dict)  # the steps that each node reported
    pictures: list[Image.Image] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # the text shown on each node
    log: str = ""  # ComfyUI's output during the prompt


class Server:
    """A running ComfyUI with `pack` as its only custom node pack, its own base directory and start `options`."""

    def __init__(self, install: Install, folder: Path, pack: Path = REPOSITORY, options: Sequence[str] = ()):
        self.options = options
        self.install, self.version, self.folder = install, install.version, folder
        (folder / "custom_nodes").mkdir(parents=True)
        (folder / "custom_nodes" / PACK).symlink_to(pack, target_is_directory=True)
        self.address = f"127.0.0.1:{_free_port()}"
        self.log_file = folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        where = ["--listen", "127.0.0.1", "--port", port, "--base-directory", str(self.folder)]
        previews = ["--preview-method", "latent2rgb"]
        own = ["--database-url", "sqlite:///:memory:"]
        command = [self.install.python, "main.py", "--cpu", *where, *previews, *own, *self.options]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.install.root, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.alive():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ComfyUI {self.version} did not start:\n{self.log()[-3000:]}")
            time.sleep(0.3)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def alive(self) -> bool:
        try:
            return "system" in self.get("/system_stats")
        except OSError:
            return False

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def post(self, path: str, content: Any = None) -> bytes:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(content or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()

    def run(self, prompt: dict[str, Any], on_progress: Callable[[str, int], None] | None = None) -> Outcome:
        """Queues a prompt in API form and waits until it ends or is rejected."""
        written = len(self.log())
        outcome = asyncio.run(asyncio.wait_for(self._run(prompt, on_progress), RUN_SECONDS))
        outcome.log = self.log()[written:]
        return outcome

    async def _run(self, prompt: dict[str, Any], on_progress: Callable[[str, int], None] | None) -> Outcome:
        client, outcome = uuid.uuid4().hex, Outcome()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://{self.address}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            try:
                queued = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": client})
            except urllib.error.HTTPError as error:
                return Outcome("invalid", error.read().decode())
            job = json.loads(queued)["prompt_id"]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT_EVENT:
                    start = 8 + int.from_bytes(message.data[4:8], "big")
                    outcome.texts[message.data[8:start].decode()] = message.data[start:].decode()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                data = event.get("data", {})
                if data.get("prompt_id") != job:
                    continue
                if event["type"] == "progress":
                    outcome.progress.setdefault(data["node"], []).append(data["value"])
                    if on_progress is not None:
                        await asyncio.to_thread(on_progress, data["node"], data["value"])
                elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    outcome.status, outcome.error = event["type"], data.get("exception_message", "").strip()
                    break
        if outcome.status == "execution_success":
            outputs = (await asyncio.to_thread(self._history, job))["outputs"]
            images = [image for node in outputs.values() for image in node.get("images", [])]
            outcome.pictures = [Image.open(io.BytesIO(self.read(f"/view?{urlencode(image)}"))) for image in images]
        return outcome

    def _history(self, job: str) -> Any:
        """Returns the history of a job, which ComfyUI writes shortly after the last message."""
        while job not in (history := self.get(f"/history/{job}")):
            time.sleep(0.05)
        return history[job]

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as response:
            return response.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
