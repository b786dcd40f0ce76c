"""Caches of latents, features and text states: training on one equals training on its images."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.picture_folders import examples, picture, table, write_folder
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import launch, read_log
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from wuerstchen_core.checkpoints import read_part, save_bundle
from wuerstchen_core.checkpoints.components import TOWERS
from wuerstchen_core.common.toml import toml_value
from wuerstchen_core.models.image_encoder import ImageEncoder
from wuerstchen_core.training.config import INPUTS
from wuerstchen_core.training.data import build_cache as caching
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.latent_cache import CacheSource, read_manifest
from wuerstchen_core.training.data.loading import IndexedLoader, ReadResult
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages import decoder, diffusion, prior
from wuerstchen_core.training.stages.networks import COMPUTED_BY

CONFIG = """
run = {run}
start = {bundle}
[inputs]
encoder = {bundle}
text = {bundle}
vqgan = {bundle}
[data]
source = {source}
size = 64
multiple = 64
workers = 0
[cache]
output = {output}
dtype = "fp32"
shard = 8
batch = 4
[train]
steps = 4
batch = 4
lr = 1e-3
log_every = 1
save_every = 4
sheet_every = 100
"""
TWO_BUCKETS = ["data.buckets=[[64, 64], [128, 64]]", "cache.shard=6"]
SQUARES, WIDE = range(0, 12), range(20, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve squares of 64 pixels and four images of twice the width, with captions."""
    root = tmp_path_factory.mktemp("pictures")
    return write_folder(root, {**examples(SQUARES), **examples(WIDE, 128, 64)})


def write_config(path: Path, bundle: Path, source: Path) -> Path:
    """Writes a configuration with its run and cache folders beside it."""
    names = {"run": path.parent / "run", "bundle": bundle, "source": source, "output": path.parent / "cache"}
    text = CONFIG.format(**{name: json.dumps(value.as_posix()) for name, value in names.items()})
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, bundle: Path, folder: Path) -> Path:
    return write_config(tmp_path / "config.toml", bundle, folder)


@pytest.fixture(scope="module")
def cached_config(tmp_path_factory: pytest.TempPathFactory, bundle: Path, folder: Path) -> Path:
    """A configuration whose cache exists: all images in two buckets, without the images themselves."""
    path = write_config(tmp_path_factory.mktemp("cached") / "config.toml", bundle, folder)
    make_cache(path, TWO_BUCKETS)
    return path


def losses(stage: str, config: Path, *changes: str) -> list[float]:
    """Trains in a folder of its own and returns the losses."""
    overrides = [*changes, f"run='{config.parent / str(hash((stage, *changes)))}'"]
    return [row["loss"] for row in read_log(run(stage, config, overrides).parent)]


def on_cache(config: Path) -> str:
    return f"data.source='{config.parent / 'cache'}'"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar*")}


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a cache by shard and file name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".safetensors"):
                    found[f"{path.name}:{member.name}"] = next(iter(load(tar.extractfile(member).read()).values()))
    return found


def fail(*_: Any) -> None:
    raise AssertionError("a network was loaded")


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_training_on_a_cache_equals_training_on_its_images(
    config: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, at equal batch sizes. No network is loaded or run for what is cached."""
    overrides = ["noise.text_drop=0.0"]
    before = losses(stage, config, *overrides)
    make_cache(config, [])
    for module in (diffusion, decoder, prior):
        for name in ("encode_features", "encode_latents", "encode_text", "load_frozen"):
            monkeypatch.setattr(module, name, fail, raising=False)
    assert losses(stage, config, *overrides, on_cache(config)) == before and len(before) == 4


def test_shapes_dropped_captions_and_half_precision(cached_config: Path) -> None:
    """Squares and wide images come in the same order; a bf16 cache gives nearly the same losses."""
    overrides = [*TWO_BUCKETS, "noise.text_drop=0.5", "train.steps=6"]
    before = losses("decoder", cached_config, *overrides)
    assert losses("decoder", cached_config, *overrides, on_cache(cached_config)) == pytest.approx(before, rel=1e-5)
    half = cached_config.parent / "half"
    make_cache(cached_config, [*TWO_BUCKETS, f"cache.output='{half}'", 'cache.dtype="bf16"'])
    after = losses("decoder", cached_config, *overrides, f"data.source='{half}/{{00000..00002}}.tar'")
    assert after == pytest.approx(before, rel=0.02) and after != before


def test_a_cache_has_the_same_held_out_images(config: Path, tmp_path: Path) -> None:
    """A picture is held out with all its captions, from two buckets."""
    captions = {f"{number:03d}.txt": b"one\ntwo" for number in range(0, 24, 2)}
    root = write_folder(tmp_path / "several", {**examples(SQUARES), **examples(WIDE, 128, 64), **captions})
    overrides = [*TWO_BUCKETS, "validation.fraction=0.3", "noise.text_drop=0.0", f"data.source='{root}'"]
    make_cache(config, overrides)

    def validation(*changes: str) -> list[float]:
        folder = run("prior", config, [*overrides, *changes, f"run='{tmp_path / str(len(changes))}'"]).parent
        return [row["validation"] for row in read_log(folder) if "validation" in row]

    before = validation()
    assert validation(on_cache(config)) == pytest.approx(before, rel=1e-5) and len(before) == 2


def test_mirrored_pictures_masks_and_captions_are_cached(config: Path, tmp_path: Path) -> None:
    """What a cache lacks is refused. The regularisation set has no trigger word."""
    root = write_folder(tmp_path / "pictures", examples(range(9)))
    for number in range(9):
        image = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(image).save(root / f"{number:03d}.png")
        Image.fromarray(image[..., 0]).save(root / f"{number:03d}_mask.png")
    (root / "003.txt").write_text("one\ntwo")
    other = write_folder(tmp_path / "other", examples(range(30, 35)))
    sources = f"data.sources=[{{source='{root}', mask='file', flip=0.5}}, {{source='{other}', regularisation=true}}]"
    plain = ["noise.text_drop=0.0", "noise.drop=0.0", sources, "data.source=", "data.trigger_word='sks'"]
    overrides = [*plain, "data.captions='random'", "train.steps=5"]
    before = losses("decoder", config, *overrides)
    make_cache(config, plain)
    assert losses("decoder", config, *overrides, on_cache(config)) == pytest.approx(before, rel=1e-5)
    assert len(set(before)) == 5
    manifest = read_manifest(config.parent / "cache")

    def dataset(**changes: Any) -> FileDataset:
        rows = [{"source": str(root), "mask": "file", "flip": 0.5}, {"source": str(other), "regularisation": True}]
        table = {"source": str(config.parent / "cache"), "sources": rows, "trigger_word": "sks", **changes}
        return FileDataset({**table, "size": 64, "multiple": 64, "workers": 0}, fingerprint_of=manifest.networks.get)

    dataset().map_captions(list)
    for changes, word in (
        ({"trigger_word": "cat"}, "trigger word"),
        ({"tag_dropout": 0.5}, "tag_dropout"),
        ({"sources": [{"source": str(root), "mask": "alpha"}, {"source": str(other)}]}, "masks"),
    ):
        with pytest.raises(ValueError, match=word):
            dataset(**changes).map_captions(list)
    make_cache(config, ["cache.what=['features']", f"data.source='{root}'", f"cache.output='{tmp_path / 'flat'}'"])
    manifest = read_manifest(tmp_path / "flat")
    for key, value in {"flip": 0.1, "mask": "file"}.items():
        with pytest.raises(ValueError, match=key):
            dataset(source=str(tmp_path / "flat"), sources=[], **{key: value})
    features = dataset(source=str(tmp_path / "flat"), sources=[], shuffle_tags=True)
    features.map_images("features", fail)
    features.map_captions(list)  # text is not cached, so captions may change
    features.start_reading(0, "", batch=4, seed=0, cache=tmp_path, rank=0, world=1)
    assert all(text.startswith("sks, ") for text in features.sample_batch(StepRandom(0, 0, 4)).captions)


def test_a_cache_of_several_sources_has_their_repeats_and_weights(config: Path, folder: Path, tmp_path: Path) -> None:
    """These may differ from those when the cache was made; the sources themselves may not."""
    other = write_folder(tmp_path / "other", examples(range(30, 35)))

    def sources(*names: Path, **values: Any) -> str:
        rows = [f"{{source = '{name.as_posix()}'}}" for name in names[:-1]]
        rows.append(toml_value({"source": names[-1].as_posix(), **values}))
        return f"data.sources=[{', '.join(rows)}]"

    plain = [*TWO_BUCKETS, "noise.text_drop=0.0", "train.steps=6"]
    weighted = [*plain, sources(folder, other, repeats=2, weight=0.5)]
    before = losses("prior", config, *weighted, "data.source=")
    make_cache(config, [*plain, sources(folder, other, regularisation=True), "data.source="])
    assert losses("prior", config, *weighted, on_cache(config)) == pytest.approx(before, rel=1e-5)
    for wrong in ([], [sources(other, folder)]):
        with pytest.raises(ValueError, match="other"):
            losses("prior", config, *plain, *wrong, on_cache(config))


def test_tokens_follow_from_latents(tmp_path: Path, folder: Path) -> None:
    config = write_config(
        tmp_path / "config.toml", write_tiny_bundle(tmp_path / "v1.safetensors", release="v1"), folder
    )
    make_cache(config, [])
    overrides = ["noise.text_drop=0.0"]
    assert losses("token-decoder", config, *overrides, on_cache(config)) == losses("token-decoder", config, *overrides)


def test_images_are_cached_on_request(config: Path, folder: Path) -> None:
    """With images there are sample grids, stages can train on pixels, and missing tensors are computed."""
    make_cache(config, ['cache.what=["features"]', "cache.pictures=true"])
    overrides = ["noise.text_drop=0.0", "train.sheet_every=4"]
    assert losses("decoder", config, *overrides, on_cache(config)) == losses("decoder", config, *overrides)
    folder = config.parent / str(hash(("decoder", *overrides, on_cache(config))))
    with Image.open(folder / "decoder" / "sheet-000004.png") as sheet:
        assert sheet.getpixel((64, 64)) == (0, 100, 200)
    crop = ["vqgan.crop=32", "vqgan.margin=8"]
    assert losses("vqgan", config, *crop, on_cache(config)) == losses("vqgan", config, *crop)


def test_a_stopped_cache_resumes(cached_config: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing shards are not computed again, and no shard is incomplete."""
    whole, folder = shards(cached_config.parent / "cache"), config.parent / "cache"
    assert len(whole) == 3
    reads: list[int] = []
    read = IndexedLoader.read_example

    def counting(loader: IndexedLoader, result: ReadResult, index: int, *rest: Any) -> Any:
        reads.append(index)
        if len(reads) == stop:
            raise KeyboardInterrupt
        return read(loader, result, index, *rest)

    monkeypatch.setattr(IndexedLoader, "read_example", counting)
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        make_cache(config, TWO_BUCKETS)
    assert shards(folder) == {"00000.tar": whole["00000.tar"]} and reads[:6] == list(range(6))
    make_cache(config, TWO_BUCKETS)
    assert shards(folder) == whole and sorted(reads[9:]) == list(range(6, 16))
    with pytest.raises(ValueError, match="networks, shard"):
        make_cache(config, [*TWO_BUCKETS, 'cache.what=["text"]', "cache.shard=9"])


def test_changed_images_are_refused(cached_config: Path, folder: Path, tmp_path: Path) -> None:
    """The same images in another folder are accepted."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    overrides = [*TWO_BUCKETS, f"data.source='{moved}'"]
    make_cache(cached_config, overrides)
    (moved / "003.png").write_bytes(picture(4))
    with pytest.raises(ValueError, match="cache .*data"):
        make_cache(cached_config, overrides)


def test_two_processes_compute_the_same_cache_as_one(cached_config: Path, config: Path) -> None:
    overrides = [part for change in TWO_BUCKETS for part in ("--set", change)]
    launch("-m", "wuerstchen_core", "train", "cache", "--config", str(config), *overrides)
    one, two = (tensors(path.parent / "cache") for path in (cached_config, config))
    assert one.keys() == two.keys() and len(one) == 3 * 16
    for key, x in one.items():  # rounding differs in a launched process
        torch.testing.assert_close(two[key], x)


def test_filters_apply_to_a_cache(tmp_path: Path, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores and the original size are cached; images of no bucket's size are rejected."""
    files = {f"{i}.png": picture(i, 64 + i, 64) for i in range(6)}
    files |= {f"{i}.json": table(caption=f"no {i}", AESTHETIC_SCORE=i) for i in range(6)}
    source = write_folder(tmp_path / "scored", files)
    make_cache(config, [f"data.source='{source}'", 'cache.what=["text"]', "data.min_aesthetic=1"])
    data = ImageDataConfig(
        source=str(config.parent / "cache"), size=64, multiple=64, workers=0, min_aesthetic=2.0, max_side=68
    )
    with caplog.at_level(logging.INFO):
        loader = open_loader(data, batch=3, seed=0, cache=tmp_path, images=False)
    assert "3 images" in caplog.text and "1 of low aesthetic score, 1 too large" in caplog.text
    assert set(next(loader.batches()).captions) == {"no 2", "no 3", "no 4"}
    with pytest.raises(ValueError, match="5 cached in other sizes"):
        open_loader(replace(data, size=128, min_aesthetic=None, max_side=None), batch=3, seed=0, cache=tmp_path)


def test_bad_images_are_skipped_and_named(
    tmp_path: Path, config: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    files = {**examples(range(24)), "005.png": picture(5)[:90], "007.txt": b"\xff"}
    overrides = [f"data.source='{write_folder(tmp_path / 'some', files)}'", 'cache.what=["features"]']
    with caplog.at_level(logging.INFO):
        make_cache(config, [*overrides, "data.bad_share=0.1"])
    first, second, *_, done = [record.getMessage() for record in caplog.records if record.name.startswith("wuer")][-3:]
    assert "005.png" in first and "007.png" in second and "UTF-8" in second
    assert re.findall(r"\b\d+\b(?= images| bad| there)", done) == ["22", "2", "0"]
    source = CacheSource(sorted((config.parent / "cache").glob("*.tar")), tmp_path)
    assert [source.caption(i) for i in range(len(source))] == [f"picture {i}" for i in range(24) if i not in (5, 7)]
    with pytest.raises(ValueError, match="2 of 20 images .*bad_share = 0.05"):
        make_cache(config, [*overrides, f"cache.output='{tmp_path / 'strict'}'"])


def test_a_damaged_or_incomplete_cache_is_reported(
    cached_config: Path, config: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """A damaged tensor counts as a bad image; missing shards are counted."""
    make_cache(config, TWO_BUCKETS)
    folder = config.parent / "cache"
    (folder / "00002.tar").unlink()
    with tarfile.open(folder / "00001.tar") as tar:
        offset = tar.getmember("000000009.features.safetensors").offset_data
    with (folder / "00001.tar").open("rb+") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    with caplog.at_level(logging.WARNING):
        losses("prior", config, *TWO_BUCKETS, on_cache(config), "data.bad_share=0.5")
    assert "2 of 3 shards" in caplog.text
    assert "features of 00001.tar:000000009" in caplog.text


@pytest.mark.parametrize("name", COMPUTED_BY)
def test_another_network_is_refused(cached_config: Path, tmp_path: Path, bundle: Path, name: str) -> None:
    stage, part = COMPUTED_BY[name], INPUTS[COMPUTED_BY[name]]
    other = tmp_path / "other.safetensors"
    changed = read_part(bundle, part)
    key = next(key for key, x in changed.state_dict.items() if x.is_floating_point())
    changed.state_dict[key] = changed.state_dict[key] + 1
    names = TOWERS if part in TOWERS else (part,)
    save_bundle(other, dict.fromkeys(names, changed), {})
    with pytest.raises(ValueError, match=f"{name} .*another network"):
        losses("decoder", cached_config, *TWO_BUCKETS, on_cache(cached_config), f"inputs.{stage}='{other}'")


@pytest.mark.parametrize(
    ("stage", "what", "missing"),
    [("decoder", ["features", "text"], "no images.* latents:"), ("encoder", ["features"], "no images")],
)
def test_a_cache_without_the_needed_tensors_is_named(config: Path, stage: str, what: list[str], missing: str) -> None:
    make_cache(config, [f"cache.what={what}", "cache.shard=100"])
    with pytest.raises(ValueError, match=missing):
        losses(stage, config, on_cache(config))


MISTAKES = {
    'cache.what=["tokens"]': r"\[cache\] what .*latents.*tokens",
    "cache.what=[]": r"\[cache\] what .*latents.*\[\]",
    'cache.dtype="int8"': r"\[cache\] dtype .*bf16.*int8",
    "cache.shard=0": r"\[cache\] shard .* 1, got 0",
    "cache.batch=0": r"\[cache\] batch .* 1, got 0",
    "cache.size=1": r"\[cache\] .*\bsize\b.*output",
    "cache={}": r"\[cache\] .*output",
    "data=3": r"^data .*3",
    "data={}": r"\[data\] source",
    'data.crop="random"': r"\[data\] crop .*random",
    "data.tag_dropout=0.5": r"tag_dropout",
    "cash.output='x'": r"\bcash\b.*\bcache\b",
    'data.source="https://example.org/{0..1}.tar"': r"\[data\] source .*stream",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_in_the_table_are_named(config: Path, change: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[change]):
        make_cache(config, [change])


def test_a_cache_is_not_cached_nor_mixed_nor_cropped_again(cached_config: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\[data\] source .*cache already"):
        make_cache(cached_config, [on_cache(cached_config)])
    with pytest.raises(ValueError, match=r"\[data\] source .*cache and other images"):
        losses("prior", cached_config, f"data.source=['{cached_config.parent / 'cache'}', '{folder}']")
    with pytest.raises(ValueError, match=r"\[data\] crop .*random"):
        losses("prior", cached_config, on_cache(cached_config), 'data.crop="random"')


def test_tensors_that_are_not_finite_are_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow = ImageEncoder, lambda encoder, images: torch.full((len(images), 4, 2, 2), 1e6)
    monkeypatch.setitem(caching.ENCODERS, "features", overflow)
    with pytest.raises(ValueError, match="features .*fp16"):
        make_cache(config, ['cache.what=["features"]', 'cache.dtype="fp16"'])
    assert not shards(config.parent / "cache")


def test_resumed_exactly(cached_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a cache that is stopped between two checkpoints resumes exactly."""
    overrides = [*TWO_BUCKETS, on_cache(cached_config), "train.steps=6", "train.save_every=2"]
    whole = losses("prior", cached_config, *overrides)
    stopped = f"run='{cached_config.parent / 'stopped'}'"
    with monkeypatch.context() as patch:
        patch.setattr(FileDataset, "sample_batch", stop_at(FileDataset.sample_batch, 4))
        with pytest.raises(KeyboardInterrupt):
            run("prior", cached_config, [*overrides, stopped])
    after = [row["loss"] for row in read_log(run("prior", cached_config, [*overrides, stopped]).parent)]
    assert after == whole and np.isfinite(after).all()


def stop_at(sample: Any, step: int) -> Any:
    calls: list[None] = []

    def counting(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return sample(*arguments)

    return counting


def test_the_output_is_not_the_source_folder(config: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for output in ("", source / ".." / "pictures"):
        with pytest.raises(ValueError, match=r"\[cache\] output '.*'"):
            make_cache(config, [f"data.source='{source}'", f"cache.output='{output}'"])
    assert not list(source.iterdir())


def test_other_shards_are_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"shards .*\[cache\] output"):
        make_cache(config, [f"cache.output='{tmp_path / 'shards'}'"])
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000.tar"]
