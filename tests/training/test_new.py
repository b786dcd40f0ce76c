"""`train new`: the configurations that it writes run as they stand."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import DECODER, NETWORKS, TEXT
from helpers.picture_folders import examples, write_folder
from helpers.tiny_model import METADATA, tiny_parts, write_tiny_bundle
from helpers.tiny_stages import read_log

from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.embeddings import read_embedding
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.training import keys
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.new import DEMO_RECIPES, RECIPES, STAGES, count_pictures, write_new

SHORT = ("--set", "train.steps=2", "--set", "train.batch=2", "--set", "data.workers=0")


def new(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> list[list[str]]:
    """Runs `train new` and returns the arguments of the commands that it prints."""
    assert main(["train", "new", str(folder), *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("  ")]


@pytest.mark.parametrize(
    ("recipe", "stage", "release"),
    [
        ("lora", "lora", "v2"),
        ("finetune", "prior", "v2"),
        pytest.param("resolution", "prior", "v2", marks=pytest.mark.long),
        ("embedding", "embedding", "v2"),
        ("control", "control", "v2"),
        ("decoder-lora", "decoder-lora", "v2"),
        pytest.param("decoder-lora", "token-decoder-lora", "v1", marks=pytest.mark.long),
        pytest.param("distill", "distill-lora", "v1", marks=pytest.mark.long),
    ],
)
def test_it_trains_as_printed_once_the_pictures_exist(
    recipe: str, stage: str, release: str, tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my style"
    model = bundle if release == "v2" else write_tiny_bundle(tmp_path / "v1.safetensors", release="v1")
    [command] = new(capsys, folder, "--recipe", recipe, "--model", model)
    write_folder(folder / "pictures", examples(range(3), 256, 256))
    assert command == ["train", stage, "--config", str(folder / f"{stage}.toml")]
    config = read_config(folder / f"{stage}.toml", [])
    assert config["data"]["size"] == (192 if recipe == "resolution" else 128)  # the bundle's is 128
    assert main([*command, *SHORT]) == 0
    name = "my-style" if recipe == "embedding" else stage
    assert read_log(folder / stage)[-1]["step"] == 2 and (folder / stage / f"{name}.safetensors").is_file()
    assert list((folder / stage).glob("sheet*.png"))


def test_a_word_for_two_text_encoders_is_trained_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = tiny_parts()
    torch.manual_seed(1)
    parts["decoder_text_encoder"] = TextEncoder(replace(TEXT, width=DECODER.clip_embd))
    parts["decoder"] = NETWORKS["decoder"].perturbed()
    files = [tmp_path / f"{name}.safetensors" for name in ("decoder", "prior")]
    stages = ("decoder", "vqgan", "decoder_text_encoder"), ("prior", "image_encoder", "prior_text_encoder")
    for file, names in zip(files, stages, strict=True):
        save_bundle(file, {name: parts[name] for name in names}, METADATA)
    pictures = write_folder(tmp_path / "pictures", examples(range(3), 128, 128))
    commands = new(capsys, tmp_path / "fox", "--recipe", "embedding", "--model", *files, "--pictures", pictures)
    assert [command[1] for command in commands] == ["embedding", "decoder-embedding"]
    for command in commands:
        assert main([*command, *SHORT]) == 0
    vectors = read_embedding(tmp_path / "fox" / "decoder-embedding" / "fox.safetensors").tensors
    assert {name: x.shape[1] for name, x in vectors.items()} == {"clip_g": TEXT.width, "clip_h": DECODER.clip_embd}


def test_a_model_from_nothing_trains_stage_after_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_folder(tmp_path / "pictures", examples(range(3), 128, 128))
    commands = new(capsys, tmp_path / "new", "--recipe", "scratch", "--pictures", pictures, "--size", "128")
    assert [command[1] for command in commands] == [*STAGES]
    for command in commands:
        assert main([*command, *SHORT]) == 0
        assert (tmp_path / "new" / command[1] / f"{command[1]}.safetensors").is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_tables_have_known_keys(recipe: str, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for path in write_new(tmp_path, recipe, ["demo"], None, None):
        config = read_config(path, [])
        jsonschema.validate(config, keys.schema_of(path.stem))
        assert recipe == "scratch" or config["train"]["keep_every"] % config["train"]["save_every"] == 0


def test_parts_come_from_several_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_tiny_bundle(tmp_path / "one.safetensors", without=("image_encoder", "vqgan"))
    other = write_tiny_bundle(tmp_path / "other.safetensors", without=("prior",))
    new(capsys, tmp_path / "new", "--model", one, other)
    expected = dict.fromkeys(("prior", "text", "decoder"), str(one)) | dict.fromkeys(("encoder", "vqgan"), str(other))
    assert read_config(tmp_path / "new" / "lora.toml", [])["inputs"] == expected
    assert main(["train", "new", str(tmp_path / "x"), "--model", str(one)]) == 2
    assert "image encoder" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_released_sizes_get_their_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wuerstchen_core.training.new.LARGE", 1)
    [path] = write_new(tmp_path, "lora", ["demo"], None, 1024)
    config = read_config(path, [])
    assert config["train"]["precision"] == "bf16" and config["noise"]["weight"] == "p2"
    assert config["data"]["ratio"] == 2.0 and config["data"]["multiple"] == 128
    monkeypatch.undo()
    [small] = write_new(tmp_path / "small", "lora", ["demo"], None, None)
    assert "targets" not in config["lora"] and "kv_mapper.1" in read_config(small, [])["lora"]["targets"]


@pytest.mark.parametrize("recipe", ["lora", "scratch"])
def test_sizes_are_multiples_of_64(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="500x500.* 512x512"):
        write_new(tmp_path, recipe, ["demo"], None, 500)
    for path in write_new(tmp_path, recipe, ["demo"], None, 192):
        from_table(ImageDataConfig, read_config(path, [])["data"], "data")


def test_no_file_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new(capsys, tmp_path)
    before = (tmp_path / "lora.toml").read_text("utf-8")
    assert main(["train", "new", str(tmp_path), "--size", "512"]) == 2
    assert "lora.toml" in capsys.readouterr().err and (tmp_path / "lora.toml").read_text("utf-8") == before


def test_a_killed_one_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new(capsys, tmp_path, "--recipe", "scratch")
    whole = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    (tmp_path / "text.toml").unlink()
    new(capsys, tmp_path, "--recipe", "scratch")
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == whole
    (tmp_path / "prior.toml").write_text("mine", "utf-8")
    assert main(["train", "new", str(tmp_path), "--recipe", "scratch"]) == 2 and "prior.toml" in capsys.readouterr().err


def test_it_counts_the_pictures_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = examples(range(3), 64, 64)
    del files["001.txt"]
    assert count_pictures(tmp_path / "pictures") == (0, 0)
    pictures = write_folder(tmp_path / "pictures", files | {"notes.md": b"my notes"})
    assert count_pictures(pictures) == (3, 2)
    assert main(["train", "new", str(tmp_path)]) == 0
    assert "3" in re.findall(r"\d+", capsys.readouterr().out.replace(str(tmp_path), ""))


def test_a_path_is_needed_by_new_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "new"]) == 2 and "PATH" in capsys.readouterr().err
    assert main(["train", "new", str(tmp_path), "--set", "train.steps=2"]) == 2 and "--set" in capsys.readouterr().err
    assert main(["train", "prior", "--output", "x"]) == 2 and "--output" in capsys.readouterr().err
    assert main(["train", "prior", "x.toml"]) == 2 and "x.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("prior --json", "--json"),
        ("cache --keys", "--keys"),
        ("prior --keys --recipe lora", "--recipe"),
        ("export x --config y", "--config"),
        ("lora --size 512", "--size"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments.split()]) == 2 and option in capsys.readouterr().err


def test_a_small_students_steps_are_those_of_the_demos_recipe(tmp_path: Path) -> None:
    [prior, decoder] = write_new(tmp_path, "distill", ["demo"], None, None)
    for path, recipe in ((prior, "turbo.toml"), (decoder, "turbo_decoder.toml")):
        expected = read_config(DEMO_RECIPES / recipe, [])["distill"]
        assert read_config(path, [])["distill"].items() >= expected.items()
