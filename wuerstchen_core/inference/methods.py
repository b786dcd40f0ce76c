"""Makes the pipeline's methods from functions: checks the names of arguments and draws a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec

from PIL import Image

from .arguments import check_keywords
from .progress import progress_bar

P = ParamSpec("P")
Images = list[Image.Image]
PROGRESS = "progress"  # an argument of each method: True or False for this call, None for the pipeline's


def image_method(options: type) -> Callable[[Callable[P, Images]], Callable[P, Images]]:
    """Returns a decorator for functions of a model that return images; `options` is the type of their `**options`."""

    def decorate(function: Callable[P, Images]) -> Callable[P, Images]:
        parameters = signature(function).parameters
        named = [name for name, parameter in parameters.items() if parameter.kind is not Parameter.VAR_KEYWORD]
        known = [*named[1:], *options.__annotations__, PROGRESS]

        @wraps(function)
        def method(*args: Any, **kwargs: Any) -> Images:
            check_keywords(function.__name__, kwargs, known)
            shown = kwargs.pop(PROGRESS, None)
            with progress_bar(kwargs.pop("callback", None), args[0].progress if shown is None else shown) as callback:
                return function(*args, callback=callback, **kwargs)

        return method

    return decorate
