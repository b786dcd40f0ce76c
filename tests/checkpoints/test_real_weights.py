"""Tests released files in a folder: WUERSTCHEN_WEIGHTS=FOLDER python -m pytest tests -m real"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS, PARTS_OF, Part, build_part, read_part
from wuerstchen_core.checkpoints.components import text_width
from wuerstchen_core.checkpoints.inspect import describe
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.release import release_of

FOLDER = os.environ.get("WUERSTCHEN_WEIGHTS", "")
FILES = (
    sorted(f for f in Path(FOLDER).rglob("*") if f.suffix in (".safetensors", ".pt", ".bin") and "-of-0" not in f.name)
    if FOLDER
    else []
)
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="set WUERSTCHEN_WEIGHTS to a folder with released files"),
    pytest.mark.skipif(bool(FOLDER) and not FILES, reason=f"{FOLDER} holds no weight file"),
]


def part_names(file: Path) -> list[str]:
    """Returns the names of the parts in a file."""
    return list(open_source(file, headers_only=True).networks)


@pytest.mark.parametrize("file", FILES or [Path()], ids=str)
def test_a_file_is_recognised_and_loads_strictly(file: Path) -> None:
    names = part_names(file)
    assert names, "\n".join(describe(file).lines())
    for name in names:
        network = build_part(read_part(file, name))  # raises if a key is missing, unexpected or mis-shaped
        for key, x in network.state_dict().items():
            assert x.isfinite().all(), f"{name}: {key}"


def complete_model(release: str) -> dict[str, Path]:
    """Returns the first file for each part of a release, with text towers as wide as each stage needs."""
    parts: dict[str, list[tuple[Path, Part]]] = {name: [] for name in PARTS}
    for file in FILES:
        for name in part_names(file):
            parts[name].append((file, read_part(file, name)))
    chosen: dict[str, Path] = {}
    for name in PARTS_OF[release]:
        for file, part in parts[name]:
            width = text_width(part.params)
            if (
                name.endswith("text_encoder")
                or name in chosen
                or (name == "prior" and release_of(part.params) != release)
            ):
                continue
            chosen[name] = file
            tower = f"{name.removeprefix('token_')}_text_encoder"
            for text_file, text_part in parts[tower] if width is not None else ():
                if text_part.params.width == width:
                    chosen.setdefault(tower, text_file)
    return chosen


@pytest.mark.parametrize("release", ["v1", "v2"])
def test_a_complete_model_generates(release: str, tmp_path: Path) -> None:
    model = complete_model(release)
    missing = [name for name in PARTS_OF[release] if name not in model and name != "image_encoder"]
    if missing:
        pytest.skip(f"the folder is no complete {release}: it lacks {', '.join(missing)}")
    pipe = WuerstchenPipeline.load(model)
    assert all(isinstance(getattr(pipe, name), nn.Module) for name in model) and pipe.version == release
    sampling = pipe.sampling.updated(width=512, height=512)
    prior_text, decoder_text = pipe.encode_text(["a red apple on a wooden table, photograph"])
    features = pipe.sample_prior(prior_text, sampling, seed=1)
    assert features.isfinite().all() and features.std() > 0.2
    latents = pipe.sample_decoder(features, decoder_text, sampling, seed=1)
    assert latents.isfinite().all()
    image = pipe.decode(latents)[0]
    assert image.size == (512, 512) and np.asarray(image).std() > 5
    image.save(tmp_path / "image.png")
