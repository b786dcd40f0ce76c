"""A ComfyUI as a separate process, and what is measured in it."""
