"""What networks make of pictures, computed before a training: the same training, from shards without the pictures."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
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
from wuerstchen_core.checkpoints.source import TOWERS
from wuerstchen_core.training.data import build_cache as caching
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.latent_cache import CachedShards
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
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
SHAPES = ["data.buckets=[[64, 64], [128, 64]]", "cache.shard=6"]
SQUARES, WIDE = range(0, 12), range(20, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve squares of 64 pixels and four pictures of twice the width, with captions."""
    root = tmp_path_factory.mktemp("pictures")
    return write_folder(root, {**examples(SQUARES), **examples(WIDE, 128, 64)})


def write_config(path: Path, bundle: Path, source: Path) -> Path:
    """A configuration that works beside its file: runs in `run`, the cache in `cache`."""
    names = {"run": path.parent / "run", "bundle": bundle, "source": source, "output": path.parent / "cache"}
    text = CONFIG.format(**{name: json.dumps(value.as_posix()) for name, value in names.items()})
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, bundle: Path, folder: Path) -> Path:
    return write_config(tmp_path / "config.toml", bundle, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bundle: Path, folder: Path) -> Path:
    """A configuration whose cache is there: that of all pictures, in two buckets, without these."""
    path = write_config(tmp_path_factory.mktemp("made") / "config.toml", bundle, folder)
    make_cache(path, SHAPES)
    return path


def losses(stage: str, config: Path, *changes: str) -> list[float]:
    """Those of a run in a folder of its own."""
    told = [*changes, f"run='{config.parent / str(hash((stage, *changes)))}'"]
    return [row["loss"] for row in read_log(run(stage, config, told).parent)]


def cached(config: Path) -> str:
    return f"data.source='{config.parent / 'cache'}'"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar*")}


def tensors(folder: Path) -> dict[str, Tensor]:
    """What a cache keeps, by the shard and the file that it is in."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".safetensors"):
                    found[f"{path.name}:{member.name}"] = next(iter(load(tar.extractfile(member).read()).values()))
    return found


def load_nothing(*_: Any) -> None:
    raise AssertionError("a network was read")


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_training_on_a_cache_equals_the_one_on_its_pictures(
    config: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where networks see as many pictures at a time. What was cached is neither read nor computed again."""
    told = ["noise.text_drop=0.0"]
    before = losses(stage, config, *told)
    make_cache(config, [])
    for name in ("encode_features", "encode_latents", "encode_text"):
        monkeypatch.setattr(f"wuerstchen_core.training.stages.diffusion.{name}", load_nothing, raising=False)
        monkeypatch.setattr(f"wuerstchen_core.training.stages.decoder.{name}", load_nothing, raising=False)
    monkeypatch.setattr("wuerstchen_core.training.stages.diffusion.frozen", load_nothing)
    monkeypatch.setattr("wuerstchen_core.training.stages.decoder.frozen", load_nothing)
    assert losses(stage, config, *told, cached(config)) == before and len(before) == 4


def test_shapes_dropped_captions_and_half_precision(made: Path) -> None:
    """Squares and wide pictures in the order in which they would have come; what is kept in bf16 is nearly the same."""
    told = [*SHAPES, "noise.text_drop=0.5", "train.steps=6"]
    before = losses("decoder", made, *told)
    assert losses("decoder", made, *told, cached(made)) == pytest.approx(before, rel=1e-5)
    rough = made.parent / "rough"
    make_cache(made, [*SHAPES, f"cache.output='{rough}'", 'cache.dtype="bf16"'])
    after = losses("decoder", made, *told, f"data.source='{rough}/{{00000..00002}}.tar'")
    assert after == pytest.approx(before, rel=0.02) and after != before


def test_tokens_follow_from_latents(tmp_path: Path, folder: Path) -> None:
    config = write_config(
        tmp_path / "config.toml", write_tiny_bundle(tmp_path / "v1.safetensors", release="v1"), folder
    )
    make_cache(config, [])
    told = ["noise.text_drop=0.0"]
    assert losses("token-decoder", config, *told, cached(config)) == losses("token-decoder", config, *told)


def test_pictures_are_kept_where_it_is_asked_for(config: Path, folder: Path) -> None:
    """Then there are sheets, stages that learn of pixels, and what was not kept is computed."""
    make_cache(config, ['cache.what=["features"]', "cache.pictures=true"])
    told = ["noise.text_drop=0.0", "train.sheet_every=4"]
    assert losses("decoder", config, *told, cached(config)) == losses("decoder", config, *told)
    on_cache = config.parent / str(hash(("decoder", *told, cached(config))))
    with Image.open(on_cache / "decoder" / "sheet-000004.png") as sheet:
        assert sheet.getpixel((64, 64)) == (0, 100, 200)
    crop = ["vqgan.crop=32", "vqgan.margin=8"]
    assert losses("vqgan", config, *crop, cached(config)) == losses("vqgan", config, *crop)


def test_what_was_stopped_goes_on(made: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are there are not made again, and none is there in part."""
    whole, folder = shards(made.parent / "cache"), config.parent / "cache"
    assert list(whole) and len(whole) == 3
    reads: list[int] = []
    read = caching.read_example

    def watched(*given: Any) -> Any:
        reads.append(given[2])
        if len(reads) == stop:
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(caching, "read_example", watched)
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        make_cache(config, SHAPES)
    assert shards(folder) == {"00000.tar": whole["00000.tar"]} and reads[:6] == list(range(6))
    make_cache(config, SHAPES)
    assert shards(folder) == whole and sorted(reads[9:]) == list(range(6, 16))
    with pytest.raises(ValueError, match="was begun with other networks, shard: restore these, or give another output"):
        make_cache(config, [*SHAPES, 'cache.what=["text"]', "cache.shard=9"])


def test_other_pictures_of_the_same_names_are_refused(made: Path, folder: Path, tmp_path: Path) -> None:
    """A folder that moved goes on."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    told = [*SHAPES, f"data.source='{moved}'"]
    make_cache(made, told)
    (moved / "003.png").write_bytes(picture(4))
    with pytest.raises(ValueError, match="cache was begun with other data: restore these, or give another output"):
        make_cache(made, told)


def test_two_processes_make_what_one_makes(made: Path, config: Path) -> None:
    told = [part for change in SHAPES for part in ("--set", change)]
    launch("-m", "wuerstchen_core", "train", "cache", "--config", str(config), *told, by="accelerate")
    mine, theirs = (tensors(path.parent / "cache") for path in (made, config))
    assert mine.keys() == theirs.keys() and len(mine) == 3 * 16
    for key, x in mine.items():  # a launched process rounds otherwise
        torch.testing.assert_close(theirs[key], x)


def test_filters_and_sizes_hold_for_a_cache(tmp_path: Path, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores, and the size of the picture itself, are kept; what has another size than a bucket is left out."""
    files = {f"{i}.png": picture(i, 64 + i, 64) for i in range(6)}
    files |= {f"{i}.json": table(caption=f"no {i}", AESTHETIC_SCORE=i) for i in range(6)}
    source = write_folder(tmp_path / "scored", files)
    make_cache(config, [f"data.source='{source}'", 'cache.what=["text"]', "data.min_aesthetic=1"])
    data = {"source": str(config.parent / "cache"), "size": 64, "multiple": 64, "workers": 0}
    pictures = FileDataset({**data, "min_aesthetic": 2.0, "max_side": 68}, made_by=made_by(config))
    pictures.map_captions(load_nothing)
    with caplog.at_level(logging.INFO):
        pictures.start_reading(0, "", batch=3, seed=0, cache=tmp_path, rank=0, world=1)
    assert "3 pictures, left out 1 of low aesthetic score, 1 too large" in caplog.text
    assert set(pictures.sample_batch(StepRandom(0, 0, 3)).names) == {f"00000.tar:00000000{i}" for i in (2, 3, 4)}
    other = FileDataset({**data, "size": 128}, made_by=made_by(config))
    other.map_captions(load_nothing)
    with pytest.raises(ValueError, match="no picture is left of 5 that can be read: 5 cached in other sizes;"):
        other.start_reading(0, "", batch=3, seed=0, cache=tmp_path, rank=0, world=1)


def made_by(config: Path) -> Any:
    """The fingerprints of a cache's networks."""
    return json.loads((config.parent / "cache" / "cache.json").read_text("utf-8"))["networks"].__getitem__


def test_bad_pictures_are_left_out_and_named(
    tmp_path: Path, config: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    files = {**examples(range(24)), "005.png": picture(5)[:90], "007.txt": b"\xff"}
    told = [f"data.source='{write_folder(tmp_path / 'some', files)}'", 'cache.what=["features"]']
    with caplog.at_level(logging.INFO):
        make_cache(config, [*told, "data.bad_share=0.1"])
    assert "number 1 of the bad pictures: 005.png is cut short" in caplog.text
    assert "number 2 of the bad pictures: the caption of 007.png is not UTF-8" in caplog.text
    assert "22 pictures cached in" in caplog.text and "2 bad ones left out, 0 there already" in caplog.text
    source = CachedShards(sorted((config.parent / "cache").glob("*.tar")), tmp_path)
    assert [source.caption(i) for i in range(len(source))] == [f"picture {i}" for i in range(24) if i not in (5, 7)]
    with pytest.raises(ValueError, match=r"2 of 20 pictures could not be used, more than \[data\] bad_share = 0.05"):
        make_cache(config, [*told, f"cache.output='{tmp_path / 'strict'}'"])


def test_a_damaged_or_unfinished_cache_is_told(
    made: Path, config: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """A tensor that is none is a bad picture; shards that are not there yet are missed."""
    make_cache(config, SHAPES)
    folder = config.parent / "cache"
    (folder / "00002.tar").unlink()
    with tarfile.open(folder / "00001.tar") as tar:
        place = tar.getmember("000000009.features.safetensors").offset_data
    with (folder / "00001.tar").open("rb+") as file:
        file.seek(place)
        file.write(b"\xff" * 8)
    with caplog.at_level(logging.WARNING):
        losses("prior", config, *SHAPES, cached(config), "data.bad_share=0.5")
    assert "cache has 2 of its 3 shards: `train cache` makes the rest" in caplog.text
    assert "the features of 00001.tar:000000009 cannot be read" in caplog.text


@pytest.mark.parametrize("name", COMPUTED_BY)
def test_another_network_is_refused(made: Path, tmp_path: Path, bundle: Path, name: str) -> None:
    stage, part = COMPUTED_BY[name]
    other = tmp_path / "other.safetensors"
    changed = read_part(bundle, part)
    key = next(key for key, x in changed.state_dict.items() if x.is_floating_point())
    changed.state_dict[key] = changed.state_dict[key] + 1
    names = TOWERS if part in TOWERS else (part,)
    save_bundle(other, dict.fromkeys(names, changed), {})
    with pytest.raises(ValueError, match=f"^the {name} in .*cache are of another network than this run's: name that"):
        losses("decoder", made, *SHAPES, cached(made), f"inputs.{stage}='{other}'")


LACKING = {
    ("decoder", 'cache.what=["features", "text"]'): r"cache keeps neither latents nor pictures to compute them of: "
    'make it again by `train cache`, with "latents" among what is kept',
    ("encoder", 'cache.what=["features"]'): r"cache keeps no pictures, of which this stage learns: name these as",
}


@pytest.mark.parametrize(("stage", "what"), LACKING)
def test_what_a_cache_lacks_is_named(config: Path, stage: str, what: str) -> None:
    make_cache(config, [what, "cache.shard=100"])
    with pytest.raises(ValueError, match=LACKING[stage, what]):
        losses(stage, config, cached(config))


MISTAKES = {
    'cache.what=["tokens"]': r"^\[cache\] what must be some of latents, features, text, got tokens$",
    "cache.what=[]": r"^\[cache\] what must be some of .*, got none$",
    'cache.dtype="int8"': "int8",
    "cache.shard=0": r"^\[cache\] shard must be at least 1, got 0$",
    "cache.batch=0": r"^\[cache\] batch must be at least 1, got 0$",
    "cache.size=1": r"^\[cache\] has no key size: it takes output, what, dtype, ",
    "cache={}": r"^\[cache\] lacks output$",
    "data=3": r"^data is a table of keys, not 3$",
    "data={}": r"^\[data\] names no source of pictures to cache: the demo's own are kept in memory anyway$",
    'data.crop="random"': r"^\[data\] crop = \"random\" cannot be cached: leave it out, for crops at the centre$",
    "cash.output='x'": r"^the configuration has no place for cash: it takes run, start, inputs, data, cache, ",
    'data.source="https://example.org/{0..1}.tar"': r"^\[data\] source is a stream, which cannot be cached: download",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_in_the_table_are_named(config: Path, change: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[change]):
        make_cache(config, [change])


def test_a_cache_is_not_cached_nor_mixed_nor_cropped_again(made: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^\[data\] source is a cache itself: name the pictures that it was made of$"):
        make_cache(made, [cached(made)])
    with pytest.raises(ValueError, match=r"^\[data\] source names a cache and other pictures beside it: give the"):
        losses("prior", made, f"data.source=['{made.parent / 'cache'}', '{folder}']")
    with pytest.raises(ValueError, match=r'^\[data\] crop = "random" cannot be, since a cache keeps what was cropped'):
        losses("prior", made, cached(made), 'data.crop="random"')


def test_what_is_not_finite_is_not_kept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "encode_features", lambda encoder, images: torch.full((len(images), 4, 2, 2), 1e6))
    with pytest.raises(ValueError, match=r"^features are not finite in fp16: choose another dtype under \[cache\]$"):
        make_cache(config, ['cache.what=["features"]', 'cache.dtype="fp16"'])
    assert not shards(config.parent / "cache")


def test_resumed_exactly(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a cache that is stopped between two checkpoints goes on as if it had not been."""
    told = [*SHAPES, cached(made), "train.steps=6", "train.save_every=2"]
    whole = losses("prior", made, *told)
    stopped = f"run='{made.parent / 'stopped'}'"
    with monkeypatch.context() as patch:
        patch.setattr(FileDataset, "sample_batch", stop_at(FileDataset.sample_batch, 4))
        with pytest.raises(KeyboardInterrupt):
            run("prior", made, [*told, stopped])
    after = [row["loss"] for row in read_log(run("prior", made, [*told, stopped]).parent)]
    assert after == whole and np.isfinite(after).all()


def stop_at(pick: Any, step: int) -> Any:
    seen: list[None] = []

    def picked(*given: Any) -> Any:
        seen.append(None)
        if len(seen) == step:
            raise KeyboardInterrupt
        return pick(*given)

    return picked


def test_pictures_are_not_cached_among_themselves(config: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for output in ("", source / ".." / "pictures"):
        with pytest.raises(ValueError, match=r"^\[cache\] output '.*' is no place for a cache: name a new folder$"):
            make_cache(config, [f"data.source='{source}'", f"cache.output='{output}'"])
    assert not list(source.iterdir())


def test_shards_that_are_no_caches_are_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(
        ValueError, match=r"shards holds shards that are no cache's: give another output under \[cache\]"
    ):
        make_cache(config, [f"cache.output='{tmp_path / 'shards'}'"])
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000.tar"]
