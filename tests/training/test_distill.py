"""Distillation in a tiny size: its targets, what students learn, and the files that they are used from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lora_training import write_config
from helpers.networks import NETWORKS
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import assert_equal_states, assert_near_states, checkpoint, ema_of, launch, log_rows
from torch import Tensor, nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints.diffusers_pipeline import WHOLE
from wuerstchen_core.checkpoints.lora_info import describe_lora
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.diffusion.samplers import ddim_step, ddpm_step, noise_in, predict_x0, sample
from wuerstchen_core.diffusion.schedule import alpha_bar, decoder_times, expand, linear_times
from wuerstchen_core.training import card
from wuerstchen_core.training.config import LoopConfig, read_config
from wuerstchen_core.training.export import export_run
from wuerstchen_core.training.report import report_start
from wuerstchen_core.training.run import build_stage, run
from wuerstchen_core.training.stages import distill
from wuerstchen_core.training.stages.adapters import AdapterConfig, attach
from wuerstchen_core.training.stages.distill import DistillStage, distillation_losses, without_adapters
from wuerstchen_core.training.stages.distill_config import DistillConfig

OTHERS = ("distill", "decoder-distill", "decoder-distill-lora")
LONG = [pytest.mark.long]
STAGES = [
    pytest.param(stage, marks=[] if stage in ("distill-lora", "decoder-distill") else LONG)
    for stage in ("distill-lora", *OTHERS)
]
GUIDANCE = 3.0
FROZEN = ("encoder", "text", "vqgan")
CONFIG = """
[data]
canvas = 64
things = 2
[distill]
guidance = 2.0
teacher_steps = 2
[train]
steps = 4
batch = 2
lr = 1e-2
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 100
"""
EXTRA = {
    "distill-lora": ["lora.rank=2", "lora.dropout=0.2"],
    "decoder-distill-lora": ["lora.rank=2", "train.frozen='int8'"],
}


def noise_of(mean: float, spread: float, x: Tensor, t: Tensor) -> Tensor:
    """The expected noise in x at times t if the data have a normal distribution."""
    signal = expand(alpha_bar(t), x)
    return (1 - signal).sqrt() * (x - signal.sqrt() * mean) / (signal * spread**2 + 1 - signal)


def test_the_target_is_where_the_teachers_steps_lead() -> None:
    torch.manual_seed(0)
    teacher, student = partial(noise_of, 1.5, 0.4), partial(noise_of, 0.5, 0.7)
    noise, weights = torch.randn(3, 2, 1, 2, 2), torch.rand(3, 1, 2, 2)
    x, losses = noise[:, 0], []
    for start, middle, end in ((1.0, 0.75, 0.5), (0.5, 0.25, 0.0)):
        target = x
        for a, b in ((start, middle), (middle, end)):
            t, t_next = (torch.full((3,), one) for one in (a, b))
            signal = alpha_bar(t_next)[0]
            predicted = teacher(target, t)
            target = signal.sqrt() * predict_x0(target, predicted, t) + (1 - signal).sqrt() * predicted
        t, signal = torch.full((3,), start), alpha_bar(torch.tensor(end))
        predicted = student(x, t)
        x = signal.sqrt() * predict_x0(x, predicted, t) + (1 - signal).sqrt() * predicted
        losses.append(((x - target).square() * weights).mean())
    found = distillation_losses(student, teacher, noise, linear_times(2), 2, "ddim", weights)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses))
    one, two = (torch.full((3,), x) for x in (1.0, 0.5))
    renoised = ddpm_step(noise[:, 0], student(noise[:, 0], one), one, two, lambda _: noise[:, 1])
    for x, t, loss in zip((noise[:, 0], renoised), (1.0, 0.5), distillation_losses(
        student, teacher, noise, decoder_times(2), 2, "ddpm"
    ), strict=True):  # fmt: skip
        target = sample(teacher, x, linear_times(2, t), draw=torch.zeros_like, sampler="ddim")
        start, end = torch.full((3,), t), torch.zeros(3)
        result = ddim_step(x, student(x, start), start, end, torch.zeros_like)
        torch.testing.assert_close(loss, (result - target).square().mean())


@pytest.mark.long
def test_a_student_in_two_steps_ends_where_the_guided_teacher_does() -> None:
    """Where data and guidance are normal, an affine student of each time is exact; the teacher's own two are not."""
    torch.manual_seed(0)
    cond, uncond = partial(noise_of, 0.8, 0.2), partial(noise_of, 0.0, 1.0)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(uncond(x, t), cond(x, t), GUIDANCE)

    student = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("scale", "shift")})

    def predict(x: Tensor, t: Tensor) -> Tensor:
        index = (t < 0.75).long()
        scale, shift = (expand(student[name][index], x) for name in ("scale", "shift"))
        return noise_in(x, scale * x + shift, t)

    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    noise = torch.randn(64, 2, 1, 1, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack(distillation_losses(predict, teacher, noise, linear_times(2), 16, "ddim")).mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    x = torch.randn(64, 1, 1, 1)
    run_steps = partial(sample, draw=torch.zeros_like, sampler="ddim")
    with torch.no_grad():
        goal = run_steps(teacher, x, linear_times(32))
        found, own = (run_steps(one, x, linear_times(2)) for one in (predict, teacher))
    error = (found - goal).abs().max()
    assert error < 0.02 and (own - goal).abs().max() > 20 * error


@torch.no_grad()
def test_a_teacher_without_adapters_shares_the_base_weights() -> None:
    prior, inputs = NETWORKS["prior"].perturbed(), NETWORKS["prior"].inputs()
    before = prior(*inputs)
    layers = attach(prior, AdapterConfig())
    teacher = without_adapters(prior, layers)
    for name, p in prior.named_parameters():
        if "lora_" in name:
            p += 0.1
    assert torch.equal(teacher(*inputs), before) and not torch.allclose(prior(*inputs), before, atol=0.01)
    shared = {id(p) for p in prior.parameters()}
    assert all(id(p) in shared and not p.requires_grad for p in teacher.parameters())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    return write_config(tmp_path_factory.mktemp("distill"), bundle, CONFIG, ("prior", "decoder", *FROZEN))


@pytest.fixture(scope="module")
def trained(config: Path) -> Callable[[str], Path]:
    """Returns the file of weights of a stage, trained for 4 steps."""
    return cache(lambda stage: run(stage, config, [f"run='{config.parent}'", *EXTRA.get(stage, ())]))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["distill-lora", *OTHERS])
def test_a_stopped_run_resumes_exactly(
    stage: str, config: Path, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, losses = [], distill.distillation_losses

    def stopped(*args: Any) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*args)

    changes = [f"run='{tmp_path}'", *EXTRA.get(stage, ())]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "distillation_losses", stopped)
        run(stage, config, changes)
    assert checkpoint(tmp_path / stage)["step"] == 2
    file, whole = run(stage, config, changes), trained(stage)
    assert log_rows(file.parent) == log_rows(whole.parent)
    assert_equal_states(ema_of(file.parent), ema_of(whole.parent))
    assert file.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_the_file_states_what_was_distilled_and_is_sampled_so(
    stage: str, bundle: Path, trained: Callable[[str], Path]
) -> None:
    file, part = trained(stage), "decoder" if stage.startswith("decoder") else "prior"
    header = read_file_metadata(file)
    about = json.loads(header["distillation"]) if "lora" in stage else json.loads(header["wuerstchen"])["distillation"]
    steps = 2 if part == "prior" else 1
    assert about.items() >= {"teacher": "tiny.safetensors", "steps": steps, "teacher_steps": 2, "guidance": 2.0}.items()
    base = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    pipe = WuerstchenPipeline.load(
        bundle, device="cpu", dtype="fp32", **({"lora": file} if "lora" in stage else {part: file})
    )
    own = {"prior_guidance": 1.0, "prior_steps": 2, "schedule": "turbo", "sampler": "ddim"}
    expected = own if part == "prior" else {"decoder_guidance": 1.0, "decoder_guidance_end": None, "decoder_steps": 1}
    shown = {**base.sampling.as_dict(), **{key: x for key, x in expected.items() if x is not None}}
    assert {key: x for key, x in pipe.sampling.as_dict().items() if key not in ("width", "height")} == {
        key: x for key, x in shown.items() if key not in ("width", "height")
    }
    assert pipe.sampling.updated(decoder_guidance=2.0, decoder_steps=3).decoder_scales() == [2.0, 2.0, 2.0]
    before, after = (getattr(one, part).state_dict() for one in (base, pipe))
    assert any(not torch.equal(x, after[key]) for key, x in before.items())
    if "lora" in stage:
        assert describe_lora(file).sampling == expected
        pipe.unload_lora()
        assert pipe.sampling == base.sampling


@pytest.mark.parametrize("stage", STAGES)
def test_the_card_names_what_was_distilled(
    stage: str, config: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    text = (export_run(trained(stage).parent, [], tmp_path / "export") / "README.md").read_text("utf-8")
    part, times = ("decoder", "[0.95, 0.0]") if "decoder" in stage else ("prior", "[1.0, 0.5, 0.0]")
    settings = "schedule turbo, sampler ddim, prior_steps 2" if part == "prior" else "decoder_steps 1"
    assert settings in text.replace("\\", "") and "| Teacher | tiny.safetensors |" in text
    assert "None" not in text
    assert "| Guidance of the teacher | 2.0 |" in text and "| Steps of the teacher for each | 2 |" in text
    assert (f"pipeline(..., timesteps={times}, guidance_scale=1.0)" in text) == (part == "prior")
    student = build_stage(stage, read_config(config, [f"run='{config.parent}'", *EXTRA.get(stage, ())]))
    expected = f"pipeline(..., {part}_timesteps={times}, {part}_guidance_scale=1.0)"
    assert card.diffusers_call(student, WHOLE) == expected


@pytest.mark.long
def test_sample_grids_show_the_teacher_with_its_steps_beside_the_student(config: Path, tmp_path: Path) -> None:
    stage = DistillStage(read_config(config, [f"run='{tmp_path}'"]))
    validation = stage.dataset.preview_images()
    assert validation is not None
    with torch.no_grad():
        images, teacher, student = stage.samples(stage.net.eval(), validation)
    assert images.shape == teacher.shape == student.shape
    assert not torch.equal(teacher, student)  # of the same weights
    stage.distill = DistillConfig(2.0, 20)
    with torch.no_grad():
        _, again, same = stage.samples(stage.net, validation)
    assert torch.equal(again, teacher) and not torch.equal(same, student)


def test_a_teacher_comes_before_other_weights_to_start_from_and_is_counted_once(
    config: Path, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = write_tiny_bundle(tmp_path / "earlier.safetensors")
    changes = [f"run='{tmp_path}'", f"start='{start.as_posix()}'"]
    assert build_stage("distill", read_config(config, changes)).bases == [bundle.as_posix(), start.as_posix()]
    student = build_stage("distill-lora", read_config(config, changes[:1]))
    networks = (student.net, *(x for x in student.frozen if x is not student.teacher))  # type: ignore[attr-defined]
    total = sum(p.numel() for network in networks for p in network.parameters())
    with caplog.at_level(logging.INFO):
        report_start(student, LoopConfig(steps=4, batch=2, lr=1e-3), 0, 1)
    assert f"of {total / 1e6:.4g} M parameters" in caplog.text


@pytest.mark.parametrize(
    ("stage", "change", "fact"),
    [
        ("distill-lora", "lora.text_targets=['q_proj']", "text_targets"),
        ("distill", "distill.guidance=0.5", r"\[distill\] guidance .*0\.5"),
        ("distill", "distill.noised=0.5", r"\[distill\] .*noised"),  # of Stage B only
        ("decoder-distill", "noise.weight=v", "noise"),
    ],
)
def test_a_mistake_is_named_before_the_training(
    stage: str, change: str, fact: str, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=fact):
        run(stage, config, [f"run='{tmp_path / 'run'}'", change])
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_processes_train_what_one_trains(config: Path, tmp_path: Path) -> None:
    """Each step runs the network twice before its gradients are averaged."""
    one, two = ([f"run='{tmp_path / name}'", "lora.rank=2", "train.batch=4"] for name in ("one", "two"))
    run("distill-lora", config, one)
    changes = [*two, "train.batch=2"]
    launch(
        "-m", "wuerstchen_core", "train", "distill-lora", "--config", str(config), *(f"--set={x}" for x in changes)
    )  # fmt: skip
    trained, apart = (ema_of(tmp_path / name / "distill-lora") for name in ("one", "two"))
    assert_near_states(trained, apart, 2e-5)
