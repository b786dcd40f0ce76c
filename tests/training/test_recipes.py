"""The recipes: their networks at full size, and runs in a tiny size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.picture_folders import examples, shard, table
from helpers.recipes import ROOT, SHIPPED, command_of
from helpers.tiny_stages import TABLES, read_log
from torch import nn

from wuerstchen_core.checkpoints.release import check_control
from wuerstchen_core.cli.main import main
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.models.control_net import ControlNet
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.prior import V1, Prior, PriorParams, latents_from_features
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.stages.adapters import attach
from wuerstchen_core.training.stages.control import ControlConfig, ControlledPrior, control_params
from wuerstchen_core.training.stages.image_encoder import Compressor, EncoderConfig, EncoderStage, load_backbone
from wuerstchen_core.training.tables import STAGES

RECIPES = {path.stem: path for path in SHIPPED if path.parent.name == "recipes"}  # at the released sizes
# Class, params and the parameter count of the published network (encoders without ImageNet's classes).
SIZES: Mapping[str, tuple[Any, Any, int]] = {
    "vqgan": (VQGAN, VQGANParams, 18_406_894),
    "v1_encoder": (ImageEncoder, ImageEncoderParams, 117_254_784),
    "v2_encoder": (ImageEncoder, ImageEncoderParams, 20_198_000),
    "v1_token_decoder": (TokenDecoder, TokenDecoderParams, 730_814_336),
    "v2_decoder": (Decoder, DecoderParams, 1_055_365_280),
    "v1_prior": (Prior, PriorParams, 993_243_680),
    "v2_prior": (Prior, PriorParams, 993_636_896),
}
ADAPTERS = {"v2_lora": 4, "v2_distill_lora": 9, "v2_decoder_distill_lora": 9}  # numbers of targets
SMALL = (("fused", 1, 3, 2, 8, 8, 1),)  # stages of an encoder
SCORES = table(pwatermark=0.1, AESTHETIC_SCORE=6.0, punsafe=0.01)


DEMO = [path for path in SHIPPED if path.parent.name == "recipe"]


def stage_of(recipe: str) -> str:
    return command_of(RECIPES[recipe])[1]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_its_comment_names_its_command(path: Path) -> None:
    command = command_of(path)
    assert command[0] == "train" and command[1] in STAGES and command[2:3] == ["--config"]
    assert (ROOT.parent / command[3]).samefile(path)


def test_there_is_a_recipe_for_each_stage() -> None:
    assert set(RECIPES) == {*SIZES, *ADAPTERS, "v2_control"}


@pytest.mark.parametrize("recipe", SIZES)
def test_it_builds_the_published_network(recipe: str) -> None:
    kind, sizes, count = SIZES[recipe]
    config = read_config(RECIPES[recipe], [])
    params = from_table(sizes, config["model"], "model")
    with torch.device("meta"):
        network = kind(params)
    assert sum(p.numel() for p in network.parameters()) == count
    values = asdict(params)
    if "prior" in recipe:
        assert {key: values[key] for key in V1} == (
            V1 if "v1" in recipe else {key: asdict(PriorParams())[key] for key in V1}
        )
    if "encoder" in recipe:
        assert params.stages == (EFFICIENTNET_V2_L if "v1" in recipe else EFFICIENTNET_V2_S)
    if "encoder" not in recipe and recipe != "vqgan":
        assert params.dropout == 0.1  # as the original trains


@pytest.mark.parametrize("recipe", ADAPTERS)
def test_a_lora_fits_the_published_network(recipe: str) -> None:
    table = STAGES[recipe.removeprefix("v2_").replace("_", "-")].tables["lora"]
    options = from_table(table, read_config(RECIPES[recipe], [])["lora"], "lora")
    assert len(options.targets) == ADAPTERS[recipe]
    with torch.device("meta"):
        network = Decoder(DecoderParams()) if "decoder" in recipe else Prior(PriorParams())
        attach(network, options)
    learned = [p.numel() for p in network.parameters() if p.requires_grad]
    if recipe == "v2_lora":
        assert len(learned) == 32 * 4 * 2 and sum(learned) == 32 * 4 * 16 * (1536 + 1536)  # of 32 attention layers


def test_the_control_net_fits_the_published_prior() -> None:
    own = from_table(ControlConfig, read_config(RECIPES["v2_control"], [])["control"], "control")
    params = control_params(own, PriorParams())
    with torch.device("meta"):
        network = ControlledPrior(Prior(PriorParams()), ControlNet(params))
        control = network.control_net(torch.empty(1, 3, 1024, 1536), (24, 36))
    check_control(params, PriorParams(), "it")
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 16_660_224
    assert [tuple(x.shape) for x in control if x is not None] == [(1, 1536, 24, 36)] * 8


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_its_tables_are_valid(recipe: str) -> None:
    config = read_config(RECIPES[recipe], [])
    stage = stage_of(recipe)
    kind = STAGES[stage]
    check_tables(config, kind.tables)
    loop = from_table(LoopConfig, config["train"], "train")
    data = from_table(ImageDataConfig, config["data"], "data")
    assert loop.precision == "bf16" and loop.steps > 1000
    assert all(width % 128 == height % 128 == 0 for width, height in data.sizes)


@pytest.mark.parametrize("release", ["v1", "v2"])
def test_a_new_encoder_normalizes_features_for_its_releases_prior(release: str) -> None:
    """The prior's latents have mean 0 and variance 1."""
    encoder, prior = (read_config(RECIPES[f"{release}_{stage}"], []) for stage in ("encoder", "prior"))
    options = from_table(EncoderConfig, encoder.get("encoder", {}), "encoder")
    net = Compressor(ImageEncoder(ImageEncoderParams(stages=SMALL)), options, pretrained=False)
    norm = net.image_encoder.mapper[1]
    units = from_table(PriorParams, prior["model"], "model")
    mean, deviation = norm.get_parameter("bias"), norm.get_parameter("weight")
    assert (latents_from_features(mean, units) == 0).all() and (deviation / units.feature_scale == 1).all()


def test_invalid_options_of_the_encoder_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[encoder\] feature_scale .*0\.0$"):
        from_table(EncoderConfig, {"feature_scale": 0.0}, "encoder")
    with pytest.raises(ValueError, match=r"\[encoder\] widths"):
        Compressor(ImageEncoder(ImageEncoderParams(stages=SMALL)), EncoderConfig(widths=()), pretrained=False)


def test_an_encoder_starts_from_torchvisions_weights(tmp_path: Path) -> None:
    """The classifier in the file is ignored."""
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig

    def theirs(width: int) -> Path:
        stages = [FusedMBConvConfig(1, 3, 2, 8, width, 1)]
        network = EfficientNet(stages, dropout=0.2, last_channel=16, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
        torch.save(network.state_dict(), file := tmp_path / f"efficientnet-{width}.pth")
        return file

    path = theirs(8)
    encoder = ImageEncoder(ImageEncoderParams(stages=SMALL, last_channel=16))
    load_backbone(encoder, path)
    weights = torch.load(path, weights_only=True)
    assert all(torch.equal(x, weights[f"features.{key}"]) for key, x in encoder.backbone.state_dict().items())
    base = {"run": str(tmp_path), "data": {"canvas": 64, "things": 2}, "encoder": {"backbone": str(path)}}
    model = {"stages": [list(stage) for stage in SMALL], "last_channel": 16}
    stage = EncoderStage({**base, "model": model})
    assert torch.equal(stage.net.image_encoder.backbone[0][0].weight, weights["features.0.0.weight"])
    for wrong in (theirs(16), tmp_path / "none"):
        with pytest.raises(ValueError, match=rf"\[encoder\] backbone: .*{wrong.name}"):
            load_backbone(encoder, wrong)
    with pytest.raises(ValueError, match="none"):
        (tmp_path / "none").write_bytes(b"no weights")
        load_backbone(encoder, tmp_path / "none")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[pytest.mark.long] if "distill" in name else []) for name in sorted(RECIPES)],
)
def test_it_takes_two_steps_in_a_tiny_size(
    recipe: str, run_folder: Path, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = examples(range(8))
    scores = {f"{number:03d}.json": SCORES for number in range(8)}
    (tmp_path / "a.tar").write_bytes(shard(dict(sorted({**files, **scores}.items()))))
    stage = stage_of(recipe)
    (tmp_path / "sizes.toml").write_text(TABLES.get(stage, "[model]"), encoding="utf-8")
    small = {} if recipe == "v2_prior" else read_config(tmp_path / "sizes.toml", [])["model"]
    values = {
        "run": str(tmp_path), "data.source": str(tmp_path / "a.tar"), "data.size": 64, "data.multiple": 64,
        "data.ratio": 1.0, "data.min_side": 1, "data.workers": 0, "train.steps": 2, "train.batch": 2,
        "train.log_every": 1, "train.precision": "no", "train.frozen": "fp32",
        **{f"model.{key}": value for key, value in small.items()},
    }  # fmt: skip
    if stage == "vqgan":
        values |= {"vqgan.crop": 32, "vqgan.margin": 8, "vqgan.quantize_from": 1}
    if stage == "control":
        values |= {"control.widths": [8, 8, 8, 8], "control.repeats": [1, 1, 1, 1]}
    if stage == "encoder":
        values["encoder.widths"] = [16, 8, 8]
    if recipe == "v2_prior":
        values["start"] = str(run_folder / "prior" / "prior.safetensors")
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    monkeypatch.chdir(ROOT.parent)
    assert main([*command_of(RECIPES[recipe]), *(f"--set={x}" for x in [*inputs, *overrides])]) == 0
    assert (tmp_path / stage / f"{stage}.safetensors").exists()
    assert [row["step"] for row in read_log(tmp_path / stage)] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.stem)
def test_a_recipe_of_the_demo_takes_two_steps_on_few_drawings(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped networks take the place of those that recipes before it train."""
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    config, command = read_config(path, []), command_of(path)
    small: dict[str, Any] = {"run": str(tmp_path), "data.things": 3, "data.most": 3, "train.steps": 2, "train.batch": 2}
    if "crop" not in config.get("vqgan", {}):
        small["data.canvas"] = 64
    if not {"demo", "demo-v1"} & {*config.get("inputs", {}).values()}:
        small |= {f"inputs.{name}": "demo" for name in ("vqgan", "encoder", "text", "decoder", "prior")}
    if config.get("start", "demo") != "demo":
        small["start"] = "demo"
    monkeypatch.chdir(ROOT.parent)
    assert main([*command, *(f"--set={key}={json.dumps(value)}" for key, value in small.items())]) == 0
    assert (tmp_path / command[1] / f"{command[1]}.safetensors").exists()
