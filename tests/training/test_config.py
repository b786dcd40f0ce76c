"""Training configurations: overrides, errors, and the demo's TOML files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_stages import ALL, STAGES, config_path, write_configs

from tools.demo import build, build_v1
from wuerstchen_core.checkpoints.components import COMPONENTS, Params
from wuerstchen_core.checkpoints.infer_params import HEAD_WIDTH
from wuerstchen_core.checkpoints.quant import FP8, quantize
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import LAYOUTS, SHAPES
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.data.demo import DemoDataConfig
from wuerstchen_core.training.run import run
from wuerstchen_core.training.tables import STAGES as CLASSES

PART = {  # the part of a bundle that a stage trains, if their names differ
    "encoder": "image_encoder",
    "text": "text_encoder",
    "token-decoder": "token_decoder",
}
NETWORKS: dict[type, Any] = {
    PriorParams: Prior,
    DecoderParams: Decoder,
    TokenDecoderParams: TokenDecoder,
    VQGANParams: VQGAN,
    ImageEncoderParams: ImageEncoder,
    TextEncoderParams: TextEncoder,
}
LARGEST_BUNDLE, LARGEST_BUNDLE_V1 = 24e6, 9e6  # bytes


def recipe(stage: str, file: str = "") -> tuple[dict[str, Any], Params]:
    config = read_config(build.RECIPE / file if file else config_path(build.RECIPE, stage), [])
    return config, from_table(COMPONENTS[PART.get(stage, stage)].params, config["model"], "model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_configs(tmp_path, tmp_path / "run")
    return config_path(tmp_path, "prior")


@pytest.fixture
def part_sizes() -> dict[str, int]:
    """The bytes of each part as `build.assemble` stores it: in bf16, with known tokens only."""
    sizes: dict[str, int] = {}
    for stage in STAGES:
        params = recipe(stage)[1]
        state = NETWORKS[type(params)](params, device="meta").state_dict()
        for key, x in state.items():
            stored = x[: len(build.trained_tokens())] if key == "token_embedding.weight" else x
            sizes[stage] = sizes.get(stage, 0) + stored.numel() * (2 if x.is_floating_point() else 8)
    return sizes


def test_overrides_are_toml_or_plain_strings(file: Path) -> None:
    changes = [
        "train.lr=3e-4",
        "run=elsewhere",
        "train.betas=[0.5, 0.9]",
        "noise.stratified=false",
        "inputs.text='a b'",
    ]
    config = read_config(file, changes)
    assert config["train"]["lr"] == 3e-4 and config["run"] == "elsewhere" and config["inputs"] == {"text": "a b"}
    assert config["noise"]["stratified"] is False and config["model"]["depth"] == 1
    assert from_table(LoopConfig, config["train"], "train") == replace(
        from_table(LoopConfig, read_config(file, [])["train"], "train"), lr=3e-4, betas=(0.5, 0.9)
    )


MISTAKES = {  # an override, and what the error names
    "train.stepz=3": r"\[train\] .*stepz.*steps",
    "train.steps=many": r"\[train\] steps .*whole number.*'many'",
    "train.steps=4.5": r"\[train\] steps .*whole number.*4\.5",
    "train.steps=true": r"\[train\] steps .*whole number.*True",
    "train.steps=0": r"\[train\] steps .*at least 1.* 0$",
    "train.lr=.001": r"\[train\] lr .*number.*'\.001'",
    "train.lr=0.0": r"\[train\] lr .*more than 0.* 0\.0$",
    "train.betas=0.9": r"\[train\] betas .*list of 2.*0\.9",
    "train.betas=[0.9]": r"\[train\] betas .*list of 2.*\[0\.9\]",
    "train.betas=[0.9, 1.5]": r"\[train\] betas .*less than 1.*1\.5",
    "train.betas=[0.9, 1]": r"\[train\] betas .*less than 1.*, 1\]",
    "train.betas=[nan, 0.9]": r"\[train\] betas .*nan",
    "train.seed=4294967296": r"\[train\] seed .*4294967295.*4294967296",
    "train.precision=fp8": r"\[train\] precision .*no, bf16, fp16.*'fp8'",
    "train=5": r"train .*table.* 5$",
    "train": r"--set 'train'.*table\.key=value",
    "train.steps.more=1": r"--set 'train\.steps\.more=1'.*steps",
    "model.depht=2": r"\[model\] .*depht.* depth",
    "modle.depth=2": r"modle.* model",
    "vqgan.crop=32": r"vqgan.* noise",
    "noise.weight=p3": r"\[noise\] weight .*p2, v, x0.*'p3'",
    "inputs.effnet=x": r"\[inputs\] .*encoder.*effnet",
    "data.canvas=100": r"\[data\] canvas .*64.*100",
    "data.things=132": r"\[data\] things .*131.*132",
    'data={"things"=1, "layouts"=["pair"]}': r"\[data\] .*square",
    "run=3": r"run .* 3$",
    "inputs.text=3": r"\[inputs\] .*text = 3$",
    "inputs.text=none.safetensors": r"encoder\.safetensors is missing",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_named_in_one_line(file: Path, change: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[change]) as error:
        run("prior", file, [change])
    assert "\n" not in str(error.value)
    assert not (file.parent / "run").exists()


def test_a_model_that_is_not_a_table_is_named_even_with_a_start(file: Path) -> None:
    with pytest.raises(ValueError, match="model .* 3$"):
        run("prior", file, ["model=3", "start=demo", "inputs.encoder=demo", "inputs.text=demo"])


def test_missing_keys_and_tables_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[train\] .*steps, batch"):
        from_table(LoopConfig, {"lr": 1}, "train")
    with pytest.raises(ValueError, match=r"\[model\]"):
        check_tables({"run": "x"}, ("start", "model"))
    with pytest.raises(ValueError, match="run"):
        check_tables({"model": {}}, ("start", "model"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes('run = "läufe"\r\n[train]\r\nsteps = 3\r\n'.encode(encoding))
    assert read_config(file, []) == {"run": "läufe", "train": {"steps": 3}}
    file.write_bytes('run = "x"\n'.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"mine\.toml .*UTF-16"):
        read_config(file, [])


def test_an_invalid_or_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[model\n", encoding="utf-8")
    (deep := tmp_path / "deep.toml").write_text(f"a = {'[' * 200}{']' * 200}\n")
    for path in (file, deep, tmp_path / "none.toml"):
        assert main(["train", "prior", "--config", str(path)]) == 2
        line = capsys.readouterr().err
        assert str(path) in line and line.count("\n") == 1


def test_a_missing_drawing_package_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wuerstchen_core.demo import artwork

    artwork._sprite.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    assert main(["train", "prior", "--config", str(file)]) == 2
    line = capsys.readouterr().err
    assert "resvg_py" in line and '"wuerstchen[train]"' in line and line.count("\n") == 1


ALL_SCENES = DemoDataConfig(layouts=LAYOUTS, shapes=tuple(SHAPES), larger=(384, 512))
DRAWN_SCENES = DemoDataConfig(
    layouts=("large", "small", "corner", "pair", "trio"), shapes=("square", "portrait", "landscape"), larger=(512,)
)
DATA_TABLES = {
    "vqgan": DemoDataConfig(),
    "encoder": DRAWN_SCENES,
    "text": replace(ALL_SCENES, shapes=("square",), larger=()),
    "decoder": DRAWN_SCENES,
    "prior": replace(ALL_SCENES, most=2400),
    "prior_again": replace(ALL_SCENES, most=1600, scattered=1800, scattered_share=0.35),
}


@pytest.mark.parametrize(("key", "value"), [("margin", -1), ("quantize_from", 0), ("quantized", 1.5)])
def test_invalid_options_of_stage_a_are_named(key: str, value: float, tmp_path: Path) -> None:
    write_configs(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"\[vqgan\] {key} .*{value}$"):
        run("vqgan", config_path(tmp_path, "vqgan"), [f"vqgan.{key}={value}"])


SECOND_TRAININGS = [(stage, f"{stage}_again.toml") for stage in build.AGAIN]


@pytest.mark.parametrize(
    ("stage", "file"), [*((stage, "") for stage in ALL), *SECOND_TRAININGS, ("prior", build_v1.STAGES["prior"])]
)
def test_the_recipes_tables_are_valid(stage: str, file: str) -> None:
    config = read_config(build.RECIPE / file if file else config_path(build.RECIPE, stage), [])
    kind = CLASSES[stage]
    check_tables(config, kind.tables)
    loop = from_table(LoopConfig, config["train"], "train")
    assert loop.save_every % loop.log_every == 0 and loop.steps % loop.log_every == 0
    data = from_table(DemoDataConfig, config.get("data", {}), "data")
    expected = DATA_TABLES.get(Path(file).stem, DATA_TABLES.get(stage))
    assert data == (DemoDataConfig(things=12) if config["run"] == "runs/demo-v1" else expected)
    for table in set(kind.tables) - {"start", "model"}:
        from_table(kind.tables[table], config.get(table, {}), table)


@pytest.mark.parametrize(("stage", "file"), SECOND_TRAININGS)
def test_a_second_training_starts_from_the_recipes_first(stage: str, file: str) -> None:
    overrides = build.second_overrides(Path("runs/demo"), stage)
    own, changed = (read_config(build.RECIPE / file, x) for x in ([], overrides))
    first = build.stage_folders(Path("runs/demo"))[stage] / f"{stage}.safetensors"
    assert own == changed and own["start"] == str(first)


def test_the_recipe_is_standard_v2_with_heads_of_width_64() -> None:
    prior, decoder, text = (recipe(stage)[1] for stage in ("prior", "decoder", "text"))
    assert isinstance(prior, PriorParams) and isinstance(decoder, DecoderParams) and isinstance(text, TextEncoderParams)
    assert prior.c == prior.nhead * HEAD_WIDTH and text.width == text.heads * HEAD_WIDTH
    for c, heads, blocks in zip(decoder.c_hidden, decoder.nhead, decoder.level_config, strict=True):
        assert c == heads * HEAD_WIDTH if "A" in blocks else heads == -1
    assert prior.c_cond == decoder.clip_embd == text.width  # one tower serves both stages
    assert 256 // 4 % decoder.multiple == 0 and 64 // 4 % decoder.multiple == 0  # every legal size


def test_the_v1_recipe_fits_the_parts_of_v2() -> None:
    prior, decoder = recipe("prior", build_v1.STAGES["prior"])[1], recipe("token-decoder")[1]
    vqgan, text = recipe("vqgan")[1], recipe("text")[1]
    assert isinstance(prior, PriorParams) and isinstance(decoder, TokenDecoderParams)
    assert isinstance(vqgan, VQGANParams) and isinstance(text, TextEncoderParams)
    assert recipe("prior", build_v1.STAGES["prior"])[0]["run"] == recipe("token-decoder")[0]["run"] == "runs/demo-v1"
    assert prior.c == prior.nhead * HEAD_WIDTH and (prior.feature_scale, prior.feature_shift) == (1.0, 0.0)
    assert prior.c_cond == decoder.byt5_embd == text.width and decoder.num_labels == vqgan.codebook_size
    assert 256 // 4 % decoder.multiple == 0 and 64 // 4 % decoder.multiple == 0  # every legal size


def test_the_v1_bundle_is_small_enough() -> None:
    sizes = {}
    for stage in (*build_v1.REUSED, *build_v1.STAGES):
        params = recipe(stage, build_v1.STAGES.get(stage, ""))[1]
        state = NETWORKS[type(params)](params, device="meta").state_dict()
        sizes[stage] = sum(part.nbytes for key, x in state.items() for part in quantize(key, x, FP8).values())
    assert min(sizes.values()) > 1e5
    assert sum(sizes.values()) < LARGEST_BUNDLE_V1


def test_the_v2_bundle_is_small_enough(part_sizes: dict[str, int]) -> None:
    assert min(part_sizes.values()) > 1e5
    assert sum(part_sizes.values()) < LARGEST_BUNDLE
