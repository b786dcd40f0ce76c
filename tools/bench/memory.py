"""How much memory this process takes, as the system or the device counts it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PAUSE = 0.003  # seconds between two looks


def status(key: str) -> int | None:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at its highest, RssAnon of its own; else None."""
    if not STATUS.exists():
        return None
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


class Peak:
    """The highest memory from now on, above what is taken now: on a CPU of the process, else of the device."""

    def __init__(self, device: Any):
        self._cuda = torch.device(device).type == "cuda"
        self._before = torch.cuda.memory_allocated() if self._cuda else status("VmRSS")

    def restart(self) -> None:
        """Forget what was highest so far."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif FORGET.exists():
            FORGET.write_text("5", encoding="ascii")

    def read(self) -> int | None:
        highest = torch.cuda.max_memory_allocated() if self._cuda else status("VmHWM")
        return None if highest is None or self._before is None else highest - self._before


class Private:
    """The highest memory that the process shares with no file, above what it began with; looked at every few ms."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._before, self.highest = status("RssAnon"), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Private:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE) and self._before is not None:
            self.highest = max(self.highest, (status("RssAnon") or 0) - self._before)
