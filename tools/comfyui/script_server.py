"""Runs scripts in ComfyUI's Python: `python -m tools.comfyui.script_server COMFYUI`.

Reads a line of JSON for each script from stdin, and writes its exit code to stdout. A script runs in a fork of this
process, which has imported ComfyUI; where processes cannot fork, in a new one.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from .in_host import enter

CAN_FORK = hasattr(os, "fork")


def run(command: list[str], folder: str, log: str, seconds: int) -> int:
    """Runs a script in `folder`, with its output in the file `log`; returns its exit code."""
    with open(log, "wb") as output:
        if not CAN_FORK:
            python = [sys.executable, *command]
            return subprocess.run(python, cwd=folder, stdout=output, stderr=output, timeout=seconds).returncode
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    signal.alarm(seconds)
    code = 1
    try:
        os.chdir(folder)
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ComfyUI may print
    enter()
    if CAN_FORK:
        import comfy.sd  # noqa: F401

        import nodes  # noqa: F401  # ComfyUI's
    for line in sys.stdin:
        print(run(**json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
