"""The command line: `python -m wuerstchen_core COMMAND`. A failure is one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import bench, generate, pictures, train, weights

GROUPS = (generate, pictures, weights, train, bench)  # in the order of --help
FAILURE, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(FAILURE, f"{message}; `{self.prog} --help` shows what can be given\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if options.command == "train":
        logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left half-written", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __package__):
            raise
        return _fail(f"{package} is not installed: python -m pip install -r {options.requirements}")
    except (ValueError, OSError) as error:
        return _fail(_one_line(error))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"not enough memory: {options.smaller}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m wuerstchen_core", description="Würstchen: text to image in three stages.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return parser


def _fail(message: str, code: int = FAILURE) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error)
