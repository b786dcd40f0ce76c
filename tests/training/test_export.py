"""`train export RUN`: folders that others load, their model cards, and uploading them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers.lora_training import write_config
from helpers.picture_folders import examples, write_folder
from helpers.recording_trainer import file_names
from helpers.tiny_stages import ALL, assert_equal_states, ema_of
from PIL import Image
from safetensors.torch import load_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.lock import folder_lock
from wuerstchen_core.training import card as card_module
from wuerstchen_core.training import export as export_module
from wuerstchen_core.training.card import fenced, markdown
from wuerstchen_core.training.compare import compare
from wuerstchen_core.training.export import export, export_run
from wuerstchen_core.training.hub import hub_name
from wuerstchen_core.training.run import run

PROMPT = "a red apple: `x` *y* <b>z</b> | 'w'"
EMBEDDING = '[embedding]\nname = "my-fox"\ninit = "red apple"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """The folder of a LoRA's run, with weights of steps 1 and 2."""
    root = tmp_path_factory.mktemp("export")
    changes = ["train.steps=2", "train.keep_every=1", "train.save_every=1", "train.sheet_every=100", f"run='{root}'"]
    return run("lora", write_config(root, bundle), [*changes, "hub.base_model='warp-ai/wuerstchen-prior'"]).parent


def test_the_card_of_own_pictures_without_prompts(tmp_path: Path, bundle: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", examples(range(3), 64, 64))
    data = f"data={{source='{pictures}', buckets=[[64, 64]], workers=0}}"
    own = run("lora", write_config(tmp_path, bundle), ["train.steps=1", f"run='{tmp_path}'", data]).parent
    card = (export_run(own, []) / "README.md").read_text("utf-8")
    assert "| Pictures | 3 |" in card and "picture 0" in card
    shutil.rmtree(pictures)
    card = (export_run(own, []) / "README.md").read_text("utf-8")
    assert "| Pictures |" not in card and "lora.safetensors" in card


def test_a_lora_with_its_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MIT").write_text("terms")
    monkeypatch.setattr(card_module, "ARTWORK_LICENCE", tmp_path / "MIT")
    prompts = f"sample.prompts={json.dumps([PROMPT, 'two'])}"
    small = ["sample.width=64", "sample.height=64", 'modelspec.description="# 1. <script>"', "modelspec.tags=['a: b']"]
    arguments = [
        "--output",
        str(tmp_path / "mine"),
        "--step",
        "1",
        *(x for y in (prompts, *small) for x in ("--set", y)),
    ]
    assert main(["train", "export", str(folder), *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine")
    one, other = (
        load_file(path / name)
        for path, name in ((tmp_path / "mine", "lora.safetensors"), (folder, "lora-000001.safetensors"))
    )
    torch.testing.assert_close(one, other)
    assert (tmp_path / "mine" / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "mine" / "images").iterdir()) == ["0.png", "1.png"]
    with Image.open(tmp_path / "mine" / "images" / "0.png") as image:
        assert image.size == (64, 64)
    card = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.base_model == "warp-ai/wuerstchen-prior" and card.data.license == "mit"
    assert card.data.pipeline_tag == "text-to-image" and {"lora", "wuerstchen", "a: b"} <= {*card.data.tags}
    assert card.data.instance_prompt == "sks apple, pink" and card.data.library_name == "diffusers"
    assert card.data.widget[0] == {"text": PROMPT, "output": {"url": "images/0.png"}}
    assert "<script>" not in card.text and "\n# 1." not in card.text and "| Steps | 1 |" in card.text
    assert "`lora.safetensors` into `models/loras`" in card.text and "*Würstchen LoRA Loader*" in card.text
    assert "hf download OWNER/NAME --local-dir NAME" in card.text and "--lora NAME/lora.safetensors" in card.text
    assert (tmp_path / "mine" / "MIT").read_text() == "terms"  # the licence names the file
    shown = card.text.partition("## Use")[0]
    assert "<b>" not in shown and r"\`x\` \*y\*" in shown
    assert str(tmp_path) not in card.text and str(folder) not in card.text


def test_code_and_text_cannot_end_their_place() -> None:
    assert fenced("a ```` b", "bash").splitlines() == ["`````bash", "a ```` b", "`````"]
    assert markdown("one\n\n# two | <i>") == r"one \# two \| &lt;i&gt;"


def test_a_training_that_goes_on_does_not_mix_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(export_run(folder, [], tmp_path / "whole") / "lora.safetensors")
    run = Path(shutil.copytree(folder, tmp_path / "lora"))
    weights = run / "lora.safetensors"

    def train_on(stage: Any, file: Path) -> list[Any]:
        assert file.read_bytes() == expected
        os.replace(run / "lora-000001.safetensors", weights)
        return []

    expected = weights.read_bytes()
    monkeypatch.setattr(export_module, "_generate", train_on)
    output = export_run(run, [])
    assert "| Steps | 2 |" in (output / "README.md").read_text("utf-8")
    assert_equal_states(load_file(output / "lora.safetensors"), whole)


def test_a_second_or_failed_export_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder_lock(tmp_path / "used"), pytest.raises(ValueError, match=rf"used .*{os.getpid()}"):
        export_run(folder, [], tmp_path / "used")
    monkeypatch.setattr(export_module, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(folder, [], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("function", ["_generate", "write_card", "rename"])
def test_a_failed_export_keeps_the_earlier_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "lora", ignore=shutil.ignore_patterns("export")))
    output = export_run(run, [], step=1)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    if function == "rename":  # of a new file
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda x, to: 1 / 0 if x.parent.name == "new" else rename(x, to))
    else:
        monkeypatch.setattr(export_module, function, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(run, [])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_killed_export_is_repeated(folder: Path, tmp_path: Path) -> None:
    draft = tmp_path / "mine" / ".export.abc.part" / "new"
    draft.mkdir(parents=True)
    (draft / "lora.safetensors").touch()
    (tmp_path / "mine" / ".lock").touch()
    export_run(folder, [], tmp_path / "mine")
    assert not list((tmp_path / "mine").glob(".*")) and (tmp_path / "mine" / "README.md").is_file()


def test_a_step_without_weights_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint-00000007.pt"):
        export_run(folder, [], tmp_path / "x", step=7)
    with pytest.raises(ValueError, match="config.toml"):
        export_run(folder.parent, [])


class Api:
    """Records what would be uploaded."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> Any:
        if self.error:
            raise self.error
        self.calls.append({"name": name, **options})
        return SimpleNamespace(repo_id=name)

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)


@pytest.fixture
def push(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that exports a run and pretends to upload it."""
    Api.calls, Api.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    arguments = ["train", "export", str(folder)]
    return lambda *more: main([*arguments, *more])


def test_a_folder_is_uploaded_on_request(push: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push() == 0 and not Api.calls
    (folder / "export" / "of an earlier export").touch()
    assert push("--push", "my-lora", "--private") == 0
    created, uploaded = Api.calls
    assert created == {"name": "me/my-lora", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/my-lora" and uploaded["folder_path"] == folder / "export"
    names = ["README.md", ".lock", "below/.lock"]
    kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=uploaded["ignore_patterns"])
    assert list(kept) == ["README.md"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/my-lora")
    assert '"me/my-lora"' in (folder / "export" / "README.md").read_text("utf-8")
    assert file_names(folder / "export") == {"README.md", "lora.safetensors", "pytorch_lora_weights.safetensors"}
    with pytest.raises(ValueError, match="export exists"):
        export_run(folder, [], folder / "export")


def refusal(status: int) -> Exception:
    error = OSError("refused")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("name", "error", "fact"),
    [
        ("a", None, "HF_TOKEN"),
        ("a/b/c", None, "a/b/c"),
        ("a", ConnectionError("no route"), "connection"),
        ("a", refusal(403), "token"),
        ("a", ValueError("odd\nreason"), "odd reason"),
    ],
)
def test_a_failed_upload_is_one_sentence(
    push: Any,
    name: str,
    error: Exception | None,
    fact: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Api.error = error
    shutil.rmtree(folder / "export", ignore_errors=True)
    if fact == "HF_TOKEN":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push("--push", name) == 2
    assert (folder / "export").exists() == (fact not in ("HF_TOKEN", "a/b/c"))  # refused before it takes time
    lines = capsys.readouterr().err.splitlines()
    assert fact in lines[-1] and not Api.calls


@pytest.mark.parametrize("arguments", [("--private",), ("checkpoint-00000002.pt", "--push", "a")])
def test_options_of_uploading_that_do_not_fit(folder: Path, arguments: tuple[str, ...]) -> None:
    path = [str(folder / arguments[0]), *arguments[1:]] if arguments[0].endswith("pt") else [str(folder), *arguments]
    assert main(["train", "export", *path]) == 2


@pytest.mark.parametrize(
    "stage", ["decoder-lora", "embedding", pytest.param("decoder-embedding", marks=pytest.mark.long)]
)
def test_adapters_and_words_of_other_kinds(stage: str, bundle: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, bundle)
    if "embedding" in stage:
        text = re.sub(r"\[lora\].*?(?=\[train\])", EMBEDDING, config.read_text("utf-8"), flags=re.S)
        config.write_text(text, encoding="utf-8")
    changes = [f"run='{tmp_path}'", "train.steps=1", "train.keep_every=1", "train.sheet_every=100"]
    file = run(stage, config, changes)
    table = ["sample.prompts=['x']", "sample.width=64", "sample.height=64"] if stage == "embedding" else []
    output = export_run(file.parent, table, step=1)
    assert load_file(output / file.name).keys() == load_file(file).keys()
    checkpoint = export(file.parent / "checkpoint-00000001.pt", [], tmp_path / "x.safetensors")
    torch.testing.assert_close(load_file(checkpoint), load_file(output / file.name))
    card = huggingface_hub.ModelCard.load(output / "README.md")
    assert ("textual-inversion" if "embedding" in stage else "lora") in card.data.tags
    assert (
        bool(card.data.get("widget")) == (stage == "embedding")
        and f"--{'embedding' if 'embedding' in stage else 'lora'}" in card.text
    )
    if stage == "embedding":
        assert compare(file.parent, table).is_file()
    else:
        with pytest.raises(ValueError, match=stage):
            compare(file.parent, [])


@pytest.mark.parametrize("stage", ALL)
def test_a_trained_network_as_a_folder(run_folder: Path, stage: str, tmp_path: Path) -> None:
    run = run_folder / "v1" if stage == "token-decoder" else run_folder
    output = export_run(run / stage, [f"run='{run}'"], tmp_path / "mine")
    card = huggingface_hub.ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    for file in re.findall("put `(.*?)`", card.text):
        assert (output / file).is_file()
    assert "*Würstchen Model Loader*" in card.text or stage not in ("prior", "decoder")
    if stage not in ("prior", "decoder"):
        assert os.path.samefile(output / f"{stage}.safetensors", run / stage / f"{stage}.safetensors")
        return
    diffusers = pytest.importorskip("diffusers", minversion="0.38")
    pipeline = diffusers.WuerstchenCombinedPipeline.from_pretrained(output)
    for name, network in (("prior", pipeline.prior_prior), ("decoder", pipeline.decoder)):
        state, trained = network.state_dict(), ema_of(run_folder / name)
        assert all(torch.equal(x, state[key]) for key, x in trained.items())
    ours = WuerstchenPipeline.load(output, device="cpu", dtype="fp32")
    assert ours.generate("a red apple", width=64, height=64, prior_steps=1, decoder_steps=1)
    assert "--model NAME" in (output / "README.md").read_text("utf-8")


def test_a_prior_without_the_other_stages(run_folder: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.38")
    output = export_run(run_folder / "prior", [f"run='{run_folder}'", "inputs.vqgan=none"], tmp_path / "mine")
    pipeline = diffusers.WuerstchenPriorPipeline.from_pretrained(output)
    assert torch.equal(
        pipeline.prior.state_dict()["projection.weight"], ema_of(run_folder / "prior")["projection.weight"]
    )


def test_names_on_the_hub() -> None:
    assert hub_name("/cache/models--warp-ai--wuerstchen-prior/snapshots/abc/prior") == "warp-ai/wuerstchen-prior"
    assert hub_name("weights/wuerstchen_v2_prior.safetensors") == "warp-ai/wuerstchen-prior"
    assert hub_name("demo") == hub_name("mine/prior.safetensors") == ""
