"""The command line in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runs import PROMPT
from PIL import Image

from wuerstchen_core.checkpoints import demo_path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SLOW = {"torchvision", "open_clip", "transformers", "timm", "ftfy", "scipy", "sympy", "torch._dynamo"}


def shell(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wuerstchen_core", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_unknown_words_are_reported_once_a_run(bundle: Path, tmp_path: Path) -> None:
    process = shell("generate", "a red zebra", "--model", bundle, "--count", "2", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout == "a-red-zebra.png\na-red-zebra-2.png\n"
    words, more = process.stderr.splitlines()
    assert '"zebra"' in words and f"inspect {bundle} --words" in more


def test_a_failing_process(tmp_path: Path) -> None:
    process = shell("generate", PROMPT, "--model", "nowhere", cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and "nowhere" in process.stderr


def test_importing_the_package_is_light() -> None:
    slow = "'torch' in sys.modules or 'PIL' in sys.modules"
    code = f"import sys, wuerstchen_core, wuerstchen_core.cli.main; sys.exit({slow})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(not demo_path().is_file(), reason="the shipped model is not trained yet")
def test_neither_generating_nor_reading_pictures_imports_slow_packages(tmp_path: Path) -> None:
    """torch._dynamo is torch's compiler."""
    code = f"""
import gc, sys
from wuerstchen_core.cli.main import main
assert main(["generate", "a red apple", "--schedule", "fast", "--output", "a.png"]) == 0
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert main(["reconstruct", "a.png", "--output", "b.png"]) == 0
sys.exit(", ".join({SLOW!r} & sys.modules.keys()) or 0)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(not demo_path().is_file(), reason="the shipped model is not trained yet")
def test_the_first_command(tmp_path: Path) -> None:
    from tools.demo.judge import Judge
    from wuerstchen_core.demo.vocabulary import COLOURS

    process = shell("generate", "a red apple on a blue background", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    with Image.open(tmp_path / "a-red-apple-on-a-blue-background.png") as image:
        assert Judge().background(np.asarray(image)) == list(COLOURS).index("blue")
