"""The ComfyUI nodes: schemas and short executes over the core and `host`."""
