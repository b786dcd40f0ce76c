"""The command line: `python -m wuerstchen_core COMMAND`. A failure is one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import edit, generate, train, weights

GROUPS = (generate, edit, weights, train)  # in the order of --help
FAILURE, INTERRUPTED = 2, 130
PACKAGE = __package__.partition(".")[0]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(FAILURE, f"{message}; `{self.prog} --help` shows what can be given\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _fail("bench is a tool of the repository: run `python -m tools.bench` in a clone of it")
    return run(_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run what a parser's options ask for; returns the exit code."""
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if getattr(options, "command", "") == "train":
        logging.getLogger(PACKAGE).setLevel(logging.INFO)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left half-written", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", PACKAGE):
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
    parser = Parser(prog="python -m wuerstchen_core", description="Würstchen: text to image in three stages.")
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
