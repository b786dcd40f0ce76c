"""Hugging Face datasets as a source: save_to_disk, Parquet, columns, damaged rows, exact resume; never the network."""

from __future__ import annotations

import itertools
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.picture_folders import examples, picture, write_folder

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.hf_datasets import is_dataset
from wuerstchen_core.training.data.loading import IndexedLoader
from wuerstchen_core.training.data.open import open_loader

datasets = pytest.importorskip("datasets")
Rows = dict[str, list[Any]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    used: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        used.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield
    assert used == []


def rows(numbers: range, **columns: list[Any]) -> Rows:
    images = [{"bytes": picture(number, 64 + 64 * (number % 2)), "path": None} for number in numbers]
    return {"image": images, "text": [f"picture {number}" for number in numbers], **columns}


def made(rows: Rows, **features: Any) -> Any:
    """A dataset in memory whose column "image" has images."""
    inferred = datasets.Dataset.from_dict(rows).features
    return datasets.Dataset.from_dict(rows, datasets.Features({**inferred, "image": datasets.Image(), **features}))


def opened(source: Path | list[Path], batch: int = 2, **options: Any) -> IndexedLoader:
    names = [str(path) for path in source] if isinstance(source, list) else str(source)
    table = {"source": names, "buckets": [[64, 64], [128, 64]], "workers": 0, **options}
    config = from_table(ImageDataConfig, table, "data")
    loader = open_loader(config, batch=batch, seed=0, cache=Path("unused"))
    assert isinstance(loader, IndexedLoader)
    return loader


def captions(loader: IndexedLoader, steps: int, start: int = 0) -> list[list[str]]:
    seen = []
    for batch in itertools.islice(loader.batches(start), steps):
        assert batch.captions == [f"picture {red}" for red in batch.images[:, 0, 0, 0].tolist()]
        seen.append(batch.captions)
    return seen


def test_saved_datasets_and_parquet_files_are_read_and_resume_exactly(tmp_path: Path) -> None:
    dataset = made(rows(range(8)))
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": made(rows(range(9, 11)))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, part in {"train-0": dataset.select(range(5)), "train-1": dataset.select(range(5, 8))}.items():
        part.to_parquet(tmp_path / "hub" / "data" / f"{name}.parquet")
    made(rows(range(9, 11))).to_parquet(tmp_path / "hub" / "data" / "test-0.parquet")
    whole = captions(opened(tmp_path / "saved"), 8)
    assert sorted(sum(whole[:4], [])) == [f"picture {number}" for number in range(8)]
    loaders = {
        "splits": opened(tmp_path / "splits"),
        "folder": opened(tmp_path / "hub", split="train"),
        "files": opened([tmp_path / "hub" / "data" / f"train-{number}.parquet" for number in (0, 1)], workers=1),
    }
    for loader in loaders.values():
        assert captions(loader, 5, 3) == whole[3:]
        assert loader.fingerprint() == opened(tmp_path / "saved").fingerprint()
    assert pickle.loads(pickle.dumps(loaders["files"].source)).caption(3) == "picture 3"
    assert opened(tmp_path / "splits", split="test").source.caption(1) == "picture 10"
    assert len(opened(tmp_path / "hub").source) == len(opened(tmp_path / "hub", split="train").source)  # the default
    for wrong in ({"split": "validation"}, {"split": "train", "subset": "small"}):
        with pytest.raises(ValueError, match=r"split|subset"):
            opened(tmp_path / "hub", **wrong)
    other = made(rows(range(8), text=["another"] * 8))
    other.save_to_disk(tmp_path / "other")
    assert opened(tmp_path / "other").fingerprint() != opened(tmp_path / "saved").fingerprint()


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    several = rows(range(4), aesthetic=[1.0, 6.0, 7.0, None], label=["a"] * 4, captions=[["one", "two"]] * 4)
    images = several["image"]
    several |= {"sample": [{"thumb": x, "text": f"small {i}"} for i, x in enumerate(images)]}
    types = {"sample": {"thumb": datasets.Image(), "text": datasets.Value("string")}}
    made(several, **types).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match=r"image, sample\.thumb"):
        opened(tmp_path / "a")
    nested = opened(tmp_path / "a", image_column="sample.thumb", caption_column="sample.text", min_aesthetic=5.0)
    assert {nested.source.caption(i) for i in nested.order.members[0].tolist()} == {"small 2"}
    assert nested.source.image(2).getpixel((0, 0)) == (2, 100, 200)
    assert opened(tmp_path / "a", image_column="image").source.caption(0) == "picture 0"
    lists = opened(tmp_path / "a", image_column="image", caption_column="captions").source
    assert len(lists) == 8 and [lists.caption(i) for i in (2, 3)] == ["one", "two"]
    for wrong in ({"image_column": "text"}, {"image_column": "image", "caption_column": "aesthetic"}):
        with pytest.raises(ValueError, match=r"column"):
            opened(tmp_path / "a", **wrong)
    image = {"bytes": picture(3), "path": "3.png"}
    for name, raw in {"img2dataset": {"jpg": [picture(3)]}, "plain": {"image": [image]}}.items():
        columns = {**raw, "caption": ["picture 3"], "hash": ["a"]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
        assert captions(opened(tmp_path / f"{name}.parquet", batch=1), 1) == [["picture 3"]]
    mixed = made(rows(range(3)) | {"thumb": [b""] * 3}, thumb=datasets.Value("binary"))
    mixed.save_to_disk(tmp_path / "mixed")
    assert opened(tmp_path / "mixed").source.image(2).getpixel((0, 0)) == (2, 100, 200)


def test_damaged_rows_are_named_and_counted(tmp_path: Path) -> None:
    damaged = rows(range(8))
    damaged["image"][2:5] = [None, {"bytes": b"GIF", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    damaged["image"][5] = {"bytes": picture(5, 128)[:-30], "path": None}  # noticed when it is needed
    damaged["text"][6] = None
    (tmp_path / "gone.png").touch()
    made(damaged).save_to_disk(tmp_path / "saved")
    (tmp_path / "gone.png").unlink()
    loader = opened(tmp_path / "saved", bad_share=1.0)
    assert list(loader.source.bad) == ["row 2", "row 3", "row 4"]
    assert {text for batch in captions(loader, 8) for text in batch} == {"picture 0", "picture 1", "picture 7"}
    made(rows(range(30), image=[None] * 30)).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="30 of 30"):
        opened(tmp_path / "bad")


def test_a_name_of_the_hub_is_opened_there_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append((*arguments, *options.values()))
        if arguments[0] == "owner/private":
            raise ConnectionError("https://store/file?signature=secret")
        return made(rows(range(3)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"split": "test", "subset": "small", "caption_column": "text"}
    loader = opened(Path("datasets:owner/name@abc"), **options)
    assert calls == [("owner/name", "small", "test", "abc")] and loader.source.caption(2) == "picture 2"
    with pytest.raises(ValueError, match="ConnectionError") as raised:
        opened(Path("datasets:owner/private"))
    assert "secret" not in str(raised.value)
    for name in ("owner/name", "owner/name.parquet"):
        with pytest.raises(ValueError, match="does not exist"):
            opened(Path(name))
    monkeypatch.setattr("wuerstchen_core.common.versions._version", {"datasets": "2.19.2"}.get)
    with pytest.raises(ValueError, match=r"2\.19\.2"):  # which runs code of datasets
        opened(Path("datasets:owner/name"))
    assert len(calls) == 2


def test_what_is_no_dataset(tmp_path: Path) -> None:
    """Parquet files beside images or shards belong to these, as those of img2dataset do."""
    folder = write_folder(tmp_path / "images", {**examples(range(3)), "00000.parquet": b""})
    assert not is_dataset([str(folder)]) and len(opened(folder).source) == 3
    with pytest.raises(ValueError, match="split"):
        opened(folder, split="train")
    made(rows(range(3))).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="Parquet"):
        is_dataset([str(tmp_path / "a.parquet"), str(folder)])
    with pytest.raises(ValueError, match=r"data\.sources"):
        is_dataset(["datasets:a/b", "datasets:c/d"])
    table = {"sources": [{"source": str(folder)}, {"source": str(tmp_path / "a.parquet"), "caption_column": "text"}]}
    config = from_table(ImageDataConfig, {**table, "buckets": [[64, 64]], "workers": 0}, "data")
    assert [part.caption_column for part in config.parts] == [None, "text"]
    assert len(open_loader(config, batch=2, seed=0, cache=tmp_path).source) == 6  # type: ignore[attr-defined]
