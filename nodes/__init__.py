"""The ComfyUI nodes: schemas and short execute methods over `wuerstchen_core` and `host`."""

from ..wuerstchen_core.common.versions import check_versions

check_versions()
