"""Random changes of colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.picture_folders import picture, shard, write_folder
from torch import Tensor

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data import colours
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.data.colours import LUMA, ColourConfig
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.open import configured_cache, open_loader

KEY = (3, 0, 0)
FILES = {"0.png": picture(20), "0.txt": b"a fox", "1.png": picture(40), "1.txt": b"a fox"}


def image() -> Tensor:
    return torch.randint(90, 150, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def largest(monkeypatch: pytest.MonkeyPatch, sign: int = 1, **options: float) -> Tensor:
    """Returns the image with the largest changes."""
    fixed = SimpleNamespace(uniform=lambda low, high, count: np.full(count, float(sign)))
    monkeypatch.setattr(colours, "generator", lambda key, purpose: fixed)
    return ColourConfig(**options).recoloured(image(), KEY).float()


def luma(x: Tensor) -> Tensor:
    return torch.einsum("c,chw->hw", torch.tensor(LUMA), x.float())


@pytest.mark.parametrize("sign", [-1, 1])
def test_each_change_does_what_its_name_says(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, change = image().float(), 0.25 * sign
    brighter = largest(monkeypatch, sign, brightness=0.25)
    torch.testing.assert_close(brighter, before * (1 + change), rtol=0, atol=0.51)
    contrast = largest(monkeypatch, sign, contrast=0.25)
    assert luma(contrast).mean().item() == pytest.approx(luma(before).mean().item(), abs=0.2)
    assert contrast.std().item() == pytest.approx((before - luma(before).mean()).std().item() * (1 + change), rel=0.01)
    saturated = largest(monkeypatch, sign, saturation=0.25)
    torch.testing.assert_close(luma(saturated), luma(before), rtol=0, atol=0.51)
    torch.testing.assert_close(
        saturated - luma(before), (before - luma(before)) * (1 + change), rtol=0, atol=0.51
    )  # fmt: skip


def test_a_third_of_the_circle_turns_red_to_green(monkeypatch: pytest.MonkeyPatch) -> None:
    red, green, blue = image().float()
    turned = largest(monkeypatch, hue=1 / 3)
    torch.testing.assert_close(turned, torch.stack([blue, red, green]), rtol=0, atol=0.51)


def test_changes_are_even_and_within_their_limits() -> None:
    grey = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    values = [int(ColourConfig(brightness=0.2).recoloured(grey, (0, step, 0))[0, 0, 0]) for step in range(400)]
    assert 80 <= min(values) < 82 and 118 < max(values) <= 120 and abs(np.mean(values) - 100) < 3


@pytest.mark.parametrize("kind", ["folder", "shards", "stream"])
def test_pictures_change_at_every_use_and_the_same_way_again(kind: str, tmp_path: Path) -> None:
    source = str(write_folder(tmp_path / "pictures", FILES))
    if kind != "folder":
        (tmp_path / "a.tar").write_bytes(shard(FILES))
        source = f"{tmp_path}/a.tar" if kind == "shards" else f"pipe:cat {tmp_path}/a.tar"
        pytest.importorskip("webdataset")

    def batches(**options: Any) -> list[Tensor]:
        table = {"source": source, "buckets": [[64, 64]], "workers": 0, "allow_pipe": True, **options}
        loader = open_loader(from_table(ImageDataConfig, table, "data"), batch=2, seed=3, cache=tmp_path)
        found = loader.batches(0)
        return [next(found).images for _ in range(2)]

    changed, again, plain = batches(saturation=0.9), batches(saturation=0.9), batches()
    assert all(torch.equal(one, other) for one, other in zip(changed, again, strict=True))
    uses = torch.cat([one.float() - other.float() for one, other in zip(changed, plain, strict=True)])
    assert uses.flatten(1).any(1).all() and len({float(x.abs().mean()) for x in uses}) == 4


def test_colours_are_not_cached(tmp_path: Path) -> None:
    file, source = tmp_path / "a.toml", write_folder(tmp_path / "pictures", FILES)
    tables = f"[data]\nsource = '{source}'\nsize = 128\nhue = 0.1\n[cache]\noutput = '{tmp_path}/cache'\n"
    file.write_text(f"run = '{tmp_path}'\n{tables}", encoding="utf-8")
    with pytest.raises(ValueError, match="hue"):
        make_cache(file, [])
    write_folder(tmp_path / "cache", {"cache.json": b"{}", "0.tar": b""})
    with pytest.raises(ValueError, match="hue"):
        configured_cache(ImageDataConfig(source=str(tmp_path / "cache"), hue=0.1))
    assert torch.equal(ColourConfig(hue=0.5).recoloured(image(), ()), image())  # for validation
