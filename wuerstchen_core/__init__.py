"""Würstchen (arXiv 2306.00637) in plain PyTorch: text to image in three stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.control import Hint
    from .inference.pipeline import WuerstchenPipeline

__all__ = ["Hint", "WuerstchenPipeline", "__version__"]

__version__ = "0.2.0"  # also in pyproject.toml, which registries read


def __getattr__(name: str) -> Any:
    """Imports the pipeline or `Hint`, and torch with it, on first access."""
    if name == "WuerstchenPipeline":
        from .inference.pipeline import WuerstchenPipeline

        return WuerstchenPipeline
    if name == "Hint":
        from .inference.control import Hint

        return Hint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
