"""Masks of the loss: which file belongs to which picture, and the weights of its pixels."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from helpers.picture_folders import picture, shard, table, write_folder
from PIL import Image

from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.masks import MaskConfig, match_masks
from wuerstchen_core.training.data.shards import ShardSource
from wuerstchen_core.training.data.source import ImageSource


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def grey(level: int, width: int = 64, height: int = 64) -> bytes:
    return png(Image.new("L", (width, height), level))


def masks_of(source: ImageSource, kind: str = "file") -> dict[str, int | None]:
    """Returns the level of the mask of each picture that has one, by name."""
    masks = {name.rpartition(":")[2]: source.mask(index, kind) for index, name in enumerate(source.names)}
    assert [mask is not None for mask in masks.values()] == [source.has_mask(i, kind) for i in range(len(source))]
    return {name: mask.getpixel((9, 9)) for name, mask in masks.items() if mask is not None}  # type: ignore[misc]


NAMES = {  # mask → its picture
    "a_mask": "a", "b-masklabel": "b", "mask_c": "c", "d.mask": "d", "cats_mask/1": "cats/1", "x/mask/e": "x/e",
    "masks/x/f": "x/f", "images/masks/g_mask": "images/g", "one/masks/h": "one/images/h",
    "other/masks/h": "other/images/h",
}  # fmt: skip


def test_the_picture_of_a_mask() -> None:
    images = {*NAMES.values(), "cats/2", "lone/i", "two/i", "j"}
    unmatched = ["a_depth", "conditioning/j", "masks/i", "masks/k", "l_mask"]
    expected = {image: mask for mask, image in NAMES.items()}
    assert match_masks([*NAMES, *unmatched, "a_mask2"], images) == expected


def test_masks_beside_pictures(tmp_path: Path) -> None:
    files = {f"{name}.png": picture(1) for name in "abcde"} | {f"{name}.txt": b"x" for name in "abcde"}
    files |= {"a_mask.png": grey(10), "b-masklabel.png": grey(20), "mask/c.png": grey(30), "far/any.png": grey(40)}
    files |= {"e_depth.png": grey(50), "metadata.jsonl": table(file_name="d.png", mask="far/any.png", text="d")}
    source = FolderSource([write_folder(tmp_path, files)], use_masks=True)
    assert masks_of(source) == {"a.png": 10, "b.png": 20, "c.png": 30, "d.png": 40}
    assert len(source) == 5 and source.left_out["masks and conditioning images"] == 1
    unused = FolderSource([tmp_path])
    assert masks_of(unused) == {} and unused.left_out["masks and conditioning images"] == 5
    digests = [source.records["digest"].tolist(), unused.records["digest"].tolist()]
    (tmp_path / "a_mask.png").write_bytes(grey(11))
    changed = FolderSource([tmp_path], use_masks=True).records["digest"].tolist()
    assert changed[0] != digests[0][0] and changed[1:] == digests[0][1:]
    assert FolderSource([tmp_path]).records["digest"].tolist() == digests[1] and digests[1][4] == digests[0][4]


def test_masks_in_shards(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "a.mask.png": grey(10), "a.depth.png": grey(20), "a.txt": b"x", "b.png": picture(2)}
    (tmp_path / "a.tar").write_bytes(shard(files | {"b.txt": b"one\ntwo"}))
    for _ in range(2):  # the second time from the index
        source = ShardSource([tmp_path / "a.tar"], tmp_path, use_masks=True)
        assert masks_of(source) == {"a": 10} and len(source) == 3
        assert source.left_out["masks and conditioning images"] == 1
        assert ShardSource([tmp_path / "a.tar"], tmp_path).left_out["masks and conditioning images"] == 2


def test_the_opacity_of_pictures(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (64, 64), (1, 2, 3, 70))
    files = {"a.png": png(clear), "a.txt": b"x", "b.png": picture(2), "b.txt": b"y", "b_mask.png": grey(10)}
    for source in (
        FolderSource([write_folder(tmp_path / "in", files)]),
        ShardSource([write_folder(tmp_path, {"a.tar": shard(files)}) / "a.tar"], tmp_path),
    ):
        assert masks_of(source, "alpha") == {
            next(name for name in source.names if "a" in name.split(":")[-1]).split(":")[-1]: 70
        }


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (grey(9, 64, 60), "a.png.* 64x60 .* 64x64"),
        (png(Image.new("RGBA", (64, 64), (9, 9, 9, 9))), "a_mask.png.* transparent"),
        (b"no picture", "a_mask.png"),
    ],
)
def test_a_mask_that_cannot_be_used(tmp_path: Path, mask: bytes, message: str) -> None:
    files = {"a.png": picture(1), "a.txt": b"x", "a_mask.png": mask}
    with pytest.raises(ValueError, match=message):
        FolderSource([write_folder(tmp_path, files)], use_masks=True).mask(0, "file")


def test_the_weights_of_pixels() -> None:
    image = Image.new("L", (8, 4))
    image.paste(255, (0, 0, 2, 4))
    for normalize, scale in ((False, 1.0), (True, 1 / (0.25 + 0.75 * 0.2))):
        config = MaskConfig(mask="file", unmasked_weight=0.2, normalize_masks=normalize)
        weights = config.pixel_weights(image, (8, 4), "a")
        torch.testing.assert_close(weights[0], torch.tensor([1.0, 1.0, *6 * [0.2]]) * scale)
        for white in (Image.new("L", (8, 4), 255), None):
            assert torch.equal(config.pixel_weights(white, (8, 4), "a"), torch.ones(4, 8))
    black = Image.new("L", (8, 4))
    torch.testing.assert_close(MaskConfig(mask="file").pixel_weights(black, (8, 4), "a"), torch.ones(4, 8))
    with pytest.raises(ValueError, match="a is black"):
        MaskConfig(mask="file", unmasked_weight=0.0).pixel_weights(black, (8, 4), "a")
    with pytest.raises(ValueError, match="unmasked_weight"):
        MaskConfig(unmasked_weight=0.5)
