"""For makers of this project: benchmark, demo recipe, ComfyUI measurements. Never installed."""
