"""The keys of `[data]` for captions: several of a picture, tags, a trigger word, a prefix and a suffix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from ...common.dataclass_config import CountOrZero, Fraction, OneOf, option
from .draws import Key, Purpose, generator

EACH, RANDOM = "each", "random"  # choices for several captions of a picture
TAG_EDITS, FIXED_EDITS = ("shuffle_tags", "tag_dropout"), ("caption_prefix", "caption_suffix", "trigger_word")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """What is read of the captions in the files.

    Tags are the parts of a caption between separators.
    """

    captions: Annotated[str, OneOf((EACH, RANDOM))] = option(
        EACH, "of several captions of a picture: each is an example, or one example has a random one at every use"
    )
    shuffle_tags: bool = option(False, "put the tags of a caption into a random order at every use")
    tag_dropout: Fraction = option(0.0, "probability of leaving a tag out, at every use")
    keep_tags: CountOrZero = option(0, "first tags of a caption that are neither moved nor left out")
    tag_separator: str = option(",", "text between two tags")
    caption_prefix: str = option("", "text before every caption, such as: a drawing of")
    caption_suffix: str = option("", "text after every caption")
    trigger_word: str = option("", "word or words that come first, with a comma, in captions without them")

    def __post_init__(self) -> None:
        if not self.tag_separator.strip():
            raise ValueError("[data] tag_separator is empty: give the text between two tags, such as a comma")
        if (self.keep_tags or self.tag_separator != ",") and not self.varies_tags:
            raise ValueError(
                "[data] keep_tags and tag_separator need shuffle_tags or tag_dropout: set one, or remove them"
            )

    @property
    def varies_tags(self) -> bool:
        """True if the tags of a caption differ from use to use."""
        return any(getattr(self, name) for name in TAG_EDITS)

    @property
    def fixed_edits(self) -> dict[str, str]:
        """The keys that change a caption in the same way at every use, with their values."""
        return {name: x for name in FIXED_EDITS if (x := getattr(self, name))}

    def edit(self, caption: str, key: Key = ()) -> str:
        """Returns what is read of a caption in a use of its example; without a key, its tags are unchanged."""
        if key and self.varies_tags:
            caption = self._vary_tags(caption, key)
        text = " ".join(filter(None, (self.caption_prefix.strip(), caption, self.caption_suffix.strip())))
        trigger = self.trigger_word.strip()
        if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
            return text
        return f"{trigger}, {text}" if text else trigger

    def _vary_tags(self, caption: str, key: Key) -> str:
        tags = [tag for part in caption.split(self.tag_separator) if (tag := part.strip())]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        draws = generator(key, Purpose.TAGS)
        stays = draws.random(len(others)) >= self.tag_dropout
        order = draws.permutation(len(others)) if self.shuffle_tags else range(len(others))
        kept += [others[i] for i in order if stays[i]]
        return f"{self.tag_separator.rstrip()} ".join(kept)
