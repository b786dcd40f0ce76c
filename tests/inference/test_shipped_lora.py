"""The LoRA that ships with the demo, by its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints.shipped import SHIPPED, shipped_path
from wuerstchen_core.cli.main import main
from wuerstchen_core.demo.vocabulary import COLOURS, Scene, caption
from wuerstchen_core.inference.comfyui_nodes import SHIPPED as TITLES
from wuerstchen_core.inference.metadata import RECORD

pytest.importorskip("resvg_py", reason="judging needs resvg-py")

APPLE = Scene(0, 4, 0)
PINK = list(COLOURS).index("pink")


def test_the_names_are_those_of_files_and_of_the_nodes() -> None:
    assert list(TITLES) == list(SHIPPED) and all(shipped_path(name).is_file() for name in SHIPPED)


def test_python_and_the_command_line_know_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", caption(APPLE), "--lora", "demo-pink", "--seed", "1", "--device", "cpu", "--output", "1.png"]
    assert main(command) == 0
    assert main(["generate", "--like", "1.png", "--device", "cpu", "--output", "2.png"]) == 0
    image = np.asarray(Image.open("1.png"))
    assert Judge().background(image) == PINK and np.array_equal(image, np.asarray(Image.open("2.png")))

    pipe = WuerstchenPipeline.load("demo", device="cpu", progress=False)
    assert pipe.load_lora("demo-pink") == "demo-pink"
    [same] = pipe.generate(caption(APPLE), seed=1)
    assert np.array_equal(same, image) and json.loads(same.info[RECORD])["loras"][0]["file"] == "demo-pink"


def test_inspect_knows_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo-pink"]) == 0
    assert "LoRA" in capsys.readouterr().out


def test_an_unknown_name_is_told_the_known_one() -> None:
    with pytest.raises(ValueError, match='"demo-pink"'):
        WuerstchenPipeline.load("demo", device="cpu", lora="demo-blue")
