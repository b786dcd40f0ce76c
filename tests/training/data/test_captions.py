"""Captions and tables of images: several captions, the tables of a folder, encodings."""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from helpers.picture_folders import examples, picture, shard, table, write_folder

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.loading import IndexedLoader
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.data.shards import ShardSource
from wuerstchen_core.training.data.source import ImageSource

SEVERAL = {
    "1.png": picture(1), "1.txt": b"\xef\xbb\xbfa red  apple\r\n\r\n a fruit \na red apple\n",
    "2.png": picture(2), "2.json": table(caption=["two", "zwei"], aesthetic=5.5),
    "3.png": picture(3), "3.caption": "drei\u2028three".encode(),
    "4.png": picture(4), "4.json": table(text="one\ntext", caption=""),
    "5.png": picture(5), "5.json": b'["five", "", "f\\u00fcnf"]', "6.png": picture(6), "6.json": b'"six"',
}  # fmt: skip
CAPTIONS = [(1, "a red apple"), (1, "a fruit"), (2, "two"), (2, "zwei"), (3, "drei"), (3, "three"), (4, "one text")]
CAPTIONS += [(5, "five"), (5, "fünf"), (6, "six")]


def read(source: ImageSource) -> list[tuple[int, str]]:
    """Returns the number and the caption of each example."""
    return [(source.image(i).getpixel((0, 0))[0], source.caption(i)) for i in range(len(source))]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_each_caption_of_an_image_is_an_example(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        source: ImageSource = FolderSource([write_folder(tmp_path, SEVERAL)])
    else:
        (tmp_path / "a.tar").write_bytes(shard(SEVERAL))
        ShardSource([tmp_path / "a.tar"], tmp_path)
        source = ShardSource([tmp_path / "a.tar"], tmp_path)  # from its index
    assert read(source) == CAPTIONS and len(set(source.names)) == len(CAPTIONS)
    assert source.records["aesthetic"].tolist()[2:4] == [5.5, 5.5]


def test_captions_that_are_not_needed_do_not_repeat_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = {"source": str(write_folder(tmp_path / "in", SEVERAL)), "buckets": [[64, 64]], "workers": 0}
    config = from_table(ImageDataConfig, data, "data")
    sizes = []
    for captions in (True, False):
        loader = open_loader(config, batch=1, seed=0, cache=tmp_path, captions=captions)
        assert isinstance(loader, IndexedLoader)
        sizes.append(sum(map(len, loader.order.members)))
    assert sizes == [10, 6] and "4 images have several captions" in caplog.text


def rows(root: Path, kind: str, values: list[dict[str, Any]]) -> Path:
    """Writes a table of a folder's images."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(table(**row) for row in values))
    elif kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    else:
        pytest.importorskip("pyarrow")
        pytest.importorskip("pandas").DataFrame(values).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_tables_of_a_folder(tmp_path: Path, kind: str) -> None:
    values = [
        {"file_name": "images/0.png", "text": 'one, "quoted"\nline', "aesthetic": 5.5},
        {"file_name": "images/0.png", "text": "two", "aesthetic": 5.5},
        {"file_name": "images/1.png", "text": None, "aesthetic": None},
    ]
    rows(tmp_path, kind, values)
    write_folder(tmp_path, {"images/0.png": picture(0), "images/0.txt": b"old", "images/1.png": picture(1)})
    write_folder(tmp_path, {"images/1.txt": b"from the file"})
    source = FolderSource([tmp_path])
    assert read(source) == [(0, 'one, "quoted" line'), (0, "two"), (1, "from the file")] and not source.bad
    assert source.records["aesthetic"].tolist()[:2] == [5.5, 5.5]
    assert source.left_out["texts without an image, or beside another"] == 1


def test_a_csv_file_without_pandas(tmp_path: Path) -> None:
    files = examples([1, 2]) | {"metadata.csv": b'file_name,caption,pwatermark\r\n001.png,"red, round",0.25\r\n'}
    source = FolderSource([write_folder(tmp_path, files)])
    assert read(source) == [(1, "red, round"), (2, "picture 2")] and source.records["watermark"][0] == 0.25


@pytest.mark.parametrize(
    "content",
    [
        'file_name;text\r\n1.png;"a cat; ""red"", small"\r\n2.png;\r\n',
        'File_Name\tText\n1.png\t"a cat; ""red"", small"\n2.png\t" "\n',
        '"file_name" , "text"\r\n"1.png", "a cat; ""red"", small"\r\n\r\n"2.png", ""\r\n',
        'text,file_name\r"a cat; ""red"", small",1.png\r,2.png\r',
    ],
)
def test_csv_files_of_other_programs(tmp_path: Path, content: str) -> None:
    """Semicolons, tabs, spaces after commas, headers in capitals, empty texts."""
    files = {"1.png": picture(1), "2.png": picture(2), "2.txt": b"own", "metadata.csv": content.encode("utf-8-sig")}
    source = FolderSource([write_folder(tmp_path, files)])
    assert read(source) == [(1, 'a cat; "red", small'), (2, "own")] and not source.bad


def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = FolderSource([write_folder(tmp_path, examples([1]) | {"metadata.parquet": b"PAR1"})])
    assert "metadata.parquet" in source.bad["metadata.parquet"] and len(source) == 1


NAMES = {
    "../images/0.png": "images/0.png", "./here.png": "meta/here.png", "sub\\x.png": "meta/sub/x.png",
    "a%20b.png": "meta/a b.png", "100%.png": "meta/100%.png", unicodedata.normalize("NFD", "füße.png"): "meta/füße.png",
    "../meta/./sub/../sub/y.png": "meta/sub/y.png",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [True, False])
def test_spellings_of_names_in_tables(tmp_path: Path, name: str, inside: bool) -> None:
    """Also if the folder is reached by a link, or the image is outside of the source."""
    path = Path(NAMES[name])
    files = {path.as_posix(): picture(1), path.with_suffix(".txt").as_posix(): b"old"}
    write_folder(tmp_path / "real", files | {"meta/metadata.jsonl": table(file_name=name, text="new")})
    os.symlink(tmp_path / "real", tmp_path / "link")
    source = FolderSource([tmp_path / "link" / ("" if inside else "meta")])
    assert read(source) == [(1, "new")] and not source.bad


def test_an_absolute_name_and_an_address(tmp_path: Path) -> None:
    write_folder(tmp_path, {"store/a b.png": picture(1), "store/c.png": picture(2)})
    store = tmp_path / "store"
    lines = [
        table(file_name=(store / "a b.png").as_uri(), text="one"),
        table(file_name=str(store / "c.png"), text="two"),
    ]
    source = FolderSource([write_folder(tmp_path / "in", {"metadata.jsonl": b"\n".join(lines)})])
    assert read(source) == [(1, "one"), (2, "two")]


def test_conditioning_images_of_a_table_are_left_out(tmp_path: Path) -> None:
    """As in diffusers' training of a ControlNet, and in datasets with several images a row."""
    files = {"a.png": picture(1), "b.png": picture(2), "c.png": picture(3), "d.png": picture(4)}
    lines = [
        table(file_name="a.png", conditioning_image="b.png", text="a"),
        table(image_file_name="c.png", mask_file_name="d.png", text="c"),
    ]
    source = FolderSource([write_folder(tmp_path, files | {"metadata.jsonl": b"\n".join(lines)})])
    assert read(source) == [(1, "a"), (3, "c")] and source.left_out["masks and conditioning images"] == 2


def encoded(encoding: str) -> dict[str, bytes]:
    files = {"1.png": picture(1), "1.txt": "ein Käse\n\n".encode(encoding), "2.png": picture(2)}
    tables = {
        "metadata.csv": "file_name,text\n2.png,zwölf\n",
        "sub/metadata.jsonl": '{"file_name": "3.png", "text": "ß"}',
    }
    return files | {"sub/3.png": picture(3)} | {name: text.encode(encoding) for name, text in tables.items()}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    source = FolderSource([write_folder(tmp_path, encoded(encoding))])
    assert read(source) == [(1, "ein Käse"), (2, "zwölf"), (3, "ß")] and not source.bad


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_named(tmp_path: Path, encoding: str) -> None:
    source = FolderSource([write_folder(tmp_path, encoded(encoding) | {"1.txt": "a cat".encode(encoding)})])
    with pytest.raises(ValueError, match=r"1\.png is UTF-16"):
        source.caption(0)
    assert len(source.bad) >= 2 and all("UTF-16" in reason for reason in source.bad.values())


def test_the_text_of_a_file_name_with_its_ending(tmp_path: Path) -> None:
    source = FolderSource([write_folder(tmp_path, {"a.b.png": picture(1), "a.b.png.txt": b"one", "c.png": picture(2)})])
    assert source.caption(0) == "one"
    with pytest.raises(ValueError, match=r"c\.png has no caption"):
        source.caption(1)
