"""A run's folder: its record, its lock, what a resumed run may change, and weights of several steps."""

from __future__ import annotations

import json
import logging
import os
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.lora_training import write_config
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import config_path, write_configs

from wuerstchen_core.checkpoints.weight_files import read_weight_file
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.lock import folder_lock
from wuerstchen_core.training import processes
from wuerstchen_core.training import run as training_run
from wuerstchen_core.training.checkpoint import checkpoints, load_checkpoint, newest_step, write_checkpoint
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.processes import accelerate_precision, check_processes, choose_precision
from wuerstchen_core.training.run import run
from wuerstchen_core.training.run_folder import CONFIG, STARTS, changes, describe, read_starts, record_start
from wuerstchen_core.training.tables import resolve


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("base") / "tiny.safetensors")


@pytest.fixture
def lora(tmp_path: Path, base: Path) -> Any:
    """A function that trains a LoRA for two steps more, without sample grids and without text targets."""
    file = write_config(tmp_path, base)

    def train(*changes: str, steps: int = 2) -> Path:
        short = [
            f"run={tmp_path}",
            f"train.steps={steps}",
            "lora.text_targets=[]",
            "data.things=2",
            "inputs.vqgan=none",
        ]
        return run("lora", file, [*short, *changes]).parent

    return train


def test_the_folder_keeps_configuration_versions_command_and_seed(lora: Any, base: Path) -> None:
    folder = lora("train.seed=7")
    config = read_config(folder / CONFIG, [])
    assert config["lora"]["rank"] == 2 and config["lora"]["dropout"] == 0.2  # of the file
    assert config["train"]["steps"] == 2 and config["train"]["seed"] == 7  # of the overrides
    assert config["train"]["clip"] == 1.0 and config["train"]["precision"] == "no"  # defaults
    [start] = read_starts(folder)
    assert start["seed"] == 7 and start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list(start["bases"]) == [base.as_posix()] and start["command"]


def test_a_resolved_configuration_trains_the_same(tmp_path: Path, run_folder: Path, inputs: list[str]) -> None:
    write_configs(tmp_path, tmp_path / "one")
    first = run("prior", config_path(tmp_path, "prior"), inputs)
    second = run("prior", first.parent / CONFIG, [f"run={tmp_path / 'two'}"])
    states = [torch.load(checkpoints(file.parent)[0], weights_only=True)["net"] for file in (first, second)]
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert read_config(first.parent / CONFIG, [])["model"]["c_r"] == 64  # a default


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("lora.rank=4", r"\[lora\] rank \(2, now 4\)"),
        ("lora.alpha=1.0", r"\[lora\] alpha \(5\.0, now 1\.0\)"),
        ('lora.targets=["to_q"]', r"\[lora\] targets .*kv_mapper.*now \[\"to_q\"\]"),
        ("train.precision=bf16", r"\[train\] precision .*bf16"),
    ],
)
def test_a_resumed_run_refuses_another_kind_of_weights(lora: Any, change: str, facts: str) -> None:
    folder = lora()
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(ValueError, match=rf"{folder.name}.*{facts}") as error:
        lora(change, steps=4)
    assert "\n" not in str(error.value)
    assert (folder / CONFIG).read_bytes() == before and len(read_starts(folder)) == 1


@pytest.mark.parametrize(
    ("stage", "name", "key", "value"),
    [
        ("control", "control", "hints", "silhouette"),
        ("control", "control", "blocks", [0, 1]),
        ("control", "control", "widths", [8, 8, 8, 8]),
        ("control", "control", "repeats", [1, 1, 1, 1]),
        ("distill", "distill", "guidance", 2.0),
        ("decoder-distill-lora", "distill", "steps", 4),
    ],
)
def test_a_resumed_run_refuses_another_control_net_or_student(
    stage: str, name: str, key: str, value: Any, tmp_path: Path
) -> None:
    table: dict[str, Any] = {"hints": "outline"} if name == "control" else {"guidance": 4.0}
    allowed = {"drop": 0.1} if name == "control" else {"teacher_steps": 8}
    common = {"train": {"steps": 2, "batch": 1, "lr": 1e-3}}
    trainer: Any = SimpleNamespace(name=stage, bases=[])
    (tmp_path / "checkpoint-000001.pt").touch()

    def start(**own: Any) -> None:
        record_start(tmp_path, resolve(stage, {**common, name: {**table, **own}}), trainer)

    start()
    start(**allowed)
    with pytest.raises(ValueError, match=rf"\[{name}\] {key} \("):
        start(**{key: value})


def test_a_resumed_run_refuses_another_base(lora: Any, base: Path, tmp_path: Path) -> None:
    folder = lora()
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(base.read_bytes())
    lora(f"inputs.prior={copy}", steps=3)  # the same weights under another name
    write_tiny_bundle(other, {})
    with pytest.raises(ValueError, match=r"base model .*copy\.safetensors.*other\.safetensors"):
        lora(f"inputs.prior={other}", steps=4)
    assert len(read_starts(folder)) == 2


def test_a_resumed_run_lists_what_else_differs(lora: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = lora() / CONFIG
    text = file.read_text("utf-8")
    file.write_text(text.replace("rslora = false\n", ""), encoding="utf-8")  # as if that key were new
    assert file.read_text("utf-8") != text
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        lora("train.lr=1e-3", "lora.dropout=0.0", steps=4)
    [line] = [record.getMessage() for record in caplog.records if "last start" in record.getMessage()]
    for fact in ("[train] steps (2, now 4)", "[train] lr (0.05, now 0.001)", "[lora] dropout (0.2, now 0.0)"):
        assert fact in line
    assert "rank" not in line and "rslora" not in line


def test_a_run_without_a_checkpoint_may_change_all(lora: Any) -> None:
    folder = lora()
    for path in checkpoints(folder):
        path.unlink()
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write('{"time": "20')  # a full disk cut this
    lora("lora.rank=4")
    assert read_config(folder / CONFIG, [])["lora"]["rank"] == 4 and len(read_starts(folder)) == 2


def test_a_second_run_in_the_folder_is_refused_at_once(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "build_stage", lambda *_: pytest.fail("it loaded networks"))
        with folder_lock(tmp_path / "lora"), pytest.raises(ValueError, match=rf"lora .*process {os.getpid()} "):
            lora()
    lora()


def test_dates_in_configurations_are_compared() -> None:
    one, other = ({"train": {"optimizer_args": {"since": date(2026, 1, day)}}} for day in (2, 3))
    assert not changes(one, one) and "2026-01-03" in describe(changes(one, other))


def test_weights_of_several_steps_are_kept(lora: Any) -> None:
    folder = lora("train.keep_every=1", "train.save_every=3", "train.lr=0.05", steps=3)
    names = [f"lora-00000{step}.safetensors" for step in (1, 2, 3)]
    assert sorted(path.name for path in folder.glob("lora-*.safetensors")) == names
    files = [read_weight_file(folder / name) for name in (*names, "lora.safetensors")]
    states = [file.states[""] for file in files]
    assert [json.loads(file.metadata["training"])["step"] for file in files] == [1, 2, 3, 3]
    same = [all(torch.equal(x.load(), states[i][key].load()) for key, x in states[3].items()) for i in range(3)]
    assert same == [False, False, True]


def test_the_weights_of_a_checkpoint_are_exported(
    lora: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lora("train.keep_every=1", "train.save_every=1", steps=3)
    older = folder / "checkpoint-00000002.pt"
    assert main(["train", "export", str(older), "--output", str(tmp_path / "loras" / "lora.safetensors")]) == 0
    kept, exported = folder / "lora-000002.safetensors", tmp_path / "loras" / "lora.safetensors"
    assert list(exported.parent.iterdir()) == [exported]
    one, other = read_weight_file(kept), read_weight_file(exported)
    assert one.metadata == other.metadata and one.states[""].keys() == other.states[""].keys()
    assert all(torch.equal(x.load(), other.states[""][key].load()) for key, x in one.states[""].items())
    kept.unlink()
    assert main(["train", "export", str(older)]) == 0 and kept.is_file()
    assert capsys.readouterr().out.split() == [str(exported), str(kept)]
    (tmp_path / "elsewhere.pt").write_bytes(older.read_bytes())
    for wrong in (tmp_path / "elsewhere.pt", folder / "none.pt"):
        assert main(["train", "export", str(wrong)]) == 2
        assert wrong.name in capsys.readouterr().err


def test_lack_of_memory_is_no_damage_of_a_checkpoint(tmp_path: Path) -> None:
    def load(contents: dict[str, Any]) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    torch.save({}, tmp_path / "checkpoint-1.pt")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_checkpoint(tmp_path / "checkpoint-1.pt", load)


def test_copies_of_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-00000001.pt", "checkpoint-00000001 (copy).pt", "checkpoint-best.pt"):
        (tmp_path / name).touch()
    write_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002.pt"] and newest_step(tmp_path) == 2
    assert len(list(tmp_path.glob("*.pt"))) == 3


@pytest.mark.parametrize("started", ["2", "1"])
def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    accelerator: Any = SimpleNamespace(num_processes=1)
    if started == "1":
        return check_processes(accelerator)
    with pytest.raises(ValueError, match="2 .* 1 .*ACCELERATE_USE_CPU"):
        check_processes(accelerator)


def test_the_file_of_accelerate_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    for module in (processes, config_args):
        monkeypatch.setattr(module, "default_config_file", str(file))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert accelerate_precision() == "" and choose_precision("") == "no"
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "mixed_precision": "bf16"}
    settings |= {"num_processes": 3, "use_cpu": True}
    lines = [f"{key}: {value}" for key, value in settings.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    with caplog.at_level(logging.INFO, "wuerstchen_core"):
        assert choose_precision("") == "bf16"
        assert "3 processes" in caplog.text and "overrides" not in caplog.text
        assert choose_precision("fp16") == "fp16"
        assert "fp16 overrides" in caplog.text and "bf16" in caplog.text
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # of `accelerate launch`
        assert choose_precision("") == "fp16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    sagemaker = "compute_environment: AMAZON_SAGEMAKER\nec2_instance_type: x\niam_role_name: x\n"
    for text in ("distributed_type: MULTI_CPU\n", f"{sagemaker}distributed_type: DATA_PARALLEL\n"):
        file.write_text(text, encoding="utf-8")
        assert choose_precision("") == "no"
    file.write_text("mixed_precision: bf16\nunknown_key: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"default_config\.yaml"):
        choose_precision("")
