"""ComfyUI's Torch Compile Model node before our samplers: same latents, and few compilations for many sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import TINY
from inside_samplers import STAGES

from tools.comfyui.client import Inside, Install, run_inside

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.long)])
def inside(
    request: pytest.FixtureRequest, install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Inside:
    folder = tmp_path_factory.mktemp("compile")
    return run_inside(install, "inside_compile.py", folder, checkpoints / TINY, request.param)


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_model_gives_the_same_latents(inside: Inside, stage: str) -> None:
    """Also if weights are patched after compiling."""
    tensors, facts = inside
    for name in (name for name in facts if name.startswith(stage)):
        plain = tensors[f"plain/{name}"]
        assert (tensors[f"compiled/{name}"] - plain).abs().max() < 1e-4 * plain.std(), name  # observed 2e-5
        assert facts[name] >= 1, f"nothing was compiled for {name}"
    first = tensors[f"plain/{stage} first"]
    assert (tensors[f"plain/{stage} patched"] - first).abs().max() > 1e-2 * first.std()


@pytest.mark.parametrize("inside", ["eager"], indirect=True)
def test_the_third_size_needs_no_compilation(inside: Inside) -> None:
    """torch compiles one graph for the first size and one for all others when it sees the second."""
    facts = inside[1]
    runs = ("first", "again", "other size", "third size", "patched")
    assert [facts[f"prior {run}"] for run in runs] == [1, 1, 2, 2, 2]
    assert [facts[f"decoder {run}"] for run in ("first", "again", "patched")] == [1, 1, 1]
