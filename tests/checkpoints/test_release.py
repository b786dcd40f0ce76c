"""Tests the release of a CLIP-H prior: determined by the Stage B in its source, its checksum, or the user."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.layouts import State, stage_states
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import describe, load_prior, read_part, release
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.release import trained_sides, with_units
from wuerstchen_core.common.geometry import prior_side, size_note
from wuerstchen_core.models.prior import V1, PriorParams


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return stage_states()


@pytest.fixture
def ambiguous_prior(states: dict[str, State], tmp_path: Path) -> Path:
    save_file(states["first_prior"], tmp_path / "prior.safetensors")
    return tmp_path / "prior.safetensors"


def units(part: Any) -> tuple[float, float]:
    return part.params.feature_scale, part.params.feature_shift


V1_UNITS, V2_UNITS = (V1["feature_scale"], V1["feature_shift"]), (42.0, 1.0)


def test_v1_is_assumed_with_one_warning(ambiguous_prior: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert units(read_part(ambiguous_prior, "prior")) == V1_UNITS
    [line] = [record.getMessage() for record in caplog.records]
    assert str(ambiguous_prior) in line and '"v2"' in line and "\n" not in line


@pytest.mark.parametrize(("version", "expected"), [("v1", V1_UNITS), ("v2", V2_UNITS)])
def test_the_user_decides(
    ambiguous_prior: Path, version: str, expected: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert units(read_part(ambiguous_prior, "prior", version)) == expected
        network = load_prior(ambiguous_prior, version=version)
    assert (network.params.feature_scale, network.params.feature_shift) == expected
    assert not caplog.records
    with pytest.raises(ValueError, match="v3.*auto, v1, v2"):
        open_source(ambiguous_prior, version="v3")


@pytest.mark.parametrize(("published", "version", "expected"), [("v2", "auto", V2_UNITS), ("v1", "v2", V1_UNITS)])
def test_a_checksum_overrides_the_user(
    ambiguous_prior: Path, monkeypatch: pytest.MonkeyPatch, published: str, version: str, expected: tuple[float, float]
) -> None:
    size, checksum = ambiguous_prior.stat().st_size, hashlib.sha256(ambiguous_prior.read_bytes()).hexdigest()
    monkeypatch.setattr(release, "PUBLISHED", (((size, size), checksum[:8], published),))
    assert units(read_part(ambiguous_prior, "prior", version)) == expected
    monkeypatch.setattr(release, "PUBLISHED", (((size, size), "00000000", published),))
    assert units(read_part(ambiguous_prior, "prior", version)) == (V2_UNITS if version == "v2" else V1_UNITS)


def test_only_a_file_of_a_known_size_is_read_for_its_checksum(
    ambiguous_prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(release, "_sha256", lambda path, *_: read.append(path) or "")
    read_part(ambiguous_prior, "prior")
    size = ambiguous_prior.stat().st_size
    monkeypatch.setattr(release, "PUBLISHED", (((size, size), "00000000", "v2"),))
    describe(ambiguous_prior)
    assert not read
    read_part(ambiguous_prior, "prior")
    assert read == [ambiguous_prior]


@pytest.mark.parametrize(("stage_b", "expected"), [("token_decoder", V1_UNITS), ("decoder", V2_UNITS)])
def test_stage_b_in_the_same_file_decides(
    states: dict[str, State], tmp_path: Path, stage_b: str, expected: tuple[float, float]
) -> None:
    state = {f"prior.{key}": x for key, x in states["first_prior"].items()}
    state |= {f"{stage_b}.{key}": x for key, x in states[stage_b].items()}
    save_file(state, tmp_path / "bundle.safetensors")
    assert units(read_part(tmp_path / "bundle.safetensors", "prior")) == expected
    assert describe(tmp_path / "bundle.safetensors").version == ("v1" if expected == V1_UNITS else "v2")


def test_a_prior_of_width_1280_is_always_v2(states: dict[str, State], tmp_path: Path) -> None:
    save_file(states["prior"], tmp_path / "prior.safetensors")
    assert units(read_part(tmp_path / "prior.safetensors", "prior", "v1")) == V2_UNITS


def test_the_sides_of_training_images_are_the_releases_and_the_metadatas() -> None:
    small, at_256 = PriorParams(c=64, depth=2), {"sampling": {"width": 256, "height": 256}}
    assert trained_sides(small, {}) is None
    assert trained_sides(small, at_256) == (256, 256)
    assert trained_sides(small, {**at_256, "vocabulary": {"larger": [384, 512]}}) == (256, 512)
    assert trained_sides(PriorParams(), {}) == (1024, 1536)
    assert trained_sides(with_units(PriorParams(c_cond=1024), "v1"), {}) == (512, 512)
    assert trained_sides(PriorParams(), {"sampling": {"width": 768, "height": 768}}) == (768, 1536)


@pytest.mark.parametrize(
    ("trained", "width", "height", "sound"),
    [
        ((256, 256), 256, 256, True),
        ((256, 256), 256, 384, True),
        ((256, 256), 192, 192, True),
        ((256, 256), 384, 384, False),
        ((256, 256), 512, 512, False),
        ((256, 256), 128, 128, False),
        ((1024, 1536), 1024, 1024, True),
        ((1024, 1536), 1536, 1536, True),
        ((1024, 1536), 2048, 1024, True),
        ((1024, 1536), 512, 512, False),
        ((1024, 1536), 2048, 2048, False),
    ],
)
def test_sizes_near_the_training_images_are_sound(
    trained: tuple[float, float], width: int, height: int, sound: bool
) -> None:
    note = size_note(trained, prior_side(height), prior_side(width))
    assert (note is None) == sound
