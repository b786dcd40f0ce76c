"""The command line: `wuerstchen COMMAND`, or `python -m wuerstchen_core COMMAND`.

An error prints one line and exits with code 2.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..common.command_line import PACKAGE, program
from ..common.text import one_line
from ..common.versions import check_versions, summary
from . import download, edit, generate, train, weights
from .console import flushed_stdout, prepare_streams

MODULES = (generate, edit, weights, download, train)  # in the order of --help
FAILED, INTERRUPTED = 2, 130
INSTALL_HINT = "`pip install wuerstchen` or, in the pack's folder, `pip install -r requirements.txt`"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{message}; `{self.prog} --help` lists the options\n")


class Version(argparse.Action):
    """An option that prints the versions in one line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        sys.stdout.write(f"{summary(sys.modules[PACKAGE].__version__)}\n")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _fail("bench is a tool of the repository: run `python -m tools.bench` in a clone of it")
    return run(_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parses the arguments, calls `options.run` and returns the exit code.

    Error messages need two defaults of the parser: `install_hint` for missing packages, and `memory_hint`.
    """
    prepare_streams()
    with flushed_stdout():
        options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if getattr(options, "command", "") == "train":
        logging.getLogger(PACKAGE).setLevel(logging.INFO)
    try:
        check_versions()
        with flushed_stdout():
            options.run(options)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted; no file is half-written", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", PACKAGE):
            raise
        return _fail(f"{package} is not installed: {options.install_hint}")
    except (ValueError, OSError) as error:
        return _fail(one_line(error) or type(error).__name__)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "DefaultCPUAllocator" not in str(error):
            raise
        return _fail(f"not enough memory: {options.memory_hint}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program(), description="Würstchen: text to image in three stages.")
    parser.set_defaults(install_hint=INSTALL_HINT, memory_hint="close other programs")
    parser.add_argument("--version", nargs=0, action=Version, help="print the versions of this and of its packages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    return parser


def _fail(message: str, code: int = FAILED) -> int:
    sys.stderr.write(f"{message}\n")
    return code
