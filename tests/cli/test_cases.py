"""Small inputs that were once read wrongly, each with its right answer, in scripts kept outside this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import ROOT
from tools.comfyui.client import installs

CASES = Path(os.environ.get("WUERSTCHEN_CASES", ROOT.parent / "shared" / "cases"))


@pytest.mark.long
@pytest.mark.skipif(not CASES.is_dir(), reason="no cases: set WUERSTCHEN_CASES to their folder")
@pytest.mark.parametrize("script", [path.name for path in CASES.glob("*.py") if path.name != "common.py"])
def test_all_cases_are_right(script: str, tmp_path: Path) -> None:
    hosts = installs()
    if not hosts:
        pytest.skip("no ComfyUI, whose tokenizer a case compares with")
    env = {**os.environ, "REPO": str(ROOT), "COMFYUI": str(hosts[-1].root), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, CASES / script], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines, done.stderr
    assert [line for line in lines if not line.startswith("RIGHT")] == []
