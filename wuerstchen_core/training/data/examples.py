"""The keys of `[data]` that say what is done with each example."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ...common.dataclass_config import Fraction, option
from .caption_edits import CaptionConfig
from .colours import ColourConfig
from .draws import Key, Purpose, generator
from .masks import MaskConfig


@dataclass(frozen=True, kw_only=True)
class ExampleConfig(CaptionConfig, MaskConfig, ColourConfig):
    """What is done with each example of a source."""

    flip: Fraction = option(0.0, "probability of a horizontal mirror at every use")

    def __post_init__(self) -> None:
        CaptionConfig.__post_init__(self)
        MaskConfig.__post_init__(self)

    def changed(self) -> dict[str, Any]:
        """Returns the values of these keys that are not the defaults."""
        return {x.name: value for x in fields(ExampleConfig) if (value := getattr(self, x.name)) != x.default}

    def flips(self, key: Key) -> bool:
        """True if the picture is mirrored in a use of its example, never without a key."""
        return bool(key) and self.flip > 0 and generator(key, Purpose.FLIP).random() < self.flip
