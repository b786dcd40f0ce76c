"""`generate --like`, and what pictures say about how they were made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_runs import failure, run
from helpers.tiny_model import tiny_parts, write_tiny_bundle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.inference.metadata import KEYS, PARAMETERS, PROMPT, RECORD, WORKFLOW, read_texts
from wuerstchen_core.inference.read_graph import record_of_graph
from wuerstchen_core.inference.workflow import build_graph

TEXT = "a (red:1.2) apple, ä"
RED = Image.new("RGB", (128, 64), "red")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> Path:
    """The current folder, with the tiny model in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundle, tmp_path / "tiny.safetensors")
    return tmp_path


def generate(*arguments: str | Path) -> None:
    assert run("generate", *arguments, "--device", "cpu") == 0


def array(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def record(path: str | Path) -> dict[str, Any]:
    return json.loads(read_texts(Image.open(path))[RECORD])


# repeating


@pytest.mark.parametrize(
    "options",
    [
        (), ("--seed", "7", "--negative", "blue"), ("--schedule", "fast", "--dtype", "bf16"),
        ("--prior-steps", "2", "--prior-guidance", "3.3", "--width", "64", "--decoder-guidance-end", "2"),
        ("--decoder-steps", "4", "--reuse", "2"),
        ("--sampler", "dpmpp_2m", "--decoder-guidance", "1.5"),
    ],
    ids=str,
)  # fmt: skip
def test_like_repeats_a_picture(here: Path, options: tuple[str, ...]) -> None:
    generate(TEXT, "--model", "tiny.safetensors", *options, "--output", "a.png")
    generate("--like", "a.png", "--output", "b.png")
    assert np.array_equal(array("a.png"), array("b.png")) and record("a.png") == record("b.png")


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_like_repeats_the_pictures_of_every_format_and_of_python(here: Path, bundle: Path, ending: str) -> None:
    (here / "sub").mkdir()
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    picture = pipe.generate([TEXT, {"a red apple": 2, "a blue apple": 1}], seed=[5, 3])[1]
    picture.save(f"sub/a.{ending}")
    shutil.move("tiny.safetensors", "sub/tiny.safetensors")  # the model beside the picture
    generate("--like", f"sub/a.{ending}", "--output", "b.png")
    assert np.array_equal(np.asarray(picture), array("b.png")) and record("b.png")["seed"] == 3


def test_options_change_what_is_repeated(here: Path) -> None:
    generate(TEXT, "--model", "tiny.safetensors", "--schedule", "fast", "--seed", "4", "--output", "a.png")
    first = record("a.png")
    for options, changed in (
        (("--seed", "0"), {"seed": 0}),
        (("a blue apple",), {"prompt": "a blue apple"}),
        (("--negative", "x"), {"negative": "x"}),
        (("--prior-steps", "2"), {"prior_steps": 2, "schedule": "linear", "sampler": "ddpm"}),
        (("--schedule", "diffusers"), {"schedule": "diffusers", "prior_steps": 29, "sampler": "ddpm"}),
        (("--height", "128"), {"height": 128}),
    ):
        generate("--like", "a.png", *options, "--output", "b.png")
        second = record("b.png")
        assert {key: second[key] for key in changed} == changed
        free = {*changed, "decoder_steps"} if "schedule" in changed else {*changed}
        assert {k: x for k, x in second.items() if k not in free} == {k: x for k, x in first.items() if k not in free}


def test_parts_and_loras_are_found_beside_the_picture_or_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, lora: Path
) -> None:
    save_bundle(here / "own.safetensors", {"prior": tiny_parts()["prior"]}, {"sampling": {"prior_steps": 2}})
    files = ("--model", "tiny.safetensors", "--prior", "own.safetensors", "--lora", f"{lora}:0.5")
    generate(TEXT, *files, "--output", "a.png")
    capsys.readouterr()
    message = failure(capsys, "generate", "--like", "a.png")
    assert "lora.safetensors" in message and "--lora" in message
    shutil.copy(lora, here)
    generate("--like", "a.png", "--output", "b.png")
    assert np.array_equal(array("a.png"), array("b.png"))
    assert not [message for message in caplog.messages if "a.png" in message]
    [entry] = record("b.png")["loras"]
    assert (entry["file"], entry["strength"], entry["stage"]) == ("lora.safetensors", 0.5, "prior")
    (here / "below").mkdir()
    capsys.readouterr()
    for name in (str(here / "lora.safetensors"), "below/../lora.safetensors", "../lora.safetensors"):
        made = record("a.png") | {"loras": [entry | {"file": name}]}
        picture = saved("below/c.png", wuerstchen=json.dumps(made))
        assert name in failure(capsys, "generate", "--like", picture)
    Path("own.safetensors").rename("other.safetensors")
    capsys.readouterr()
    assert "own.safetensors" in failure(capsys, "generate", "--like", "a.png")
    generate("--like", "a.png", "--prior", "other.safetensors", "--output", "b.png")
    assert np.array_equal(array("a.png"), array("b.png"))
    write_tiny_bundle(here / "tiny.safetensors", {})
    generate("--like", "a.png", "--prior", "other.safetensors", "--output", "b.png")
    assert [message for message in caplog.messages if "a.png" in message and "tiny.safetensors" in message]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny prior."""
    import torch
    from safetensors.torch import save_file

    key, weight = next((k, x) for k, x in tiny_parts()["prior"].state_dict().items() if k.endswith("to_q.weight"))
    base = f"diffusion_model.{key.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{base}.lora_down.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"{base}.lora_up.weight": torch.randn(weight.shape[0], 2, generator=generator),
    }
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path)
    return path


def saved(name: str, **texts: str) -> str:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    RED.save(name, pnginfo=info)
    return name


def test_what_cannot_be_repeated_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(TEXT, "--model", "tiny.safetensors", "--no-metadata", "--output", "no.png")
    capsys.readouterr()
    assert set(KEYS) & set(Image.open("no.png").info) == set()
    WuerstchenPipeline.load("tiny.safetensors", device="cpu").variations(RED)[0].save("edit.png")
    other = json.dumps({"1": {"class_type": "KSampler", "inputs": {}}})
    for name in (
        "no.png", "edit.png", saved("a1111.png", parameters="a cat\nSteps: 20, Seed: 1"), saved("x.png", prompt="{"),
        saved("other.png", prompt=other), saved("list.png", wuerstchen="[]"), "none.png", "tiny.safetensors",
        saved("deep.png", wuerstchen=json.dumps({"prompt": "a"})[:-1] + ', "x": ' + "[" * 99 + "]" * 99 + "}"),
    ):  # fmt: skip
        assert name in failure(capsys, "generate", "--like", name)
    assert "variations" in failure(capsys, "generate", "--like", "edit.png")
    assert "--prompts" in failure(capsys, "generate", "--like", "no.png", "--prompts", "p.txt", "--output", "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None}, {"prompt": 5}, {"prompt": ["a"]}, {"prompt": {}}, {"model": 3}, {"parts": [1]},
        {"parts": {"prior": "x"}}, {"loras": 5}, {"loras": [{"strength": 1}]}, {"embeddings": {"a": 1}},
        {"loras": [{"file": "x", "strength": "1"}]}, {"control": [{"file": "x", "image": 1}]}, {"control": [{}]},
        {"control": [{"file": "tiny.safetensors"}]}, {"seed": "x"}, {"width": "64"}, {"schedule": 5},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_settings_are_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    settings = {**comfyui_record(), "model": "tiny.safetensors", **changes}
    failure(capsys, "generate", "--like", saved("bad.png", wuerstchen=json.dumps(settings)), "--device", "cpu")


# ComfyUI's graphs


def comfyui_record(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": TEXT, "negative": "b)", "seed": 3, "model": "demo", "width": 128, "height": 64, "schedule": "fast",
        "prior_steps": 6, "prior_guidance": 3.5, "decoder_steps": 4, "decoder_guidance": 2.0, "sampler": "ddim",
        **changes,
    }  # fmt: skip


V1 = {"temperature": [1.0, 0.6], "token_mode": "argmax"}
PINK = {"file": "demo-pink", "strength": 1}
HINTS = [
    {"file": "outline.safetensors", "image": "cat.png", "strength": 0.8, "start": 0.0, "end": 0.5},
    {"file": "boxes.safetensors", "image": "dog.png", "strength": 1.0, "start": 0.25, "end": 1.0},
]
LORAS = {"loras": [{"file": "x.safetensors", "strength": 0.5}, PINK]}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"model": "demo-v1", **V1}, {"model": "own.safetensors", "decoder_guidance_end": 1.5, **V1}, LORAS,
        {"parts": {"prior": {"file": "p.safetensors"}, "text_encoder": {"file": "t.safetensors"}}},
        {"prompt": "a (embedding:x:1.2)"}, {"control": HINTS},
    ],
    ids=str,
)  # fmt: skip
def test_a_graph_is_read_as_it_was_written(changes: dict[str, Any]) -> None:
    record = comfyui_record(**changes)
    graph, _ = build_graph(record)
    read = record_of_graph(json.loads(json.dumps(graph)))
    assert read.pop("count") == 1 and read == record


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("WuerstchenTextEncode", {"text": "a (cat:1.2)"}, "weights"),
        ("WuerstchenPriorSample", {"denoise": 0.5}, "denoise"), ("WuerstchenPriorSample", {"seed": 8}, "seeds"),
        ("WuerstchenDecoderConditioning", {"conditioning": ["3", 1]}, "prompts"),
        ("WuerstchenPriorSample", {"model": ["99", 0]}, "incomplete"),
        ("WuerstchenPriorSample", {"negative": ["3", 0]}, "one side"),
        ("WuerstchenDecoderSample", {"model": ["1", 0]}, "prior as decoder"),
        ("SaveImage", {"images": ["1", 0]}, "WuerstchenBundleLoader"),
    ],
)  # fmt: skip
def test_graphs_that_do_more_are_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    graph, _ = build_graph(comfyui_record(**({"control": HINTS[:1]} if reason == "one side" else {})))
    node = next(node for node in graph.values() if node["class_type"] == kind)
    node["inputs"] |= changes
    with pytest.raises(ValueError, match=reason):
        record_of_graph(graph)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "ddpm"}, {"decoder_guidance_end": 3.0}, {"prior_guidance": 31}, {"seed": 2**53},
        {"prompt": {"a": 1, "b": 2}}, {"prompt": "a {b|c}"}, {"prompt": "http://x"}, {"prompt": "a\\b"},
        {"prompt": "embedding:x {a|b}"}, {"command": "outpaint"}, {"command": "interpolate"}, {"command": "variations"},
        {"command": "variations", "image": "x.png", "resized": True}, {"model": None}, {"prior_steps": 1001},
        {"control": [{**HINTS[0], "mask": "m.png"}]}, {"control": [{**HINTS[0], "strength": 11.0}]},
        {"control": [{**HINTS[0], "file": "a net in memory"}]}, {"control": [{**HINTS[0], "image": ""}]},
        {"loras": [{"file": "folder", "strength": 1}]}, {**V1, "loras": [{"file": "x", "stage": "token_decoder"}]},
    ],
    ids=str,
)  # fmt: skip
def test_no_graph_is_written_that_would_make_another_picture(changes: dict[str, Any]) -> None:
    assert build_graph(comfyui_record(**changes)) is None


# texts


METHODS: dict[str, Callable[[WuerstchenPipeline, Path], list[Image.Image]]] = {
    "generate": lambda pipe, path: pipe.generate(
        np.array([TEXT, TEXT]), seed=np.array([2, 3]), prior_guidance=np.float32(2.5)
    ),
    "reconstruct": lambda pipe, path: pipe.reconstruct([str(path), path], seed=2),
    "variations": lambda pipe, path: pipe.variations(Image.open(path), TEXT, seed=2),
    "inpaint": lambda pipe, path: pipe.inpaint(path, path.with_name("mask.png"), TEXT, seed=2),
    "outpaint": lambda pipe, path: pipe.outpaint(str(path), TEXT, left=64, seed=2),
    "interpolate": lambda pipe, path: pipe.interpolate(TEXT, path, seed=2, steps=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_picture_says_how_it_was_made_and_no_folder(here: Path, bundle: Path, method: str) -> None:
    path, mask = here / "start.png", Image.new("L", RED.size)
    RED.save(path)
    mask.paste(255, (0, 0, 64, 64))
    mask.save(here / "mask.png")
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    for i, picture in enumerate(METHODS[method](pipe, path)):
        for ending in ("png", "jpg", "webp"):
            picture.save(here / f"x.{ending}")
            texts = read_texts(Image.open(here / f"x.{ending}"))
            assert texts == {key: picture.info[key] for key in KEYS if key in picture.info}
            assert {PARAMETERS, RECORD} <= set(texts) and str(here) not in str(texts)
            assert ({PROMPT, WORKFLOW} <= set(texts)) == (method in ("generate", "reconstruct", "variations"))
        made = json.loads(texts[RECORD])
        assert made["seed"] == (2 if method == "interpolate" else 2 + i) and made["model"] == bundle.name
        assert (made["width"], made["height"]) == picture.size
        assert made.get("command", "generate") == method
        names = {"inpaint": {"image": "start.png", "mask": "mask.png"}, "interpolate": {"a": TEXT, "b": "start.png"}}
        own = names.get(method, {} if method == "generate" else {"image": "start.png"})
        assert {key: made.get(key) for key in own} == own
        assert f"Seed: {made['seed']}" in texts[PARAMETERS] and f"Size: {picture.width}x{picture.height}" in str(texts)
    assert "prompt" not in Image.open(path).info  # the user's own pictures are not changed


def test_the_text_for_other_tools(bundle: Path) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    [picture] = pipe.generate("a\ncat", negative="dog", seed=2)
    *prompt, negative, settings = picture.info[PARAMETERS].split("\n")
    assert prompt == ["a", "cat"] and negative == "Negative prompt: dog"
    assert settings.startswith("Steps: 3, Sampler: ddpm, ") and "CFG scale: 2.0, Seed: 2, Size: 128x64" in settings


def test_a_jpeg_keeps_our_settings_of_a_long_prompt(bundle: Path, tmp_path: Path) -> None:
    from wuerstchen_core.inference.metadata import embed

    for words in (5_000, 20_000):
        made = comfyui_record(prompt="word " * words)
        embed(RED, made).save(tmp_path / "x.jpg")
        texts = read_texts(Image.open(tmp_path / "x.jpg"))
        assert WORKFLOW not in texts and (RECORD in texts) == (words == 5_000)
        embed(RED, made).save(tmp_path / "x.webp")
        assert set(read_texts(Image.open(tmp_path / "x.webp"))) == set(KEYS)


def test_a_picture_without_its_texts_or_changed_is_saved_plain(bundle: Path, tmp_path: Path) -> None:
    [picture] = WuerstchenPipeline.load(bundle, device="cpu").generate(TEXT)
    own = PngInfo()
    own.add_text("mine", "x")
    picture.save(tmp_path / "own.png", pnginfo=own)
    assert set(Image.open(tmp_path / "own.png").info) == {"mine"}
    picture.crop((0, 0, 8, 8)).save(tmp_path / "part.png")
    picture.info.clear()
    picture.save(tmp_path / "plain.png")
    for name in ("part.png", "plain.png"):
        assert Image.open(tmp_path / name).info == {}
