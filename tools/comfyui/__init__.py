"""Runs ComfyUI in a separate process, and measures samplers, memory and speed in it."""
