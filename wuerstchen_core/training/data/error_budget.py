"""Counts unreadable images or shards and stops the run when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...common.text import listed

log = logging.getLogger(__name__)

MIN_READS = 20  # before the fraction is judged


class ErrorBudget:
    """Counts reads and failures of one kind ("images" or "shards") since the start; logs each failed name once."""

    def __init__(self, kind: str, max_fraction: float):
        self.kind, self.max_fraction = kind, max_fraction
        self.read = self.failed = 0
        self.names: dict[str, None] = {}  # that failed, in order

    def add(self, read: int, bad: Mapping[str, str]) -> None:
        """Adds `read` reads, of which `bad` (name → reason) failed. ValueError if too many have failed so far."""
        self.read, self.failed = self.read + read, self.failed + len(bad)
        for name, reason in bad.items():
            if name not in self.names:
                self.names[name] = None
                log.warning("skipping bad %s, number %d: %s", self.kind, len(self.names), reason)
        if self.read >= MIN_READS and self.failed > self.max_fraction * self.read:
            raise ValueError(
                f"{self.failed} of {self.read} {self.kind} cannot be used, more than [data] bad_share = "
                f"{self.max_fraction:g} allows: {listed(list(self.names))}; the log has the reasons"
            )
