"""Makes methods of the pipeline from functions: with checked names of arguments, a progress bar and metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, signature
from io import IOBase
from typing import Any, ParamSpec

from PIL import Image

from .arguments import check_keywords
from .control import list_hints
from .metadata import embed
from .progress import progress_bar
from .records import records

P = ParamSpec("P")
Images = list[Image.Image]
PROGRESS = "progress"  # an argument of each method: True or False for this call, None for the pipeline's


def _listed(value: Any) -> Any:
    """Returns a list of an iterator, which is read for the images and again for their metadata."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, IOBase) else value


def image_method(options: type) -> Callable[[Callable[P, Images]], Callable[P, Images]]:
    """Returns a decorator for functions of a model that return images; `options` is the type of their `**options`."""

    def decorate(function: Callable[P, Images]) -> Callable[P, Images]:
        call = signature(function)
        parameters = call.parameters
        named = [name for name, parameter in parameters.items() if parameter.kind is not Parameter.VAR_KEYWORD]
        known = [*named[1:], *options.__annotations__, PROGRESS]
        others = next(iter(parameters.keys() - set(named)))  # the name of `**options`
        defaults = {"negative": ""} if "negative" in options.__annotations__ else {}

        @wraps(function)
        def method(*args: Any, **kwargs: Any) -> Images:
            check_keywords(function.__name__, kwargs, known)
            shown, own = kwargs.pop(PROGRESS, None), kwargs.pop("callback", None)
            if own is not None and not callable(own):
                raise ValueError(f"callback {own!r:.60} is no function: give one of (stage, done, steps, denoised)")
            args, kwargs = tuple(map(_listed, args)), {name: _listed(value) for name, value in kwargs.items()}
            if kwargs.get("control") is not None:
                kwargs["control"] = list_hints(kwargs["control"])  # their files are read once
            with progress_bar(own, args[0].progress if shown is None else shown) as callback:
                kwargs["callback"] = callback
                images = function(*args, **kwargs)
            arguments = call.bind(*args, **kwargs)
            arguments.apply_defaults()
            given = {**defaults, **arguments.arguments, **arguments.arguments[others]}
            made = records(args[0], function.__name__, {name: given.get(name) for name in known}, images)
            return [embed(image, record) for image, record in zip(images, made, strict=True)]

        return method

    return decorate
