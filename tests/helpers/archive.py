"""The archive that ComfyUI's registry distributes, made by comfy-cli's own rule."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def registry_archive(folder: Path) -> Path:
    """Packs the tracked files of the working tree as `comfy node pack` does; returns the path of the zip file."""
    path = folder / "node.zip"
    code = "import sys; from comfy_cli.file_utils import zip_files; zip_files(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True)
    return path


def unpacked_archive(folder: Path) -> Path:
    """Unpacks the archive into a folder, as the registry's clients do; returns the folder."""
    with zipfile.ZipFile(registry_archive(folder)) as archive:
        archive.extractall(folder / "pack")
    return folder / "pack"
