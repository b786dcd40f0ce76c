"""Every node of ComfyUI from MODEL to MODEL works on Würstchen, or says why not. Writes docs/nodes.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bundles import TINY, V1
from inside_model_walk import FOREIGN_PATCHES, OTHER_FILES

from tools import DOCS, markdown_table
from tools.comfyui.client import Install, run_inside

pytestmark = pytest.mark.newest

Outcomes = dict[str, dict[str, dict[str, Any]]]  # by node and model

CHANGED = 1e-5  # relative change of the latents; compiling changes them by 1e-6

# Nodes that are not meant to change the image.
SPEED = {
    "ModelAttentionBackend",  # chooses the attention that computes the same
    "MultiGPU_WorkUnits",
    "SelectModelDevice",
    "TorchCompileModel",
}
NOTHING = {"wanBlockSwap"}  # ComfyUI's own node without a function

WORKS, SAME, WARNS, NO_EFFECT, REFUSED = "works", "works, same image", "warns", "no effect, says so", "refused"
OURS = "Würstchen"  # in every sentence of this pack's errors
TEMPLATE = Path(__file__).with_name("nodes.md.template")
COLUMNS = {"v2 C": "Stage C", "v2 B": "Stage B", "v1 C": "Stage C of v1"}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("walk")
    return run_inside(install, "inside_model_walk.py", folder, checkpoints / TINY, checkpoints / V1)[1]


@pytest.fixture(scope="module")
def nodes(inside: dict[str, Any]) -> Outcomes:
    return inside["nodes"]


def verdict(name: str, outcome: dict[str, Any]) -> str:
    """Returns how a node fares on one model; "silent", "raw error" or "not finite" is a fault."""
    if "error" in outcome:
        kind, _, text = outcome["error"].partition(": ")
        ours = kind in ("ValueError", "AttributeError") and (OURS in text or "Stage" in text)
        return REFUSED if ours and "\n" not in text else "raw error"
    if not outcome["finite"]:
        return "not finite"
    if outcome["change"] > CHANGED:
        return WARNS if outcome["said"] else WORKS
    if outcome["said"]:
        return NO_EFFECT
    return SAME if name in SPEED | NOTHING else "silent"


def test_every_node_works_or_says_why_not(nodes: Outcomes) -> None:
    faults = {
        f"{name} on {model}": (fault, outcome)
        for name, outcomes in nodes.items()
        for model, outcome in outcomes.items()
        if (fault := verdict(name, outcome)) in ("silent", "raw error", "not finite")
    }
    assert not faults
    assert len(nodes) > 60


def test_patches_of_other_families_are_named(inside: dict[str, Any]) -> None:
    assert set(inside["patches"]) == set(FOREIGN_PATCHES)
    for name, outcomes in inside["patches"].items():
        for outcome in outcomes.values():
            assert outcome["change"] == 0
            assert any(name in text for text in outcome["said"])


def test_patches_that_compute_the_same_change_nothing(inside: dict[str, Any]) -> None:
    """Also factors for both attentions against the same factors on their weights, and STG against passing values."""
    for changes in inside["neutral"].values():
        assert changes == pytest.approx(dict.fromkeys(changes, 0), abs=1e-5)  # observed 1e-6


def test_attention_patches_see_the_image_and_the_text(inside: dict[str, Any]) -> None:
    """The coarsest level of Stage B has 4x4 tokens."""
    for model, tokens in (("v2 C", 144), ("v2 B", 16), ("v1 C", 144)):
        shapes = [shape[1:] for shape in inside["shapes"][model]]
        assert sorted(shapes) == sorted([[tokens, tokens], [tokens, 77]])


def test_a_cache_that_skips_nothing_is_named(inside: dict[str, Any]) -> None:
    for outcome in inside["idle cache"].values():
        assert outcome["change"] == 0
        assert any("EasyCache" in text for text in outcome["said"])


def test_foreign_sigmas_and_guiders_are_named(inside: dict[str, Any]) -> None:
    for model, notices in inside["custom"].items():
        assert any("SDTurboScheduler" in text for text in notices["scheduler"])
        assert bool(notices["guider"]) == (model == "v2 B")  # Stage B's empty text has no Stage C latents


def test_windows_along_channels_and_missing_dimensions_are_refused(inside: dict[str, Any]) -> None:
    for outcomes in inside["windows"].values():
        assert {verdict("ContextWindowsManual", outcome) for outcome in outcomes.values()} == {REFUSED}


def test_notices_are_single_sentences(nodes: Outcomes) -> None:
    for outcomes in nodes.values():
        for outcome in outcomes.values():
            for text in outcome["said"]:
                assert "\n" not in text
                assert len(text) < 300


def test_the_page_is_up_to_date(nodes: Outcomes, install: Install) -> None:
    """Rewrites the page if it is not; an older ComfyUI than the page's does not."""
    path = DOCS / "nodes.md"
    before = path.read_text(encoding="utf-8")
    about = re.search(r"ComfyUI (\d+)\.(\d+)\.(\d+)", before)
    if about and [*map(int, install.version.split("."))] < [*map(int, about.groups())]:
        pytest.skip(f"the page is about {about[0]}")
    page = write_page(nodes, install.version)
    path.write_text(page, encoding="utf-8")
    assert page == before, f"{path.name} was rewritten: read and commit it"


def write_page(nodes: Outcomes, version: str) -> str:
    verdicts = {
        name: {model: verdict(name, out) for model, out in outcomes.items()} for name, outcomes in nodes.items()
    }
    counts = {model: Counter(found[model] for found in verdicts.values()) for model in COLUMNS}
    table = markdown_table(["Node", *COLUMNS.values()], [[name, *found.values()] for name, found in verdicts.items()])
    kinds = (WORKS, SAME, WARNS, NO_EFFECT, REFUSED)
    summary = markdown_table(
        ["", *COLUMNS.values()], [[kind, *(counts[model][kind] for model in COLUMNS)] for kind in kinds]
    )
    text = TEMPLATE.read_text(encoding="utf-8")
    values = {"version": version, "count": len(nodes), "summary": summary, "table": table}
    values["others"] = "\n".join(f"- {name}" for name in sorted(OTHER_FILES))
    return text.format(**values)
