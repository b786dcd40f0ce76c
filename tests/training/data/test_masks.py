"""Masks of the loss: which file belongs to which picture, and the weights of its pixels."""

from __future__ import annotations

import io
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.picture_folders import examples, picture, shard, table, write_folder
from helpers.tiny_model import write_tiny_bundle
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.config import INPUTS
from wuerstchen_core.training.data.companions import HINT_NAMES, MASK_NAMES, match_companions
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.masks import MaskConfig
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.data.shards import ShardSource
from wuerstchen_core.training.data.source import ImageSource
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import build_stage


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
    unmatched = ["a_depth", "a (control)", "conditioning/j", "masks/i", "masks/k", "l_mask"]
    expected = {image: mask for mask, image in NAMES.items()}
    assert match_companions([*NAMES, *unmatched, "a_mask2"], images, MASK_NAMES) == expected


def test_the_picture_of_a_hint() -> None:
    names = {
        "a.control": "a", "b_conditioning_image": "b", "c_depth": "c", "d (control)": "d", "e_seg2": "e",
        "conditioning_depth/f": "f", "controls/x/g": "x/g", "cats_control/1": "cats/1",
    }  # fmt: skip
    expected = {image: hint for hint, image in names.items()}
    unmatched = ["a_mask", "masks/f", "a_alpha", "control_a"]
    assert match_companions([*names, *unmatched], {*names.values()}, HINT_NAMES) == expected


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


STAGES = ["vqgan", "encoder", "decoder", "token-decoder", "prior", "text"]


@pytest.mark.parametrize("stage", STAGES)
def test_masks_weight_the_loss_of_every_stage(stage: str, bundle: Path, tmp_path: Path) -> None:
    """White masks change nothing; a mask and its inverse divide the loss. LoRAs and embeddings have the same losses."""
    model = str(write_tiny_bundle(tmp_path / "v1.safetensors", release="v1") if stage == "token-decoder" else bundle)
    config: dict[str, Any] = {"run": str(tmp_path), "start": model, "inputs": dict.fromkeys(INPUTS, model)}
    config |= {"vqgan": {"crop": 32, "margin": 8}} if stage == "vqgan" else {}
    config |= {"noise": {"places": 99}} if stage == "token-decoder" else {}
    grid = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    losses = []
    for name, mask in {"none": None, "white": grid | 255, "mask": grid, "inverse": 255 - grid}.items():
        files = {f"{number}.png": png(Image.fromarray(grid).convert("RGB")) for number in range(4)}
        files |= {f"{number}.txt": b"a word" for number in range(4)}
        files |= {f"{number}_mask.png": png(Image.fromarray(mask)) for number in range(4) if mask is not None}
        root = write_folder(tmp_path / name, files)
        data: dict[str, Any] = {"source": str(root), "size": 64, "multiple": 64, "workers": 0, "flip": 0.5}
        data |= {} if mask is None else {"mask": "file", "unmasked_weight": 0.0, "normalize_masks": False}
        if stage == "text" and mask is not None:
            with pytest.raises(ValueError, match="mask"):
                build_stage(stage, {**config, "data": data})
            return
        built = build_stage(stage, {**config, "data": data})
        built.dataset.start_reading(0, "", batch=4, seed=0, cache=tmp_path, rank=0, world=1)
        weights, *batch = built.batch(0, StepRandom(0, 0, 4))
        losses.append(built.loss(built.net, weights, *batch).item())
        if stage == "vqgan" and mask is grid:
            assert torch.equal(weights[:, 0], batch[0][:, 0])  # the crops of masks are those of the pictures
    assert losses[0] == losses[1] and min(losses) > 0.1 * losses[0]
    assert losses[2] + losses[3] == pytest.approx(losses[0], rel=1e-4) and losses[2] != losses[3]


@pytest.mark.parametrize("kind", ["folder", "shards", "stream"])
@pytest.mark.parametrize("mask", ["file", "alpha"])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(kind: str, mask: str, tmp_path: Path) -> None:
    """The pictures are white where their masks are, but for one without a mask, which counts whole."""
    files = {"0.png": png(Image.new("RGB", (160, 64), "white")), "0.txt": b"x"}
    for number in range(1, 5):
        columns = np.random.default_rng(number).integers(0, 2, 10, np.uint8) * 255
        image = Image.fromarray(np.tile(columns.repeat(16), (64, 1)))
        own = image.convert("RGB")
        if mask == "alpha":
            own.putalpha(image)
        files |= {f"{number}.png": png(own), f"{number}.txt": b"x", f"{number}.mask.png": png(image.resize((80, 32)))}
    if kind == "folder":
        source = str(write_folder(tmp_path / "in", files))
    else:
        if kind == "stream":
            pytest.importorskip("webdataset")
        source = str(write_folder(tmp_path, {"a.tar": shard(files)}) / "a.tar")
        source = source if kind == "shards" else f"pipe:cat {source}"
    data = {"source": source, "buckets": [[64, 64]], "workers": 0, "allow_pipe": True, "crop": "random", "flip": 0.5}
    data |= {"mask": mask, "unmasked_weight": 0.0, "normalize_masks": False, "bad_share": 0.9}
    loader = open_loader(from_table(ImageDataConfig, data, "data"), batch=1, seed=0, cache=tmp_path)
    for batch in itertools.islice(loader.batches(), 30):
        assert batch.pixel_weights is not None
        if mask == "file":
            error = (batch.images[:, 0] / 255 - batch.pixel_weights).abs()
            assert error.median() < 0.01 and error.mean() < 0.1  # differs at the borders of columns
        else:  # transparent parts are white: their weights are 0
            assert batch.images.min() == 255 and batch.pixel_weights.max() == 1


def test_masks_are_counted_and_at_least_one_must_exist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "in", {**examples(range(3)), "001-masklabel.png": grey(255)})
    data = {"source": str(root), "buckets": [[64, 64]], "workers": 0}
    with caplog.at_level(logging.INFO):
        open_loader(from_table(ImageDataConfig, {**data, "mask": "file"}, "data"), batch=1, seed=0, cache=tmp_path)
    assert "1 of 3 images have a mask" in caplog.text
    with pytest.raises(ValueError, match="none of 3 images"):
        open_loader(from_table(ImageDataConfig, {**data, "mask": "alpha"}, "data"), batch=1, seed=0, cache=tmp_path)
