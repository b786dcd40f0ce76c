"""The measure of ControlNets, on the drawings themselves."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from tools.demo.control import (
    CANVAS,
    at_usual_place,
    boxes,
    draw_all,
    hints_of,
    moved_boxes,
    overlap,
    placed_scenes,
    right,
)
from tools.demo.judge import Judge
from wuerstchen_core.training.data.hints import filled, silhouettes

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["outline", "boxes"])
def test_drawings_at_their_places_are_right_and_elsewhere_wrong(kind: str) -> None:
    chosen, placed = placed_scenes({}, kind, 3)
    again, _ = placed_scenes({}, kind, 3)
    drawn = draw_all(chosen, CANVAS, placed)
    judge = Judge()
    assert chosen == again and len({tuple(own) for own in placed}) == 3
    for scene, own, image in zip(chosen, placed, drawn, strict=True):
        assert right(judge, Image.fromarray(image), scene, own)
        moved = [(left + edge // 2, top + edge // 3, edge, edge) for left, top, edge, _ in own]
        assert not right(judge, Image.fromarray(image), scene, moved)
    drawings = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    hints = hints_of(kind, drawings, placed)
    assert tuple(hints.shape) == (3, 3, CANVAS, CANVAS)
    if kind == "outline":
        assert overlap(filled(hints[:1, :1]), silhouettes(drawings[:1])) > 0.9
        assert overlap(silhouettes(drawings[:1]), silhouettes(drawings[1:2])) < 0.9


def test_moved_things_stay_near_their_usual_places() -> None:
    rng = random.Random(1)
    for kind in ("outline", "boxes"):
        for scene in placed_scenes({}, kind, 20)[0]:
            for own, usual in zip(moved_boxes(scene, CANVAS, rng), boxes(scene), strict=True):
                assert (
                    own != usual and own[2] == own[3] and min(own[:2]) >= 0 and max(own[0], own[1]) + own[2] <= CANVAS
                )
                middles = [[box[i] + box[2] / 2 for i in (0, 1)] for box in (own, usual)]
                assert max(abs(a - b) for a, b in zip(*middles, strict=True)) < 0.09 * CANVAS


def test_a_thing_in_its_usual_box_stays_as_it_is() -> None:
    [scene, *_], _ = placed_scenes({}, "outline", 1)
    [image] = draw_all([scene])
    assert (at_usual_place(Image.fromarray(image), boxes(scene)[0], scene) == image).all()
