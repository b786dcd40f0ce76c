"""Würstchen for ComfyUI: the entry point that ComfyUI imports."""

from .nodes.catalogue import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
