"""The ComfyUI nodes: schemas and short execute methods over `wuerstchen_core` and `host`."""
