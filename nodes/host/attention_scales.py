"""ComfyUI's attention-multiply nodes, which scale weights called `attn1` (to the image) and `attn2` (to the text).

Würstchen's attention has one set of weights for both. The MODEL lists such names to these nodes and keeps their factors
in its transformer_options, from which network_patches.py applies them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .int8 import QUANTISATION
from .network_patches import SCALES
from .notices import notify

_ATTN = re.compile(r"\.attn[12]\.")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class AttentionScales:
    """Mixin for ComfyUI's patchers."""

    model: Any
    model_options: dict[str, Any]
    listing = True

    def _names(self) -> set[str]:
        blocks = [block.name for block in self.model.diffusion_model.attention_blocks().values()]
        return {f"{block}.{attn}.{layer}.weight" for block in blocks for attn in ("attn1", "attn2") for layer in LAYERS}

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        state: dict[str, Any] = super().model_state_dict(filter_prefix)  # type: ignore[misc]
        if not self.listing:
            return {key: x for key, x in state.items() if not key.endswith(QUANTISATION)}
        if filter_prefix is not None:
            return state
        return state | {name: state[_ATTN.sub(".attention.", name)] for name in self._names()}

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        self._warn()
        self.listing = False  # weights only, for merging
        try:
            return super().get_key_patches(filter_prefix)  # type: ignore[misc]
        finally:
            self.listing = True

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        options = self.model_options["transformer_options"]
        scales = options.get(SCALES, {})
        scaled = {name: scales.get(name, 1.0) * strength_model for name in self._names() & patches.keys()}
        if scaled:
            options[SCALES] = {**scales, **scaled}
        return [*scaled, *super().add_patches(patches, strength_patch, strength_model)]  # type: ignore[misc]

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI 0.33 and newer."""
        self._warn()
        return super().state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]

    def _warn(self) -> None:
        if self.model_options["transformer_options"].get(SCALES):
            notify(
                "factors of attention-multiply nodes are not part of a merged or saved model: they act in sampling only"
            )
