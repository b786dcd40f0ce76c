"""Counting what could not be read, and stopping when it is too much."""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

LEAST = 20  # reads before a share of them says anything
SHOWN = 3  # names in a sentence


class ErrorBudget:
    """Reads of one kind; what was bad is named in the log once, however often it comes up again.

    The share is one of all reads since the tally began, so that a bad picture weighs the same in every epoch.
    """

    def __init__(self, kind: str, share: float):
        self.kind, self.share = kind, share
        self.read = self.failed = 0
        self.named: dict[str, None] = {}  # in the order they came up

    def add(self, read: int, bad: Mapping[str, str]) -> None:
        """Count `read` more, of which `bad` (sentences by name) failed; ValueError when that exceeds the share."""
        self.read, self.failed = self.read + read, self.failed + len(bad)
        for name, sentence in bad.items():
            if name not in self.named:
                self.named[name] = None
                log.warning("left out, as number %d of the bad %s: %s", len(self.named), self.kind, sentence)
        if self.read >= LEAST and self.failed > self.share * self.read:
            raise ValueError(
                f"{self.failed} of {self.read} {self.kind} could not be used, more than [data] bad_share = "
                f"{self.share:g} allows: {listed(list(self.named))}; the log has the reason for each"
            )


def listed(names: list[str]) -> str:
    """The first names, each cut to a length that a sentence bears, and how many there are more."""
    shown = [name if len(name) <= 40 else f"…{name[-39:]}" for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
