"""Tests textual inversion embeddings: the forms of their files, prompts with them, and what `inspect` says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_forms import FORMS, attention_of_prior, random_factors
from helpers.networks import TEXT
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints.embeddings import (
    Embedding,
    bundled_embeddings,
    describe_embedding,
    is_embedding,
    read_embedding,
)
from wuerstchen_core.cli.main import main
from wuerstchen_core.models.tokenizer import END, START, encode

WIDTH = TEXT.width
WIDE = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("embeddings") / "tiny.safetensors")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


FORMS_OF_FILES: dict[str, Any] = {
    "one.safetensors": {"clip_g": WIDE},
    "sdxl.safetensors": {"clip_l": torch.ones(2, 12), "clip_g": WIDE},
    "webui.safetensors": {"emb_params": WIDE},
    "diffusers.safetensors": {"<cat>": WIDE},
    "vector.bin": {"<cat>": WIDE[0]},
    "webui.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": WIDE}, "name": "x", "step": 3},
    "old.pt": {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": WIDE})},
    "half.pt": {"string_to_param": {"*": torch.nn.Parameter(WIDE.half())}},
    "lora.safetensors": {"bundle_emb.a.clip_g": WIDE[:1], "bundle_emb.b.clip_g": WIDE[1:]},
    "old lora.safetensors": {"bundle_emb.<a>.string_to_param.*": WIDE},
}


def write(path: Path, state: Any) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", FORMS_OF_FILES)
def test_every_form_is_read_and_described(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / name, FORMS_OF_FILES[name])
    vectors, expected = read_embedding(path).vectors("clip_g", WIDTH), WIDE[: 1 if name == "vector.bin" else 2]
    assert vectors is not None
    assert_near(vectors, expected, 1e-3 if name == "half.pt" else 0)
    assert read_embedding(path).vectors("clip_g", 1280) is None
    assert is_embedding(path) and describe_embedding(path).folder == "embeddings"
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out
    assert all(fact in lines for fact in (f"embedding:{path.stem}", "models/embeddings", f"width {WIDTH}")), lines


def test_the_vectors_of_the_tower_come_first() -> None:
    state = {"clip_g": torch.ones(1, 1280), "clip_h": torch.ones(1, 1024)}
    for clip, width in (("clip_g", 1280), ("clip_h", 1024)):
        found = Embedding(state).vectors(clip, width)
        assert found is not None and found.shape == (1, width)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"blocks.0.weight": torch.ones(2, 2, 3)},
        {f"{i}": torch.ones(2, 2) for i in range(40)},
        {"a": torch.tensor(1)},
        {"clip_g": torch.ones(1, 8, dtype=torch.int32)},
        {"clip_g": torch.ones(0, 8)},
        {"x.lora_up.weight": torch.ones(8, 2), "x.lora_down.weight": torch.ones(2, 8)},
    ],
)
def test_other_files_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", state)
    assert not is_embedding(path)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_embedding(path)
    with pytest.raises(ValueError, match=r"y\.pt"):
        read_embedding(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("x.bin", {"<cat>": WIDE, "<dog>": WIDE}),
        ("x.safetensors", {"<cat>": WIDE[0], "<cat>_1": WIDE[1]}),
        ("x.pt", {"string_to_param": {"<a>": WIDE, "<b>": WIDE}}),
        ("nan.safetensors", {"clip_g": torch.full((1, 8), math.nan)}),
    ],
)
def test_what_cannot_be_used_is_named(
    name: str, state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, state)
    with pytest.raises(ValueError, match=path.name):
        read_embedding(path)
    assert main(["inspect", str(path)]) == 2
    assert "embedding" in capsys.readouterr().err or name.startswith("nan")


def test_a_bundled_embedding_without_a_tower() -> None:
    assert bundled_embeddings({"bundle_emb.tok": WIDE})["tok"].widths() == f"{WIDTH} (emb_params)"


def test_models_and_loras_are_no_embeddings(bundle: Path, tmp_path: Path) -> None:
    lora = FORMS["diffusers"].write(random_factors(attention_of_prior()), {}) | {"bundle_emb.a.clip_g": WIDE}
    assert not is_embedding(bundle) and not is_embedding(write(tmp_path / "lora.safetensors", lora))
    assert not is_embedding(write(tmp_path / "w.pt", {"out.weight": WIDE}))


@pytest.mark.parametrize("key", ["clip_g", "emb_params", "<cat>", "bundle_emb.a.clip_g"])
def test_embeddings_are_no_models(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors.*embedding"):
        WuerstchenPipeline.load(write(tmp_path / "x.safetensors", {key: WIDE}))


def states(pipe: WuerstchenPipeline, *parts: str | Tensor) -> Tensor:
    """Returns the states of a text encoder whose vocabulary has the vectors."""
    tower = pipe.prior_text_encoder
    assert tower is not None
    tokens: list[Any] = [START]
    for part in parts:
        tokens += encode(part) if isinstance(part, str) else list(part)
    mask = torch.arange(77)[None] <= len(tokens)
    tokens += [END] * (77 - len(tokens))
    table = tower.token_embedding.weight
    x = torch.stack([table[token] if isinstance(token, int) else token for token in tokens])
    with torch.inference_mode():
        return tower.encode_vectors(x[None], mask)


def test_vectors_stand_in_for_the_name(pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    write(tmp_path / "cat.safetensors", {"clip_g": WIDE, "clip_h": torch.ones(1, WIDTH)})
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "dog.pt", {"string_to_param": {"*": WIDE[:1]}})
    pipe.load_embeddings(tmp_path)
    for prompt, parts in {
        "a embedding:cat apple": ("a", WIDE, "apple"),
        "embedding:cat.safetensors, small": (WIDE, ", small"),
        "embedding:sub/dog embedding:dog": (WIDE[:1], WIDE[:1]),
        "no embedding here": ("no embedding here",),
        "a (thing)": ("a (thing)",),
    }.items():
        assert_near(pipe.encode_prompt(prompt)[0], states(pipe, *parts), 1e-6)
    plain, empty = states(pipe, "a", WIDE, "apple"), states(pipe, "")
    weighted = pipe.encode_prompt("a (embedding:cat:1.2) apple")[0]
    assert_near(weighted[:, 2:4], empty[:, 2:4] + 1.2 * (plain - empty)[:, 2:4], 1e-5)
    assert_near(weighted[:, :2], plain[:, :2], 1e-6)


def test_pictures_use_embeddings_of_files_and_loras(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cat = write(tmp_path / "cat.safetensors", {"clip_g": 9 * WIDE})
    lora = FORMS["diffusers"].write(random_factors(attention_of_prior()), {}) | {"bundle_emb.<cat>.clip_g": 9 * WIDE}
    prompt = "a embedding:cat on a blue background"
    [own] = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32").generate(prompt, embeddings={"cat": cat})
    pipe = WuerstchenPipeline.load(
        bundle, device="cpu", dtype="fp32", lora={write(tmp_path / "l.safetensors", lora): 0.0}
    )
    assert "embedding:cat" in caplog.text
    [bundled] = pipe.generate(prompt)
    [plain] = pipe.generate("a cat on a blue background")
    assert own.tobytes() == bundled.tobytes() != plain.tobytes()
    command = ["generate", prompt, "--model", str(bundle), "--device", "cpu", "--dtype", "fp32"]
    assert main([*command, "--embedding", str(tmp_path / "no.pt"), "--output", str(tmp_path / "o.png")]) == 2
    assert main([*command, "--embedding", str(cat), "--output", str(tmp_path / "o.png")]) == 0
    assert Image.open(tmp_path / "o.png").convert("RGB").tobytes() == own.tobytes()


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("a embedding:dog", ("dog", "cat")),
        ("a (embedding:narrow:1.1)", ("narrow", "12", str(WIDTH))),
        ("a (embedding:cat:inf)", ("inf",)),
    ],
)
def test_errors_name_the_embedding(
    pipe: WuerstchenPipeline, tmp_path: Path, prompt: str, facts: tuple[str, ...]
) -> None:
    files = {"cat": {"clip_g": WIDE}, "narrow": {"clip_l": torch.ones(1, 12)}}
    pipe.embeddings.clear()
    pipe.load_embeddings({name: write(tmp_path / f"{name}.safetensors", x) for name, x in files.items()})
    with pytest.raises(ValueError, match="embedding|weight") as error:
        pipe.generate(prompt)
    assert all(fact in str(error.value) for fact in facts) and "\n" not in str(error.value)


def test_a_folder_of_embeddings(
    pipe: WuerstchenPipeline, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=tmp_path.name):
        pipe.load_embeddings(tmp_path)
    write(tmp_path / "cat.safetensors", {"clip_g": WIDE})
    (tmp_path / "model.safetensors").write_bytes(bundle.read_bytes())
    (tmp_path / "damaged.pt").write_text("no")
    assert pipe.load_embeddings(tmp_path) == ["cat", "cat.safetensors"]
    assert "model.safetensors" in caplog.text and "damaged.pt" in caplog.text
    with pytest.raises(ValueError, match=r"damaged\.pt"):
        pipe.load_embeddings(tmp_path / "damaged.pt")
