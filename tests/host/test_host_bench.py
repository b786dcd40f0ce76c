"""`python -m tools.bench --comfyui` times the steps of every sampler in this ComfyUI. No time is asserted."""

from __future__ import annotations

import pytest
from helpers.tiny_bench import TINY, no_progress

from tools.bench import comfyui
from tools.bench.run import BenchConfig
from tools.comfyui.client import Install


@pytest.mark.newest
def test_each_way_of_sampling_is_timed(install: Install) -> None:
    config = BenchConfig(["prior", "decoder"], [128], dtypes=["fp32"], repeat=2, threads=1, networks=TINY)
    rows = comfyui.measure(install.root, config, no_progress)
    assert [(row["stage"], row["comfyui_dtype"]) for row in rows] == [("prior", "float32"), ("decoder", "float32")]
    for row in rows:
        assert list(row["ways"]) == ["core", "KSampler", "Würstchen Sampler", "Stable Cascade's layers"]
        for way in row["ways"].values():
            assert len(way["seconds"]) == 4 and 0 < min(way["seconds"]) <= way["median"] <= max(way["seconds"])
    assert len(comfyui.table(rows).splitlines()) == 2 + len(rows)
