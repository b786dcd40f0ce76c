"""Errors of damaged files: whatever goes wrong while one is read becomes a ValueError that names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ..common.memory import is_out_of_memory
from ..common.text import error_text

# Raised for contents that nobody foresaw; other errors have a message for the user already.
_UNFORESEEN = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError)

Read = TypeVar("Read", bound=Callable[..., Any])


def names_source(read: Read) -> Read:
    """Returns `read`, a function whose first argument is a source or a Part, with ValueErrors for damaged contents.

    Errors for lack of memory stay as they are. An OSError gets the name of the source if it has none.
    """

    @wraps(read)
    def checked(source: Any, *args: Any, **kwargs: Any) -> Any:
        path = getattr(source, "path", None) or source
        try:
            return read(source, *args, **kwargs)
        except (*_UNFORESEEN, UnicodeError) as error:
            if is_out_of_memory(error) or "CUDA error" in str(error):
                raise
            reason = f"{type(error).__name__}: {error_text(error):.100}"
            raise ValueError(f"{path} is damaged or has an unknown form ({reason}): download it again") from error
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(path)
            raise
        except ValueError as error:
            error.args = (error_text(error), *error.args[1:])  # it can name what the file holds
            raise

    return checked  # type: ignore[return-value]
