"""`torch.compile` for the denoisers: few graphs for all sizes, the same pictures, and no harm where torch can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS
from painting import PROMPT, ROUNDING, pixels, run
from PIL import Image
from tiny_model import write_tiny_bundle

from wuerstchen_core import WuerstchenPipeline, stages
from wuerstchen_core.compiling import can_compile, compile_network

SIZES = ((128, 128), (192, 192), (256, 128), (64, 192))
BLOCKS_B = 8  # of either Stage B's blocks, those that differ in more than their weights,
BLOCKS = BLOCKS_B + 2  # and of the prior's those that Stage B has none of


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """The graphs that were compiled with `counting` of them."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs: list[Any]) -> Callable[..., Any]:
    """A compiler that compiles nothing and keeps what it is given."""

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler."""

    def compiled(function: Any, **_: Any) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.mark.parametrize("release", ["v2", pytest.param("v1", marks=pytest.mark.long)])
def test_all_sizes_share_their_graphs(release: str, tmp_path: Path, graphs: list[Any]) -> None:
    """And a prior's first step compiles what all steps need."""
    bundle = write_tiny_bundle(tmp_path / "tiny.safetensors", release=release)
    plain, compiled = (WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32") for _ in range(2))
    compiled.compile(backend=counting(graphs))
    graphs.clear()  # of the trial
    told: dict[str, Any] = {"count": 2, "prior_steps": 2, "decoder_steps": 1}
    for width, height in SIZES:
        pictures = [pipe.generate(PROMPT, width=width, height=height, **told) for pipe in (compiled, plain)]
        assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).max() <= ROUNDING
        assert len(graphs) == BLOCKS, (width, height)


@pytest.mark.long
def test_a_single_picture_has_graphs_of_its_own(tmp_path: Path, graphs: list[Any]) -> None:
    """Torch tells a size of 1 from all others. Stage C has two copies of the picture, guided as it is."""
    pipe = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "tiny.safetensors"), device="cpu", dtype="fp32")
    pipe.compile(backend=counting(graphs))
    graphs.clear()
    told: dict[str, Any] = {"prior_steps": 1, "decoder_steps": 1}
    for count, wanted in ((2, BLOCKS), (1, BLOCKS + BLOCKS_B), (3, BLOCKS + BLOCKS_B)):
        for width, height in SIZES:
            pipe.generate(PROMPT, width=width, height=height, count=count, **told)
            assert len(graphs) == wanted, (count, width, height)


def test_compiled_networks_keep_their_keys_and_follow_their_weights(graphs: list[Any]) -> None:
    network = NETWORKS["prior"]
    module, other = network.perturbed().requires_grad_(False), network.perturbed().requires_grad_(False)
    compile_network(module, backend=counting(graphs))
    assert list(module.state_dict()) == list(other.state_dict())
    with torch.inference_mode():
        before = network.call(module, *network.inputs())
        for one in (module, other):
            one.get_parameter("blocks.0.channelwise.0.weight").mul_(2)
        after = network.call(module, *network.inputs())
        torch.testing.assert_close(after, network.call(other, *network.inputs()))
    assert (after - before).abs().max() > 0.01 and len(graphs) == 3


def test_without_a_compiler_it_paints_and_says_so(
    bundle: Path, tmp_path: Path, broken: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not can_compile("cpu")
    command = ("generate", PROMPT, "--model", bundle, "--output")
    assert run(*command, "plain.png") == 0
    assert caplog.messages == []
    assert run(*command, "compiled.png", "--compile") == 0
    assert caplog.messages == ["torch.compile finds no compiler here: the networks run without it"]
    with Image.open("plain.png") as plain, Image.open("compiled.png") as compiled:
        assert plain.text == compiled.text and np.array_equal(plain, compiled)


def test_the_option_compiles_the_denoisers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(stages, "can_compile", lambda *_: True)
    monkeypatch.setattr(stages, "compile_network", compiled.append)
    pipe = WuerstchenPipeline.load(bundle, device="cpu", compile=True)
    assert compiled == [pipe.prior, pipe.decoder]
    WuerstchenPipeline.load(bundle, device="cpu")
    assert len(compiled) == 2
