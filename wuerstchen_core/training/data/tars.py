"""Tar files that are written, without what reading them needs."""

from __future__ import annotations

import tarfile
from io import BytesIO


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a file into a tar file, with nothing of when or by whom."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
