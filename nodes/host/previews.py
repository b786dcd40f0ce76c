"""Colours of ComfyUI's live previews."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from ...wuerstchen_core.checkpoints import demo_path

Matrix = list[list[float]]


def preview_factors(stage: str) -> tuple[Matrix | None, list[float] | None]:
    """Returns factors [c][3] and bias [3] that project a stage's sampler latents to RGB in [-1, 1].

    They were fitted to the shipped model; with other models, previews show shapes in wrong colours. (None, None)
    without the file, which turns previews off.
    """
    fitted = _read().get(stage)
    return (fitted["factors"], fitted["bias"]) if fitted else (None, None)


@cache
def _read() -> dict[str, Any]:
    path = demo_path().with_name("preview_factors.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
