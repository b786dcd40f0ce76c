"""`bench --comfyui`: every way walks its steps in this ComfyUI, and is told apart. No time is asserted."""

from __future__ import annotations

from helpers.tiny_bench import TINY, silent

from tools.bench import host
from tools.bench.run import Plan
from tools.comfyui.client import Install


def test_steps_of_every_way_are_timed(install: Install) -> None:
    plan = Plan(["prior", "decoder"], [128], dtypes=["fp32"], repeat=2, threads=1, networks=TINY)
    rows = host.measure(install.root, plan, silent)
    assert [(row["stage"], row["host_dtype"]) for row in rows] == [(s, "torch.float32") for s in ("prior", "decoder")]
    for row in rows:
        assert list(row["ways"]) == ["core", "KSampler", "Würstchen Sampler", "Stable Cascade's layers"]
        for way in row["ways"].values():
            assert len(way["seconds"]) == 4 and 0 < min(way["seconds"]) <= way["median"] <= max(way["seconds"])
        assert 0.5 < row["flops"]["Stable Cascade's layers"] / row["flops"]["ours"] < 2
    assert len(host.table(rows).splitlines()) == 2 + len(rows)
