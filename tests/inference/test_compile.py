"""`torch.compile` for the denoisers: few graphs for all sizes, equal pictures, and a fallback without a compiler."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import PROMPT, ROUNDING, pixels, run
from helpers.networks import NETWORKS
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from torch import nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.inference import pipeline
from wuerstchen_core.inference.compile import can_compile, compile_network
from wuerstchen_core.models.layers import FeedForwardBlock

SIZES = ((128, 128), (192, 192), (256, 128), (64, 192))
BLOCKS_B = 8  # graphs of Stage B (of v1 and of v2): its blocks without those that differ in their weights only
BLOCKS = BLOCKS_B + 2  # and of all networks: two blocks of the prior are like none of Stage B


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """A list for the graphs that `counting` compiles."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs: list[Any]) -> Callable[..., Any]:
    """Returns a compiler that only records its graphs."""

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture(params=[RuntimeError("no compiler"), FileNotFoundError("no folder")], ids=["compiler", "folder"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes torch.compile fail as without a compiler or a writable folder; returns its message."""

    def compiled(function: Any, **_: Any) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise request.param

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return str(request.param)


@pytest.mark.parametrize("release", ["v2", pytest.param("v1", marks=pytest.mark.long)])
def test_all_sizes_share_their_graphs(release: str, tmp_path: Path, graphs: list[Any]) -> None:
    """The first step of a prior compiles the graphs of all its steps."""
    bundle = write_tiny_bundle(tmp_path / "tiny.safetensors", release=release)
    plain, compiled = (WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32") for _ in range(2))
    compiled.compile(backend=counting(graphs))
    graphs.clear()  # of the trial
    options: dict[str, Any] = {"count": 2, "prior_steps": 2, "decoder_steps": 1}
    for width, height in SIZES:
        pictures = [pipe.generate(PROMPT, width=width, height=height, **options) for pipe in (compiled, plain)]
        assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).max() <= ROUNDING
        assert len(graphs) == BLOCKS, (width, height)


@pytest.mark.long
def test_a_single_picture_has_graphs_of_its_own(tmp_path: Path, graphs: list[Any]) -> None:
    """torch specialises on a batch of 1. Stage C, which is guided, sees every picture twice."""
    pipe = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "tiny.safetensors"), device="cpu", dtype="fp32")
    pipe.compile(backend=counting(graphs))
    graphs.clear()
    options: dict[str, Any] = {"prior_steps": 1, "decoder_steps": 1}
    for count, expected in ((2, BLOCKS), (1, BLOCKS + BLOCKS_B), (3, BLOCKS + BLOCKS_B)):
        for width, height in SIZES:
            pipe.generate(PROMPT, width=width, height=height, count=count, **options)
            assert len(graphs) == expected, (count, width, height)


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


def test_every_thread_compiles_all_blocks(graphs: list[Any]) -> None:
    """torch's default limit is 8 graphs per block, and a changed limit applies to the thread that changed it."""
    network = nn.Sequential(*(FeedForwardBlock(c) for c in range(8, 20))).requires_grad_(False).eval()
    compile_network(network, backend=counting(graphs))

    def call() -> None:
        for block in network:
            block(torch.zeros(2, block.channelwise[0].in_features, 3, 4))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
    assert len(graphs) == len(network)


def test_copies_are_uncompiled_and_use_their_own_weights(graphs: list[Any]) -> None:
    network = NETWORKS["prior"]
    module = network.perturbed().requires_grad_(False)
    compile_network(module, backend=counting(graphs))
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    with torch.inference_mode():
        before = network.call(module, *network.inputs())
        graphs.clear()
        for one in copies:
            torch.testing.assert_close(network.call(one, *network.inputs()), before)
            one.get_parameter("blocks.0.channelwise.0.weight").mul_(2)
            assert (network.call(one, *network.inputs()) - before).abs().max() > 0.01
    assert graphs == []


def test_hooks_of_a_compiled_block_run(graphs: list[Any]) -> None:
    block, x = FeedForwardBlock(8).requires_grad_(False).eval(), torch.ones(2, 8, 3, 4)
    compile_network(block, backend=counting(graphs))
    plain = block(x)
    hook = block.register_forward_hook(lambda module, inputs, out: out + 1)
    assert torch.equal(block(x), plain + 1)
    hook.remove()
    assert torch.equal(block(x), plain) and len(graphs) == 1


def test_a_compiled_network_can_be_compiled_as_a_whole(graphs: list[Any]) -> None:
    network = NETWORKS["prior"]
    module, whole = network.perturbed().requires_grad_(False), []
    compile_network(module, backend=counting(graphs))
    with torch.inference_mode():
        plain = network.call(network.perturbed(), *network.inputs())
        out = network.call(torch.compile(module, backend=counting(whole)), *network.inputs())
    torch.testing.assert_close(out, plain)
    assert whole and graphs == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "quick"}, "mode='quick': Unrecognized"),
        ({"backend": "inductr"}, "backend='inductr': Invalid"),
        ({"options": {"speed": 1}}, "options={'speed': 1}: Unexpected"),
        ({"fullgraf": True}, "fullgraf=True"),
    ],
)
def test_options_that_torch_does_not_know(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        can_compile("cpu", **options)
    assert words in str(error.value) and len(str(error.value)) < 300


def test_without_a_compiler_it_warns_and_generates(
    bundle: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("generate", PROMPT, "--model", bundle, "--output")
    assert run(*command, "plain.png") == 0
    assert caplog.messages == []
    assert run(*command, "compiled.png", "--compile") == 0
    [warning] = caplog.messages
    assert "torch.compile" in warning and broken in warning
    with Image.open("plain.png") as plain, Image.open("compiled.png") as compiled:
        assert plain.text == compiled.text and np.array_equal(plain, compiled)


def test_the_option_compiles_the_denoisers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(pipeline, "can_compile", lambda *_: True)
    monkeypatch.setattr(pipeline, "compile_network", compiled.append)
    pipe = WuerstchenPipeline.load(bundle, device="cpu", compile=True)
    assert compiled == [pipe.prior, pipe.decoder]
    WuerstchenPipeline.load(bundle, device="cpu")
    assert len(compiled) == 2
