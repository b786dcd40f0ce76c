"""ControlNets in `generate`, in every way that it is called, and in the metadata of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import failure, run
from helpers.golden_data import assert_near
from helpers.networks import CONTROL
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core import Hint, WuerstchenPipeline
from wuerstchen_core.checkpoints import build_part, describe, load_control_net, read_part, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.release import prior_values
from wuerstchen_core.inference import control as control_module
from wuerstchen_core.inference.control import load_hints
from wuerstchen_core.inference.images import to_pixels
from wuerstchen_core.inference.records import hint_records
from wuerstchen_core.models.control_net import ControlNet, ControlNetParams, crop_hint

PROMPT = "a red apple"


def save_net(path: Path, params: ControlNetParams = CONTROL, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    net = ControlNet(params)
    net.init_weights()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_bundle(path, {"control_net": net}, {"licence": "MIT"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two ControlNets of the tiny prior and two hints of the shape that it generates."""
    path = tmp_path_factory.mktemp("control")
    save_net(path / "net.safetensors")
    save_net(path / "other.safetensors", replace(CONTROL, prior_blocks=(1,)), seed=1)
    for name, box in (("hint", (10, 10, 60, 50)), ("second", (70, 5, 120, 30))):
        image = Image.new("RGB", (128, 64))
        image.paste("white", box)
        image.save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def features(pipe: WuerstchenPipeline, control: Any = None, count: int = 1, **settings: Any) -> Tensor:
    """Returns what Stage C generates."""
    text, _ = pipe.encode_text([PROMPT])
    return pipe.sample_prior(text.repeat(count, 1, 1), pipe.sampling.updated(**settings), control=control, seed=3)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def test_a_hint_changes_the_picture_by_its_strength(pipe: WuerstchenPipeline, folder: Path) -> None:
    net, hint = folder / "net.safetensors", folder / "hint.png"
    plain = features(pipe)
    changed = {x: distance(features(pipe, [(net, hint, x)]), plain) for x in (0.0, 0.2, 1.0)}
    assert changed[0.0] == 0 < changed[0.2] < changed[1.0]
    loaded = load_control_net(net)
    for control in ((net, hint), Hint(loaded, Image.open(hint)), [Hint(str(net), str(hint), 1.0)], [[net, hint, 1]]):
        assert distance(features(pipe, control), plain) == changed[1.0]


def test_several_add_up_and_each_acts_when_and_where_it_should(pipe: WuerstchenPipeline, folder: Path) -> None:
    one = folder / "net.safetensors", folder / "hint.png"
    other = folder / "other.safetensors", folder / "second.png"
    plain, single, both = features(pipe), features(pipe, one), features(pipe, [one, other])
    assert_near(features(pipe, [other, one]), both, 2e-3)
    assert distance(both, single) > 0.01
    assert_near(features(pipe, [(*one, 0.5), (*one, 0.5)]), single, 2e-3)
    first, last = (features(pipe, Hint(*one, start=start, end=end)) for start, end in ((0, 0.4), (0.6, 1)))
    assert min(distance(first, last), distance(first, plain), distance(last, plain)) > 0.01
    masks = {x: features(pipe, Hint(*one, mask=Image.new("L", (128, 64), x))) for x in (0, 255)}
    assert torch.equal(masks[0], plain)
    assert_near(masks[255], single, 2e-3)


def test_pixels_for_each_image(pipe: WuerstchenPipeline, folder: Path) -> None:
    net, hints = (
        load_control_net(folder / "net.safetensors"),
        [Image.open(folder / f"{x}.png") for x in ("hint", "second")],
    )
    each = torch.cat([to_pixels(hint) for hint in hints])
    batch = features(pipe, Hint(net, each), count=2)
    assert_near(batch[:1], features(pipe, (net, hints[0]), count=2)[:1], 2e-3)
    assert_near(batch[1:], features(pipe, (net, hints[1]), count=2)[1:], 2e-3)
    [image] = pipe.generate(PROMPT, control=Hint(net, each[:1]), prior_steps=1, decoder_steps=1)
    [record] = json.loads(image.info["wuerstchen"])["control"]
    [again] = pipe.generate(PROMPT, control=iter([Hint(net, each[:1])]), prior_steps=1, decoder_steps=1)
    assert again.info == image.info
    assert record["image"] == "" and "prompt" not in image.info
    nan = torch.full_like(each, float("nan"))
    for wrong in (
        torch.cat([each, each]), each[0], each[:, :1], each * 255, (each * 255).byte(), each - 0.5, each[..., :0], nan,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a hint"):
            features(pipe, Hint(net, wrong), count=2)
    hint = Hint(net, each)
    assert hint in [hint] and hint != Hint(net, each) and len({hint, hint}) == 1
    assert features(pipe, Hint(net, each[:1] * (1 + 1e-7))).isfinite().all()  # of an interpolation, for example


def test_pixels_for_each_image_of_prompts_of_several_lengths(pipe: WuerstchenPipeline, folder: Path) -> None:
    hints = [Image.open(folder / f"{x}.png") for x in ("hint", "second")]
    each = torch.cat([to_pixels(hint) for hint in hints])
    prompts, net = [PROMPT, "red " * 80], folder / "net.safetensors"
    together = pixels(pipe.generate(prompts, control=Hint(net, each)))
    for i, (prompt, hint) in enumerate(zip(prompts, hints, strict=True)):
        [alone] = pixels(pipe.generate(prompt, seed=i, control=(net, hint)))
        assert np.abs(together[i] - alone).max() <= 1


@pytest.mark.long
def test_batches_and_guidance(pipe: WuerstchenPipeline, folder: Path) -> None:
    control = (folder / "net.safetensors", folder / "hint.png")
    batch = features(pipe, control, count=2)
    assert_near(batch[:1], features(pipe, control), 2e-3)
    assert distance(batch[0], batch[1]) > 0.01
    assert distance(features(pipe, control, prior_guidance=1.0), features(pipe, prior_guidance=1.0)) > 0.01
    prompts = ["red " * 80, PROMPT]  # of different lengths: guidance calls the network twice
    long = pipe.generate(prompts, count=2, control=control)
    [last] = pipe.generate(prompts[1], seed=3, control=control)
    assert np.abs(pixels(long[3:]) - pixels([last])).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("options", [{"low_memory": True}, {"dtype": "bf16"}, {"dtype": "int8"}], ids=str)
def test_low_memory_and_other_dtypes(
    pipe: WuerstchenPipeline, bundle: Path, folder: Path, options: dict[str, Any]
) -> None:
    control = [(folder / "net.safetensors", folder / "hint.png")]
    expected, plain = features(pipe, control), features(pipe)
    other = WuerstchenPipeline.load(bundle, **{"device": "cpu", "dtype": "fp32", **options})
    found = distance(features(other, control), expected)
    assert found <= (0 if "low_memory" in options else distance(expected, plain) / 2)


def test_v1(folder: Path, tmp_path: Path) -> None:
    pipe = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "v1.safetensors", release="v1"), device="cpu")
    net = save_net(tmp_path / "net.safetensors", replace(CONTROL, prior_release="v1"))
    assert distance(features(pipe, (net, folder / "hint.png")), features(pipe)) > 0.01
    with pytest.raises(ValueError, match=r"v2 prior .* v1 prior"):
        pipe.generate(PROMPT, control=(folder / "net.safetensors", folder / "hint.png"))


def test_what_cannot_be_used_is_refused_before_any_computation(
    pipe: WuerstchenPipeline, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, hint = folder / "net.safetensors", folder / "hint.png"
    monkeypatch.setattr(pipe.prior_text_encoder, "encode", None)  # fails when it is called
    deep = save_net(tmp_path / "deep.safetensors", replace(CONTROL, prior_depth=3))
    wide = save_net(tmp_path / "wide.safetensors", replace(CONTROL, prior_width=32))
    for control, named in (
        ((deep, hint), "depth 3"), ((wide, hint), "width 32"), ((bundle, hint), "control_net"), ((hint, hint), "hint"),
        ((net, net), "net.safetensors"), ((net,), "control"), ("net", "control"), (5, "control"),
        ((net, hint, "x"), "strength"), ([(5, hint)], "5"), ((net, tmp_path / "none.png"), "none.png"),
        (Hint(net, torch.zeros(2, 3, 8, 8)), "2 pictures for 1 image:"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            pipe.generate(PROMPT, control=control)
    with pytest.raises(ValueError, match="3 pictures for 4 images"):
        pipe.generate([PROMPT, "red " * 80], count=2, control=Hint(net, torch.zeros(3, 3, 8, 8)))
    for times in ({"start": 0.5, "end": 0.5}, {"start": -0.1}, {"end": 1.1}, {"end": float("nan")}):
        with pytest.raises(ValueError, match="hint"):
            Hint(net, hint, **times)


def test_notes_about_another_shape_and_an_inverted_outline(
    bundle: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    for image in (Image.new("RGB", (64, 64)), Image.new("RGB", (256, 128), "white"), Image.new("RGB", (64, 64))):
        features(pipe, (folder / "net.safetensors", image))
    hint = Image.new("RGB", (128, 64))
    features(pipe, Hint(folder / "net.safetensors", hint, mask=Image.new("L", (40, 80), 255)))
    first, second, third = caplog.messages
    assert "64x64" in first and "white" in second and "mask" in third and "40x80" in third and "40x27" in third


def test_warnings_about_another_prior_and_times_without_a_step(
    bundle: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    values = prior_values(pipe.require("prior"))
    for name, factor in (("this", 1.02), ("other", 1.1)):
        params = replace(CONTROL, prior_values=tuple(x * factor for x in values))
        features(pipe, (save_net(tmp_path / f"{name}.safetensors", params), folder / "hint.png"))
    assert len(values) == 32
    [message] = caplog.messages
    assert "other.safetensors" in message and "prior" in message
    hint = Hint(tmp_path / "this.safetensors", folder / "hint.png", start=0.4, end=0.5)
    features(pipe, hint, prior_steps=10, schedule="linear")
    assert len(caplog.messages) == 1
    assert torch.equal(features(pipe, hint, prior_steps=1), features(pipe, prior_steps=1))
    assert len(caplog.messages) == 2 and "0.4 to 0.5" in caplog.messages[1]


def test_numbers_that_are_not_finite_name_the_control_net(
    pipe: WuerstchenPipeline, folder: Path, tmp_path: Path
) -> None:
    net = load_control_net(folder / "net.safetensors")
    net.hint_stem.weight.data[0] = float("nan")
    save_bundle(tmp_path / "nan.safetensors", {"control_net": net}, {})
    with pytest.raises(ValueError, match=r"nan\.safetensors computed"):
        features(pipe, (tmp_path / "nan.safetensors", folder / "hint.png"))


@pytest.fixture
def picture(tmp_path: Path) -> Image.Image:
    image = Image.linear_gradient("L").resize((128, 64)).convert("RGB")
    image.save(tmp_path / "picture.png")
    return image


def test_edits_are_steered(pipe: WuerstchenPipeline, folder: Path, picture: Image.Image) -> None:
    control, mask = (folder / "net.safetensors", folder / "hint.png"), Image.new("L", picture.size)
    mask.paste(255, (64, 0, 128, 64))
    for edit in (
        partial(pipe.variations, picture, PROMPT),
        partial(pipe.inpaint, picture, mask, PROMPT, composite=False),
        partial(pipe.outpaint, picture.crop((0, 0, 64, 64)), PROMPT, right=64, composite=False),
    ):
        plain, steered, again = (pixels(edit(control=x)) for x in (None, control, Hint(*control)))
        assert not np.array_equal(plain, steered) and np.array_equal(steered, again)
    with pytest.raises(ValueError, match="strength 0"):
        pipe.variations(picture, strength=0, control=control)
    with pytest.raises(ValueError, match="control"):
        pipe.reconstruct(picture, control=control)


def test_hints_of_a_picture_that_is_padded_stay_where_they_are(pipe: WuerstchenPipeline, folder: Path) -> None:
    """An edited picture of 100x60 pixels is padded at the right and bottom to 128x64."""
    sampling = pipe.sampling.updated(width=128, height=64)
    hint = torch.zeros(1, 3, 120, 200)
    hint[..., 100:] = 1
    hints = load_hints(pipe, Hint(folder / "net.safetensors", hint), sampling, 1, area=(60, 100))
    placed = hints._placed(hint)
    assert tuple(placed.shape) == (1, 3, 64, 128)
    assert placed[..., :60, 52:98].min() > 0.9 > 0.1 > placed[..., :48].max() and not placed[..., 60:, :].any()


def test_hints_are_cropped_to_the_shape_of_the_latents() -> None:
    hint = torch.arange(100.0).expand(1, 1, 50, 100)
    assert crop_hint(hint, (6, 12)) is hint and crop_hint(hint, (6, 11)) is hint  # 6x11 is also rounded up
    assert tuple(crop_hint(hint, (6, 6)).shape) == (1, 1, 50, 50) and float(crop_hint(hint, (6, 6)).mean()) == 49.5
    assert tuple(crop_hint(hint, (3, 24)).shape) == (1, 1, 12, 100)


def test_files_are_described_converted_and_built(folder: Path, tmp_path: Path) -> None:
    described = describe(folder / "net.safetensors")
    [part] = described.parts
    assert (part.name, part.folder, described.version) == ("control_net", "controlnet", "v2")
    assert part.sizes["hints"] == "outline" and part.sizes["prior_width"] == 64
    convert([folder / "net.safetensors"], tmp_path / "half.safetensors", dtype="bf16")
    half = build_part(read_part(tmp_path / "half.safetensors", "control_net"))
    assert isinstance(half, ControlNet) and half.params == CONTROL and half.hint_stem.weight.dtype == torch.bfloat16
    torch.save(half.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="header"):
        load_control_net(tmp_path / "bare.pt")


def test_a_model_with_a_control_net_in_its_bundle_loads(bundle: Path, folder: Path, tmp_path: Path) -> None:
    convert([bundle, folder / "net.safetensors"], tmp_path / "all.safetensors")
    pipe = WuerstchenPipeline.load(tmp_path / "all.safetensors", device="cpu")
    hint = folder / "hint.png"
    both = [
        pipe.generate(PROMPT, control=(x, hint)) for x in (tmp_path / "all.safetensors", folder / "net.safetensors")
    ]
    assert np.array_equal(*map(pixels, both))


def test_the_command_line_and_like(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    model, common = ("--model", str(bundle)), ("--device", "cpu", "--output")
    hints = ("--control", "net.safetensors", "hint.png:0.8", "--control", "other.safetensors", "second.png")
    assert run("generate", PROMPT, *model, *hints, *common, tmp_path / "a.png") == 0
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    control: Any = [("net.safetensors", "hint.png", 0.8), ("other.safetensors", "second.png")]
    [expected] = pipe.generate(PROMPT, control=control)
    assert np.array_equal(np.asarray(expected), np.asarray(Image.open(tmp_path / "a.png")))
    assert run("generate", "--like", tmp_path / "a.png", *model, *common, tmp_path / "b.png") == 0
    assert np.array_equal(np.asarray(expected), np.asarray(Image.open(tmp_path / "b.png")))
    [first, _] = hint_records(control)
    assert (first["file"], first["image"], first["strength"]) == ("net.safetensors", "hint.png", 0.8)
    edit = ("variations", tmp_path / "a.png", "--prompt", PROMPT, "--count", "2", *model)
    reads = []
    load = control_module.load_control_net
    monkeypatch.setattr(control_module, "load_control_net", lambda *x, **y: reads.append(x) or load(*x, **y))
    (tmp_path / "varied").mkdir()
    assert run(*edit, *hints[:3], *common, tmp_path / "varied") == 0
    assert len(reads) == 1
    [varied, _] = sorted((tmp_path / "varied").iterdir())
    [record] = json.loads(Image.open(varied).info["wuerstchen"])["control"]
    assert record["image"] == "hint.png" and record["strength"] == 0.8
    [pixels_hint] = pipe.generate(PROMPT, control=("net.safetensors", to_pixels(Image.open("hint.png"))))
    pixels_hint.save(tmp_path / "c.png")
    capsys.readouterr()
    assert "--control" in failure(capsys, "generate", "--like", tmp_path / "c.png", *model)
    monkeypatch.chdir(tmp_path)
    assert "--control" in failure(capsys, "generate", "--like", tmp_path / "a.png", *model)
    assert "none.png" in failure(
        capsys, "generate", PROMPT, *model, "--control", folder / "net.safetensors", "none.png"
    )


@pytest.mark.long
def test_files_of_prompts(bundle: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    arguments = ("generate", "--prompts", tmp_path / "p.txt", "--model", bundle, "--device", "cpu", "--seed", 5)
    control = ("--control", folder / "net.safetensors", folder / "hint.png")
    for name, options in (("plain", ()), ("steered", control)):
        assert run(*arguments, *options, "--output", tmp_path / name) == 0
    plain, steered = (np.asarray(Image.open(tmp_path / name / "000001.png")) for name in ("plain", "steered"))
    assert not np.array_equal(plain, steered)
    assert run(*arguments, "--output", tmp_path / "steered") == 2  # images of other hints exist there


@pytest.mark.parametrize(
    "change",
    [
        {"prior_depth": 10**15}, {"prior_values": [10**400]},
        *(
            pytest.param(change, marks=pytest.mark.long)
            for change in (
                {"prior_width": 10**9}, {"widths": [10**9] * 4}, {"repeats": [10**9] * 4}, {"hints": 5},
                {"prior_blocks": [0, 10**9]}, {"prior_release": "v3"}, {"widths": []}, {"prior_values": [float("nan")]},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_damaged_headers_are_refused(
    pipe: WuerstchenPipeline, folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with safe_open(folder / "net.safetensors", "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = json.loads(header["wuerstchen"])
    content["parts"]["control_net"] |= change
    save_file(tensors, tmp_path / "bad.safetensors", {**header, "wuerstchen": json.dumps(content)})
    with pytest.raises(ValueError, match="bad"):
        load_hints(pipe, (tmp_path / "bad.safetensors", folder / "hint.png"), pipe.sampling, 1)
