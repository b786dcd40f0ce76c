"""What a run says: before it starts, about its pictures, its time, and how to generate with its weights."""

from __future__ import annotations

import io
import logging
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.picture_folders import examples, write_folder
from helpers.tiny_model import METADATA, write_tiny_bundle
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from wuerstchen_core.checkpoints import demo_path
from wuerstchen_core.cli.main import main
from wuerstchen_core.training import report
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.dataset import InMemoryDataset
from wuerstchen_core.training.new import write_new
from wuerstchen_core.training.progress import left_out
from wuerstchen_core.training.reconstruction import FILE, STAGE_A, STAGE_B, check_reconstruction, psnr, thumbnails
from wuerstchen_core.training.report import StepTimes, duration, fixed_bytes
from wuerstchen_core.training.run import build_stage, run

SHORT = ["train.steps=2", "train.batch=2", "train.accumulate=2", "data.workers=0", "train.sheet_every=100"]


def trained(folder: Path, recipe: str, models: list[Path], *changes: str) -> Path:
    """Trains two steps of a new configuration on three pictures, and returns the file of the weights."""
    [path] = write_new(folder, recipe, [str(model) for model in models], None, None)
    write_folder(folder / "pictures", examples(range(3), 128, 128))
    return run(path.stem, path, [*SHORT, *changes])


def generate_command(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the arguments of the command that a run printed."""
    [line] = [text for text in caplog.messages if text.startswith("generate with it")]
    return shlex.split(line.partition(": ")[2])[3:]


def pixels(command: list[str], output: Path) -> bytes:
    assert main([*command, "--output", str(output), "--device", "cpu"]) == 0
    return Image.open(output).tobytes()


@pytest.mark.parametrize(
    ("recipe", "comfyui"), [("lora", "loras.* LoRA Loader"), ("finetune", "diffusion_models.* Model Loader")]
)
def test_the_printed_command_generates_with_the_weights(
    recipe: str, comfyui: str, tmp_path: Path, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        file = trained(tmp_path / "my style", recipe, [bundle], "train.lr=0.5", "train.ema=0.0")
    command = generate_command(caplog)
    assert command[:2] == ["generate", "picture 0"] and str(file) in command
    assert any(text.startswith(f"wrote {file}") for text in caplog.messages)
    assert any(str(file) in text and re.search(f"models/{comfyui}", text) for text in caplog.messages)
    base = ["generate", "picture 0", "--model", str(bundle), "--width", "128", "--height", "128"]
    sized = [*command, "--width", "128", "--height", "128"]
    assert pixels(sized, tmp_path / "a.png") != pixels(base, tmp_path / "b.png")


def test_the_command_of_a_lora_of_stage_b(bundle: Path, tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(name="decoder-lora", part="", network="decoder", tables={})
    config = {"run": str(tmp_path), "inputs": dict.fromkeys(("decoder", "vqgan", "text", "encoder"), str(bundle))}
    file = tmp_path / "decoder-lora.safetensors"
    command = report.generate_arguments(stage, config, file, "x")
    assert command == ["generate", "x", "--model", str(bundle), "--lora", str(file)]


def test_the_command_joins_parts_of_several_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write_tiny_bundle(tmp_path / "one.safetensors", without=("vqgan", "image_encoder", "decoder_text_encoder"))
    other = write_tiny_bundle(tmp_path / "other.safetensors", without=("prior", "prior_text_encoder"))
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        trained(tmp_path / "mine", "lora", [one, other])
    command = generate_command(caplog)
    assert {str(one), str(other)} <= set(command) and len(pixels(command, tmp_path / "a.png")) > 0


def test_stages_of_one_run_generate_together(run_folder: Path, tmp_path: Path) -> None:
    file = run_folder / "prior" / "prior.safetensors"
    stage: Any = SimpleNamespace(name="prior", part="prior", decoder_stage="decoder", tables={})
    command = report.generate_arguments(stage, {"run": str(run_folder)}, file, "x")
    assert str(run_folder / "decoder" / "decoder.safetensors") in command and pixels(command, tmp_path / "a.png")
    for name in ("vqgan", "encoder", "text"):
        other: Any = SimpleNamespace(name=name, part="", tables={})
        assert report.generate_arguments(other, {"run": str(run_folder)}, file, "x") == []
    assert report.generate_arguments(stage, {"run": str(tmp_path)}, file, "x") == []


def test_a_run_says_what_it_will_do(tmp_path: Path, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        words = ["data.trigger_word='sks'", "modelspec.trigger_words=['my style']"]
        trained(tmp_path / "mine", "lora", [bundle], "lora.rank=1", *words)
    text = "\n".join(caplog.messages)
    assert f"base model: {bundle}" in text
    assert len(re.findall(r"caption of (\d+)\.png, as it is read: sks, picture \d$", text, re.MULTILINE)) == 2
    with safe_open(tmp_path / "mine" / "lora" / "lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks, my style"
    assert "2 steps of 4 pictures, 2.67 epochs of 3" in text
    assert "3 images" in text and "bucket 128x128: 3" in text and "memory: " in text
    assert "a step: " not in text  # too few steps
    before = text[: text.index("wrote ")]
    assert "Stage A of the base model: " in before and (tmp_path / "mine" / "lora" / FILE).is_file()


def test_the_memory_of_weights_gradients_optimizer_and_average() -> None:
    assert fixed_bytes(4000, 1000, True) == 20 * 1000 and fixed_bytes(4000, 1000, False) == 16 * 1000
    assert fixed_bytes(1000, 0, True) == 1000  # in int8, without training


def test_the_time_of_a_step_leaves_out_what_is_between(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    times = StepTimes(10, 1010, torch.device("cpu"))
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        for step in range(11, 20):
            now[0] += 100.0 if step == 11 else 2.0
            times.done(step)
            now[0] += 50.0
            times.shift(50.0)
    [line] = caplog.messages
    assert line.startswith("2 s a step: 33 min for the other 994")
    assert [duration(x) for x in (0.4, 59, 90, 3600 * 3 + 61)] == ["0 s", "59 s", "2 min", "3 h 1 min"]


def test_the_bar_leaves_out_saves() -> None:
    times = StepTimes(0, 100, torch.device("cpu"))
    bar = tqdm(total=4, file=io.StringIO(), mininterval=0.1)
    began = time.time()
    for _ in range(4):
        time.sleep(0.01)
        bar.update()
        with left_out(bar, times):
            time.sleep(0.3)
    assert time.time() - began > 1.2 and 0.04 <= bar.format_dict["elapsed"] < 0.6 and bar.n == 4
    with left_out(tqdm(total=1, disable=True), times):
        pass


def test_psnr_and_thumbnails() -> None:
    images = torch.zeros(2, 3, 16, 32)
    assert psnr(images, images + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(images, images - 0.1) == psnr(images, images) == pytest.approx(100.0)  # clamped to [0, 1]
    checkers = (torch.arange(16)[:, None] + torch.arange(32)).remainder(2).float().expand(2, 3, 16, 32)
    assert torch.allclose(thumbnails(checkers, 8), torch.full_like(checkers, 0.5), atol=1e-5)


class Blurred:
    """A stage whose Stages A and B divide the sides of images by numbers."""

    def __init__(self, images: torch.Tensor, **factors: int):
        self.dataset = InMemoryDataset((images * 255).byte(), [""] * len(images))
        self.factors = {STAGE_A: factors.get("a"), STAGE_B: factors.get("b")}

    def reconstructions(self, net: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: thumbnails(images, factor) for name, factor in self.factors.items() if factor}


@pytest.mark.parametrize(
    ("factors", "warned"),
    [({"a": 4, "b": 16}, ""), ({"a": 16, "b": 16}, STAGE_A), ({"a": 4, "b": 64}, STAGE_B), ({}, "")],
)
def test_it_warns_of_stages_that_lose_more_than_a_thumbnail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factors: dict[str, int], warned: str
) -> None:
    stage: Any = Blurred(torch.rand(5, 3, 128, 128, generator=torch.Generator().manual_seed(0)), **factors)
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        check_reconstruction(stage, None, tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(" of the base")[0] for text in warnings] == ([warned] if warned else [])
    assert (tmp_path / FILE).is_file() == bool(factors)
    if factors:  # a column of pictures, and one for each stage
        assert Image.open(tmp_path / FILE).width == pytest.approx(3 * 128, abs=64)


def test_words_are_known_to_a_trained_text_encoder_or_a_model_without_a_list(tmp_path: Path, bundle: Path) -> None:
    metadata = {key: value for key, value in METADATA.items() if key != "vocabulary"}
    without = write_tiny_bundle(tmp_path / "without.safetensors", metadata=metadata)
    write_folder(tmp_path / "pictures", examples(range(3), 128, 128))
    [path] = write_new(tmp_path, "lora", [str(bundle)], None, None)
    for text, changes, unknown in (
        (bundle, ["data.trigger_word='embedding:own red'"], True),
        (bundle, ["lora.text_targets=['q_proj']"], False),
        (without, [], False),
    ):
        stage = build_stage("lora", read_config(path, [f"inputs.text='{text}'", "data.workers=0", *changes]))
        stage.dataset.start_reading(0, "", batch=2, seed=0, cache=tmp_path, rank=0, world=1)
        note = report.unknown_words(stage)
        assert bool(note) == unknown and (not note or re.findall('"(.*?)"', note) == ["picture"])


@pytest.mark.skipif(not demo_path().is_file(), reason="the shipped model is not trained yet")
def test_the_demo_shows_its_own_drawings_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(noise.numpy()).resize((256, 256)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red zebroid", "utf-8")
    drawings = {"things": 4, "most": 8, "layouts": ["large"]}
    for data, warned in ((drawings, False), ({"source": str(tmp_path / "pictures"), "size": 256, "workers": 0}, True)):
        inputs = dict.fromkeys(("prior", "encoder", "text", "decoder", "vqgan"), "demo")
        stage = build_stage("lora", {"run": str(tmp_path), "inputs": inputs, "data": data})
        stage.dataset.start_reading(0, "", batch=1, seed=0, cache=tmp_path, rank=0, world=1)
        caplog.clear()
        check_reconstruction(stage, stage.net, tmp_path)
        assert any("cannot show" in text for text in caplog.messages) == warned
    assert '"zebroid"' in str(report.unknown_words(stage)) and '"red"' not in str(report.unknown_words(stage))


def test_flat_pictures_are_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage: Any = Blurred(torch.full((2, 3, 64, 64), 0.4), a=4, b=16)
    noisy = stage.reconstructions
    stage.reconstructions = lambda net, images: {name: x + 0.04 for name, x in noisy(net, images).items()}  # 28 dB
    check_reconstruction(stage, None, tmp_path)
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
