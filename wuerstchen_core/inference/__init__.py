"""Text, pictures and latents in, pictures out."""

from ..common.versions import check_versions

check_versions()
