"""Colours for the host's live previews."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from ...wuerstchen_core.checkpoints import demo_path

Rows = list[list[float]]


def preview_factors(stage: str) -> tuple[Rows | None, list[float] | None]:
    """Factors [c][3] and bias [3] from the latents inside a stage's sampler to colours from -1 to 1.

    They were fitted on the shipped model only: previews of another model show shapes, in colours that mean nothing.
    Without the file there are no previews: (None, None), which is what the host's own formats start from.
    """
    fitted = _read().get(stage)
    return (fitted["factors"], fitted["bias"]) if fitted else (None, None)


@cache
def _read() -> dict[str, Any]:
    path = demo_path().with_name("preview_factors.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
