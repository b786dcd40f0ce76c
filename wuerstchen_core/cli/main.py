"""The command line: `wuerstchen COMMAND`, or `python -m wuerstchen_core COMMAND`.

An error prints one line and exits with code 2.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from ..common.command_line import PACKAGE, program
from ..common.memory import is_out_of_memory
from ..common.text import error_text, printable
from ..common.versions import check_versions, summary
from . import download, edit, generate, train, weights
from .console import flushed_stdout, prepare_streams, write_error

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MODULES = (generate, edit, weights, download, train)  # in the order of --help
FAILED, INTERRUPTED = 2, 130
INSTALL_HINT = "`pip install wuerstchen` or, in the pack's folder, `pip install -r requirements.txt`"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose --help does not ignore errors of writing."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{printable(message)}; `{self.prog} --help` lists the options"))


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
    try:
        with flushed_stdout():
            options = parser.parse_args(arguments)
    except OSError as error:
        return _fail(error_text(error))
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_escape)
    if getattr(options, "command", "") == "train":
        logging.getLogger(PACKAGE).setLevel(logging.INFO)
    try:
        check_versions()
        with flushed_stdout(), _ended_by_signal():
            options.run(options)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted; no file is half-written", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", PACKAGE):
            raise
        return _fail(f"{package} is not installed: {options.install_hint}")
    except (ValueError, OSError) as error:
        return _fail(error_text(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
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


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Makes SIGTERM end the process as an error does, which removes drafts, not at once."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only that one may set it
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _escape(record: logging.LogRecord) -> bool:
    """Escapes control characters in a message: names out of files must not control the terminal."""
    with suppress(Exception):  # wrong arguments, which logging itself reports
        record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    return True


def _fail(message: str, code: int = FAILED) -> int:
    write_error(message)
    return code
