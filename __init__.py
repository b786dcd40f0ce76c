"""Würstchen for ComfyUI: the entry point that ComfyUI imports."""

from .nodes.catalogue import comfy_entrypoint

WEB_DIRECTORY = "./web"  # the nodes' help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
