"""Who does the work of a stage: ours or the peer, painting or learning."""

from __future__ import annotations

from typing import Any

from .cases import STAGES


def side_of(name: str, stage: str) -> Any:
    """The class of a side, "ours" or "peer", for a stage. What it needs is imported."""
    if STAGES[stage].learns:
        from .train_step import OurLearning, PeerLearning

        return OurLearning if name == "ours" else PeerLearning
    if name == "ours":
        from .wuerstchen import Ours

        return Ours
    from .diffusers_baseline import Peer

    return Peer
