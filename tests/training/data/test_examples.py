"""What is done with each example: mirrored pictures, and captions that are drawn, shuffled and completed."""

from __future__ import annotations

import io
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.picture_folders import Files, picture, shard, write_folder
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.caption_edits import CaptionConfig
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.held_out import ValidationConfig
from wuerstchen_core.training.data.loading import BatchLoader, IndexedLoader
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.rng import StepRandom

TAGS = "fox, snow, red fur, night"
KINDS = ["folder", "shards", "stream"]


def half_white() -> bytes:
    """Returns a picture whose left half is white, and whose right half is black."""
    image = Image.new("L", (64, 64))
    image.paste(255, (0, 0, 32, 64))
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


FILES = {
    "1.png": half_white(), "1.txt": TAGS.encode(), "2.png": half_white(), "2.txt": b"one\ntwo\nthree",
}  # fmt: skip


def opened(
    root: Path,
    kind: str = "folder",
    batch: int = 4,
    rank: int = 0,
    world: int = 1,
    files: Files = FILES,
    **options: Any,
) -> BatchLoader:
    if kind == "folder":
        source = str(write_folder(root / "pictures", files))
    else:
        if kind == "stream":
            pytest.importorskip("webdataset")
        (root / "a.tar").write_bytes(shard(files))
        source = str(root / "a.tar") if kind == "shards" else f"pipe:cat {root}/a.tar"
    table = {"source": source, "buckets": [[64, 64]], "workers": 0, "allow_pipe": True, **options}
    config = from_table(ImageDataConfig, table, "data")
    return open_loader(config, batch=batch, seed=3, cache=root, rank=rank, world=world)


def read(loader: BatchLoader, steps: int, start: int = 0) -> tuple[list[bool], list[str]]:
    """Returns which pictures are mirrored, and the captions."""
    batches = list(itertools.islice(loader.batches(start), steps))
    whole = [image for batch in batches for image in batch.images]
    assert all(torch.equal(image[:, :, :32], 255 - image[:, :, 32:]) for image in whole)
    return [not image[0, 0, 0] for image in whole], [text for batch in batches for text in batch.captions]


@pytest.mark.parametrize("kind", KINDS)
def test_flips_depend_on_the_step_and_the_place_in_the_batch_alone(tmp_path: Path, kind: str) -> None:
    assert not any(read(opened(tmp_path, kind), 10)[0])
    assert all(read(opened(tmp_path, kind, flip=1.0), 10)[0])
    flips, captions = read(opened(tmp_path, kind, flip=0.3), 25)
    assert 0.2 < sum(flips) / len(flips) < 0.4 and captions == read(opened(tmp_path, kind), 25)[1]
    if kind == "stream":
        return
    assert read(opened(tmp_path, kind, flip=0.3), 18, 7)[0] == flips[28:]
    halves = [read(opened(tmp_path, kind, 2, rank, 2, flip=0.3), 25)[0] for rank in (0, 1)]
    assert [flip for i in range(0, 50, 2) for half in halves for flip in half[i : i + 2]] == flips


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_several_captions_as_one_example(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    texts = read(opened(tmp_path, kind, captions="random"), 30)[1]
    counts = {text: texts.count(text) for text in ("one", "two", "three")}
    assert texts.count(TAGS) == 60 == sum(counts.values()) and min(counts.values()) > 12
    assert read(opened(tmp_path, kind), 30)[1].count(TAGS) == 30
    if kind != "stream":
        assert read(opened(tmp_path, kind, captions="random"), 20, 10)[1] == texts[40:]
        assert "one of which is drawn" in caplog.text


def test_all_captions_that_may_be_drawn_are_in_the_fingerprint(tmp_path: Path) -> None:
    loaders = [opened(tmp_path, captions="random")]
    (tmp_path / "pictures" / "2.txt").write_text("one\ntwo\n3")
    table = {"source": str(tmp_path / "pictures"), "buckets": [[64, 64]], "workers": 0}
    for options in ({"captions": "random"}, {"captions": "each"}, {"captions": "random", "flip": 0.5}):
        config = from_table(ImageDataConfig, {**table, **options}, "data")
        loaders.append(open_loader(config, batch=4, seed=3, cache=tmp_path))
    assert len({loader.fingerprint() for loader in loaders}) == 4


def test_tags_are_shuffled_and_left_out() -> None:
    uses = [(0, step, slot) for step in range(50) for slot in range(4)]
    shuffled = [CaptionConfig(shuffle_tags=True, keep_tags=1).edit(TAGS, use) for use in uses]
    assert {tuple(sorted(text.split(", "))) for text in shuffled} == {("fox", "night", "red fur", "snow")}
    assert {text.split(", ")[0] for text in shuffled} == {"fox"} and len(set(shuffled)) == 6
    dropped = [CaptionConfig(tag_dropout=0.25, keep_tags=1).edit(TAGS, use).split(", ") for use in uses]
    assert 0.2 < 1 - sum(len(tags) - 1 for tags in dropped) / 600 < 0.3
    assert all([tag for tag in TAGS.split(", ") if tag in tags] == tags and tags[0] == "fox" for tags in dropped)
    both = [CaptionConfig(shuffle_tags=True, tag_dropout=0.25, keep_tags=1).edit(TAGS, use) for use in uses]
    assert [set(text.split(", ")) for text in both] == [set(tags) for tags in dropped]


@pytest.mark.parametrize(
    ("options", "caption", "expected"),
    [
        ({}, " a  b ,c", " a  b ,c"),
        ({"shuffle_tags": True}, "a,b ,", "a,b ,"),  # without a use
        ({"trigger_word": "sks fox"}, "in snow", "sks fox, in snow"),
        ({"trigger_word": "sks fox"}, "an SKS Fox in snow", "an SKS Fox in snow"),
        ({"trigger_word": "sks fox"}, "sks foxes", "sks fox, sks foxes"),
        ({"trigger_word": "sks fox"}, "", "sks fox"),
        ({"caption_prefix": "a drawing of", "caption_suffix": "on paper"}, "a fox", "a drawing of a fox on paper"),
        ({"caption_prefix": "sks art of", "trigger_word": "sks"}, "a fox", "sks art of a fox"),
    ],
)
def test_edits_that_are_the_same_at_every_use(options: dict[str, Any], caption: str, expected: str) -> None:
    assert CaptionConfig(**options).edit(caption) == expected
    if "shuffle_tags" not in options:
        assert CaptionConfig(**options).edit(caption, (0, 1, 2)) == expected


def test_other_separators() -> None:
    edited = {CaptionConfig(shuffle_tags=True, tag_separator=" | ").edit("a, b | c", (0, x)) for x in range(9)}
    assert edited == {"a, b | c", "c | a, b"}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_without_captions(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """They have the trigger word alone; without one, they are skipped."""
    caplog.set_level(logging.INFO)
    files = {name: content for name, content in FILES.items() if name != "1.txt"}
    options: dict[str, Any] = {"kind": kind, "files": files, "bad_share": 0.9, "captions": "random"}
    assert set(read(opened(tmp_path, **options), 5)[1]) == {"one", "two", "three"}
    texts = read(opened(tmp_path, trigger_word="sks", **options), 10)[1]
    assert texts.count("sks") == 20 and set(texts) == {"sks", "sks, one", "sks, two", "sks, three"}
    assert ("1 of 2 captions are missing" in caplog.text) == (kind != "stream")


def test_no_caption_is_shown_where_there_is_none(tmp_path: Path) -> None:
    loader = opened(tmp_path, files={"1.png": half_white()}, captions="each")
    assert isinstance(loader, IndexedLoader) and list(loader.captions_from(3)) == []


def test_keys_of_one_source_alone() -> None:
    own = [{"source": "a", "flip": 0.5, "mask": "alpha"}, {"source": "b", "trigger_word": "cat", "caption_prefix": ""}]
    own += [{"source": "c", "regularisation": True}]
    data = {"sources": own, "trigger_word": "fox", "caption_prefix": "a photo of", "shuffle_tags": True}
    examples = from_table(ImageDataConfig, data, "data").examples
    assert [(x.flip, x.mask, x.trigger_word, x.caption_prefix, x.shuffle_tags) for x in examples] == [
        (0.5, "alpha", "fox", "a photo of", True), (0.0, "", "cat", "", True), (0.0, "", "", "a photo of", True),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unmasked_weight"):
        from_table(ImageDataConfig, {"sources": [{"source": "a", "unmasked_weight": 0.5}]}, "data")


@pytest.mark.parametrize("table", [{"tag_separator": " "}, {"keep_tags": 1}, {"tag_separator": ";"}, {"flip": 1.5}])
def test_keys_that_can_have_no_effect(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(table))):
        from_table(ImageDataConfig, {"source": "x", **table}, "data")


def test_what_is_held_out_and_shown_is_not_random(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pictures", FILES | {"3.png": picture(3), "3.txt": b"three"})
    table = {"source": str(source), "buckets": [[64, 64]], "workers": 0, "captions": "random", "flip": 1.0}
    table |= {"shuffle_tags": True, "trigger_word": "sks", "crop": "random"}
    dataset = FileDataset(table, validation=ValidationConfig(fraction=0.6))
    dataset.start_reading(0, "", batch=1, seed=0, cache=tmp_path, rank=0, world=1)
    first = {f"sks, {text}" for text in (TAGS, "one", "three")}
    assert dataset.held_out == 2 and dataset.examples == 1
    for _, batch, size in dataset.held_out_batches(1):
        assert set(batch.captions) < first and batch.images[0, 0, 0, 0] in (255, 3) and size == 1
    assert (previews := dataset.preview_images()) is not None
    assert set(previews.captions(torch.tensor([0]), StepRandom(0, 0, 1))) < first
