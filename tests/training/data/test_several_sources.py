"""Several sources: how often an epoch has their images, exact resume, loss weights, and regularisation sets."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.picture_folders import examples, shard, write_folder
from helpers.tiny_model import write_tiny_bundle
from torch import Tensor

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.common.toml import write_toml
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams
from wuerstchen_core.training.config import INPUTS, read_config
from wuerstchen_core.training.data.epoch_order import EpochOrder
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.held_out import ValidationConfig
from wuerstchen_core.training.data.loading import IndexedLoader
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import build_stage
from wuerstchen_core.training.stages.losses import NoiseConfig, TokenNoiseConfig, noise_loss, squared_error, token_loss
from wuerstchen_core.training.stages.vqgan import Autoencoder

SHAPES = [[64, 64], [64, 128]]


def opened(sources: list[dict[str, Any]], root: Path, batch: int = 4, **options: Any) -> IndexedLoader:
    config = from_table(ImageDataConfig, {"sources": sources, "buckets": SHAPES, "workers": 0}, "data")
    loader = open_loader(config, batch=batch, cache=root / "index", **{"seed": 0, **options})
    assert isinstance(loader, IndexedLoader)
    return loader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders `own` (1 to 5, of which 4 and 5 are tall) and `base` (50 to 89), and the shard `more` (20 to 22)."""
    write_folder(tmp_path / "own", examples(range(1, 4)) | examples(range(4, 6), 64, 128))
    write_folder(tmp_path / "base", examples(range(50, 90)))
    (tmp_path / "more.tar").write_bytes(shard(examples(range(20, 23))))
    return tmp_path


def captions(loader: IndexedLoader, steps: int, start: int = 0) -> list[str]:
    return [text for batch in itertools.islice(loader.batches(start), steps) for text in batch.captions]


@pytest.mark.parametrize(("repeats", "epochs"), [((3.0, 1.0), 2), ((1.0, 0.25), 4), ((2.5, 0.5), 2)])
def test_an_epoch_has_images_as_often_as_their_repeats(repeats: tuple[float, float], epochs: int) -> None:
    each = np.repeat(repeats, (6, 8))
    order = EpochOrder([np.arange(14)], 1, 0, [each])
    assert order.images == round(6 * repeats[0] + 8 * repeats[1])
    indices = [int(order.batch_at(step)[1][0]) for step in range(epochs * order.images)]
    assert [Counter(indices)[i] for i in range(14)] == (epochs * each).tolist()
    assert len(set(order.substitutes(0, 0))) == 13  # and so this ends
    assert [int(order.batch_at(step)[1][0]) for step in (7, 3)] == [indices[7], indices[3]]
    same = EpochOrder([np.arange(14)], 1, 0, [np.ones(14)])
    assert all(same.batch_at(i)[1] == EpochOrder([np.arange(14)], 1, 0).batch_at(i)[1] for i in range(30))


def test_folders_and_shards_are_joined_and_resume_exactly(root: Path) -> None:
    sources = [
        {"source": str(root / "own"), "repeats": 4},
        {"source": str(root / "more.tar"), "weight": 0.5},
        {"source": str(root / "base"), "repeats": 0.1},
    ]
    loader = opened(sources, root)
    assert loader.order.images == 4 * 5 + 3 + 4
    seen = captions(loader, 8)
    counts = Counter(captions(loader, 28))  # more than four epochs
    assert all(counts[f"picture {i}"] >= 16 for i in range(1, 6))
    assert sum(counts[f"picture {i}"] > 0 for i in range(50, 90)) >= 16
    assert captions(opened(sources, root), 5, 3) == seen[12:]
    batch = next(opened(sources, root).batches())
    assert batch.weights.tolist() == [0.5 if text[8:] in ("20", "21", "22") else 1.0 for text in batch.captions]
    assert len({opened(sources[:number], root).fingerprint() for number in (2, 3)}) == 2
    assert opened([{**sources[0], "repeats": 5}], root).fingerprint() != opened(sources[:1], root).fingerprint()


def test_a_regularisation_set_balances_the_others_and_is_not_held_out(root: Path) -> None:
    base = {"source": str(root / "base"), "regularisation": True, "weight": 0.5}
    own = {"source": str(root / "own"), "repeats": 2}
    loader = opened([own, base], root, validation=ValidationConfig(0.5))
    held = [int(index) for part in loader.held_out for index in part]
    assert held and all(loader.source.origins[index] == 0 for index in held)
    assert loader.order.images == 4 * (5 - len(held))
    dataset = FileDataset({"sources": [own, base], "buckets": SHAPES, "workers": 0}, validation=ValidationConfig(0.5))
    dataset.start_reading(0, "", batch=8, seed=0, cache=root, rank=0, world=1)
    weights = [dataset.loss_weights(dataset.sample_batch(None)) for _ in range(4)]  # type: ignore[arg-type]
    assert all(x is not None and x.shape == (8, 1, 1, 1) for x in weights)
    assert {x.item() for each in weights for x in each} == {1.0, 0.5}
    previews = dataset.preview_images()
    assert previews is not None and {int(text[8:]) for text in previews.texts} <= {1, 2, 3}
    for _, batch, _ in dataset.held_out_batches(4):
        assert (batch.weights == 1).all()
    unweighted = FileDataset({"source": str(root / "own"), "buckets": SHAPES, "workers": 0})
    assert unweighted.loss_weights(batch) is None


@pytest.mark.parametrize(
    "table",
    [
        {"sources": [{"source": "own", "regularisation": True}]},
        {"sources": [{"source": "own"}, {"source": "base", "regularisation": True, "repeats": 2}]},
        {"sources": [{"source": "own", "repeat": 2}]},
        {"sources": [{"source": "own", "repeats": 0}]},
        {"sources": [{"source": "own"}, {}]},
        {"sources": [{"source": "own"}, {"source": "https://example.com/a.tar"}]},
        {"sources": [{"source": "own"}], "source": "base"},
        {"sources": "own"},
        {"sources": [{"source": "own"}, {"source": "empty"}]},
    ],
)
def test_tables_that_cannot_work_are_refused(table: dict[str, Any], root: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(root)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"source"):
        config = from_table(ImageDataConfig, {"buckets": SHAPES, "workers": 0, **table}, "data")
        FileDataset({"buckets": SHAPES, "workers": 0, **table})
        open_loader(config, batch=2, seed=0, cache=root)


def test_a_resolved_table_is_read_back(tmp_path: Path) -> None:
    config = {"data": {"size": 64, "sources": [{"source": "a", "weight": 0.5}, {"source": ["b", "c"]}]}, "run": "x"}
    (tmp_path / "a.toml").write_text(write_toml(config))
    assert read_config(tmp_path / "a.toml", []) == config


@torch.no_grad()
def test_weights_are_factors_of_the_losses_of_their_samples() -> None:
    torch.manual_seed(0)
    x, y, t, weights = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4), torch.rand(3), torch.tensor([1.0, 0.5, 0.0])
    w = weights[:, None, None, None]
    logits, tokens, replaced = torch.rand(3, 8, 4, 4), torch.randint(8, (3, 4, 4)), torch.rand(3, 4, 4) < 0.5
    autoencoder = Autoencoder(VQGAN(VQGANParams(bottleneck_blocks=1, c_hidden=8, codebook_size=16)), True).eval()
    images = torch.rand(3, 3, 16, 16)

    def losses(i: slice, w: Tensor | None) -> list[Tensor]:
        return [
            squared_error(x[i], y[i], w),
            noise_loss(NoiseConfig(), x[i], y[i], t[i], w),
            token_loss(TokenNoiseConfig(), logits[i], tokens[i], replaced[i], t[i], None if w is None else w[..., 0]),
            autoencoder(images[i], len(images[i]), False, w),
        ]

    each = torch.tensor([losses(slice(i, i + 1), None) for i in range(3)])
    assert torch.allclose(torch.tensor(losses(slice(None), w)), (each * weights[:, None]).mean(0), rtol=1e-4)
    assert losses(slice(None), None)[0] == F.mse_loss(x, y)


@pytest.mark.parametrize("stage", ["vqgan", "encoder", "text", "decoder", "token-decoder", "prior"])
def test_the_weight_reaches_every_stage(stage: str, root: Path, bundle: Path, tmp_path: Path) -> None:
    """The loss of pictures of weight 0 is 0. Adapters and embeddings have the losses of their networks' stages."""
    model = str(write_tiny_bundle(tmp_path / "v1.safetensors", release="v1") if stage == "token-decoder" else bundle)
    config: dict[str, Any] = {"run": str(tmp_path), "start": model, "inputs": dict.fromkeys(INPUTS, model)}
    config |= {"vqgan": {"crop": 32, "margin": 8}} if stage == "vqgan" else {}
    losses = []
    for weight in (1.0, 0.0):
        own = {"source": str(root / "base"), "weight": weight}
        data = {"sources": [own], "size": 64, "multiple": 64, "workers": 0}
        if stage == "text" and weight != 1:
            with pytest.raises(ValueError, match="weight"):
                build_stage(stage, {**config, "data": data})
            return
        built = build_stage(stage, {**config, "data": data})
        built.dataset.start_reading(0, "", batch=4, seed=0, cache=tmp_path, rank=0, world=1)
        losses.append(built.loss(built.net, *built.batch(0, StepRandom(0, 0, 4))).item())
    assert losses[1] == 0 < losses[0]


def test_keys_of_all_sources_need_not_apply_to_each() -> None:
    table = {"mask": "file", "unmasked_weight": 0.2, "shuffle_tags": True, "keep_tags": 1}
    others = {"source": "b", "mask": "", "shuffle_tags": False}
    first, second = from_table(ImageDataConfig, {**table, "sources": [{"source": "a"}, others]}, "data").examples
    assert (first.unmasked_weight, first.keep_tags) == (0.2, 1) and not second.mask and second.keep_tags == 0
    with pytest.raises(ValueError, match="unmasked_weight"):
        from_table(ImageDataConfig, {"sources": [{**others, "unmasked_weight": 0.3}]}, "data")


def test_whole_numbers_of_repeats_leave_fractions_to_a_regularisation_set(tmp_path: Path) -> None:
    for name, count in (("own", 12), ("set", 40)):
        write_folder(tmp_path / name, examples(range(count)))
    sources = [
        {"source": str(tmp_path / "own"), "repeats": 2},
        {"source": str(tmp_path / "set"), "regularisation": True, "repeats": 1},
    ]
    config = from_table(ImageDataConfig, {"size": 64, "multiple": 64, "sources": sources}, "data")
    loader = open_loader(config, batch=4, seed=0, cache=tmp_path)
    assert isinstance(loader, IndexedLoader) and loader.order.images == 48
