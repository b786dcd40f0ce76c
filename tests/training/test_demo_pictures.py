"""The demo's scenes as training images: layouts, shapes, and the scenes held out of training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from wuerstchen_core.demo.artwork import boxes
from wuerstchen_core.demo.vocabulary import COLOURS, LAYOUTS, SHAPES, SIMPLE, held_out
from wuerstchen_core.training.data import demo as module
from wuerstchen_core.training.data.demo import DemoDataset, MultiShapeDemoDataset
from wuerstchen_core.training.data.files import open_dataset
from wuerstchen_core.training.rng import StepRandom

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

SMALL = {"canvas": 64, "things": 3}
FEW = list(LAYOUTS[:4])
EVERYTHING = {**SMALL, "layouts": FEW, "shapes": list(SHAPES)}


@pytest.fixture(scope="module")
def shapes() -> MultiShapeDemoDataset:
    return MultiShapeDemoDataset(EVERYTHING)


def test_training_and_held_out_scenes_cover_all_layouts_of_the_first_things() -> None:
    train, test = (DemoDataset({**SMALL, "layouts": FEW}, held_out=held) for held in (False, True))
    for dataset, expected in ((train, False), (test, True)):
        assert dataset.images(slice(None)).shape == (len(dataset), 3, 64, 64)
        assert {held_out(scene) for scene in dataset.scenes} == {expected}
        assert {scene.layout for scene in dataset.scenes} == set(FEW)
        assert {scene.thing for scene in dataset.scenes} | {scene.other for scene in dataset.scenes} == {0, 1, 2, None}
    assert len(set(train.scenes + test.scenes)) == len(train) + len(test) == 3 * len(COLOURS) * (2 + 4 + 2)
    preview = train.preview_images()
    assert isinstance(preview, DemoDataset) and preview.scenes == test.scenes and preview is train.preview_images()


def test_a_dataset_has_only_the_layouts_and_background_of_its_table() -> None:
    assert {scene.layout for scene in DemoDataset(SMALL).scenes} == set(SIMPLE)
    corners = DemoDataset({**SMALL, "layouts": ["corner"]})
    assert {scene.layout for scene in corners.scenes} == {"corner"}
    assert {scene.position for scene in corners.scenes} == {1, 2, 3, 4}
    pink = DemoDataset({**SMALL, "layouts": FEW, "background": "pink"})
    assert {scene.colour for scene in pink.scenes} == {list(COLOURS).index("pink")}


def test_large_things_count_twice_among_other_layouts() -> None:
    for layouts, times in ((FEW, 2), (list(SIMPLE), 1)):
        dataset = DemoDataset({**SMALL, "layouts": layouts})
        total = sum(times if scene.layout == "large" else 1 for scene in dataset.scenes)
        epoch = dataset.sample_batch(StepRandom(0, 0, total))
        assert len(epoch) == total
        counts = Counter(dataset.scenes[i] for i in epoch.tolist())
        assert set(counts) == set(dataset.scenes)
        assert all(count == (times if scene.layout == "large" else 1) for scene, count in counts.items())


def test_the_same_sample_of_too_many_scenes_is_drawn_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OTHER", 20)
    one, again = (DemoDataset({**SMALL, "layouts": FEW}) for _ in range(2))
    assert one.scenes == again.scenes
    counts = Counter(scene.layout for scene in one.scenes)
    assert counts["corner"] == counts["pair"] == 20 and counts["large"] == counts["small"] > 0
    assert len({scene.position for scene in one.scenes}) == 5
    wide = DemoDataset({**SMALL, "layouts": list(SIMPLE), "shapes": ["landscape"]})
    monkeypatch.setattr(module, "MAX_OTHER", 5)
    few = DemoDataset({**SMALL, "layouts": list(SIMPLE), "shapes": ["landscape"]})
    assert len(few) == 10 < len(wide)
    limited = DemoDataset({**SMALL, "layouts": FEW, "shapes": ["landscape"], "most": 7})
    assert Counter(scene.layout for scene in limited.scenes) == dict.fromkeys(FEW, 7)
    with pytest.raises(ValueError, match=r"\[data\] most .*-1"):
        DemoDataset({**SMALL, "most": -1})


@pytest.mark.parametrize(("data", "memory", "times"), [({}, 2**30, 1), ({}, 1, 2), ({"scattered": 9}, 1, 1)], ids=str)
def test_drawings_that_fit_stay_in_memory(
    data: dict[str, Any], memory: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(module, "MEMORY", memory)
    dataset = DemoDataset({**SMALL, **data, "things": 2}, scattered="scattered" in data)
    draw = module.draw_all
    monkeypatch.setattr(module, "draw_all", lambda *own: drawn.extend(own[0]) or draw(*own))
    once, again = (dataset.images(torch.tensor([1, 3])) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once[0], once[1])
    assert drawn == [dataset.scenes[1], dataset.scenes[3]] * times
    assert len(dataset.images(slice(0))) == 0


def test_only_the_scenes_in_use_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    monkeypatch.setattr(module.vocabulary, "held_out", lambda scene: judged.append(scene) or held_out(scene))
    dataset = DemoDataset({**SMALL, "layouts": FEW})
    assert max(max(scene.things) for scene in judged) < 3 <= len(dataset)
    placed: list[Any] = []
    monkeypatch.setattr(module, "boxes", lambda scene, canvas: placed.append(scene) or boxes(scene, canvas))
    assert dataset.boxes(torch.tensor([2, 0])) == [boxes(dataset.scenes[index], 64) for index in (2, 0)]
    assert placed == [dataset.scenes[2], dataset.scenes[0]]


def test_a_batch_has_one_shape_which_is_the_same_in_every_process(shapes: MultiShapeDemoDataset) -> None:
    assert shapes.side == 64 and not shapes.square
    sizes = {"square": (64, 64), "portrait": (96, 64), "landscape": (64, 96), "tall": (128, 64), "wide": (64, 128)}
    assert [one.images(slice(1)).shape[-2:] for one in shapes.datasets] == list(sizes.values())
    seen: Counter[int] = Counter()
    for step in range(60):
        picked = shapes.sample_batch(StepRandom(0, step, 4))
        halves = [shapes.sample_batch(StepRandom(0, step, 4, indices)) for indices in ([0, 1], [2, 3])]
        assert picked[0] == halves[0][0] == halves[1][0]
        assert torch.equal(picked[1], torch.cat([indices for _, indices in halves]))
        seen[picked[0]] += 1
        images, one = shapes.images(picked), shapes.datasets[picked[0]]
        assert images.shape[0] == 4 and images.shape[-2:] == list(sizes.values())[picked[0]]
        assert not any(held_out(one.scenes[i]) for i in picked[1].tolist())
        words = shapes.captions(picked, StepRandom(0, step, 4))
        assert words == one.captions(picked[1], StepRandom(0, step, 4)) and len(words) == 4
    assert set(seen) == set(range(len(sizes)))
    picked = shapes.sample_batch(StepRandom(0, 1, 4))
    assert shapes.captions(picked, StepRandom(0, 1, 4), drop=1.0) == [""] * 4


def test_larger_pictures_are_fewer_and_no_longer_than_512_pixels() -> None:
    data = {**SMALL, "shapes": ["square", "portrait"], "larger": [128, 384], "most": 18}
    dataset = open_dataset({"data": data})
    assert isinstance(dataset, MultiShapeDemoDataset) and dataset.side == 64
    counts = {tuple(one.size[::-1]): len(one) for one in dataset.datasets}
    assert counts == {(64, 64): 36, (96, 64): 36, (128, 128): 8, (192, 128): 8, (384, 384): 2}
    one = open_dataset({"data": {**SMALL, "larger": [128]}})
    assert isinstance(one, MultiShapeDemoDataset) and len(one.datasets) == 2


def test_shapes_come_in_proportion_to_their_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OTHER", 6)
    shapes = MultiShapeDemoDataset({**SMALL, "shapes": ["square", "portrait"]})
    large, few = map(len, shapes.datasets)
    assert large > few
    fraction = sum(shapes.sample_batch(StepRandom(0, step, 2))[0] for step in range(400)) / 400
    assert fraction == pytest.approx(few / (large + few), abs=0.07)


def test_a_share_of_the_batches_has_scattered_scenes() -> None:
    data = {**SMALL, "layouts": FEW, "scattered": 12, "scattered_share": 0.4}
    dataset = open_dataset({"data": data})
    assert isinstance(dataset, MultiShapeDemoDataset)
    plain, scattered = dataset.datasets
    assert len(scattered) == 12 and {scene.layout for scene in scattered.scenes} <= {"large", "pair"}
    usual, other = ({tuple(own) for own in one.boxes(torch.arange(len(one)))} for one in dataset.datasets)
    assert len(other) == 12 and not usual & other
    seen = Counter(dataset.sample_batch(StepRandom(0, step, 2))[0] for step in range(400))
    assert 0.3 < seen[1] / 400 < 0.5
    only = MultiShapeDemoDataset({**data, "scattered_share": 1.0})
    assert [one.scenes for one in only.datasets] == [scattered.scenes]
    with pytest.raises(ValueError, match=r"\[data\] scattered .*pair: add one"):
        DemoDataset({**data, "layouts": ["small"]})


def test_mapped_tensors_belong_to_the_images_of_the_batch(shapes: MultiShapeDemoDataset) -> None:
    means = shapes.map_images("mean", lambda images: images.mean(dim=(1, 2, 3)))
    for step in range(6):
        picked = shapes.sample_batch(StepRandom(0, step, 4))
        assert torch.equal(means(picked), shapes.images(picked).mean(dim=(1, 2, 3)))
    held = shapes.preview_images()
    assert isinstance(held, DemoDataset) and held.size == (64, 64)
    assert all(held_out(scene) for scene in held.scenes)


def test_the_table_chooses_the_class() -> None:
    assert isinstance(open_dataset({"data": {**SMALL, "shapes": ["square", "portrait"]}}), MultiShapeDemoDataset)
    one = open_dataset({"data": {**SMALL, "shapes": ["portrait"]}})
    assert isinstance(one, DemoDataset) and one.size == (64, 96) and not one.square


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ({"layouts": ["corners"]}, "layouts .*pair.*'corners'"),
        ({"layouts": []}, r"layouts .*pair.*\[\]"),
        ({"shapes": ["square", "square"]}, "shapes .*landscape.*'square', 'square'"),
        ({"shapes": "square"}, "shapes .*'square'"),
        ({"things": 132}, "things .*131.*132"),
        ({"larger": [300]}, "larger .*64.*300"),
        ({"larger": [256]}, "larger .*canvas.*256"),
        ({"larger": [576]}, "larger .*512.*576"),
    ],
)
def test_an_invalid_table_is_named_in_one_line(data: dict[str, Any], facts: str) -> None:
    with pytest.raises(ValueError, match=facts) as error:
        open_dataset({"data": data})
    assert "\n" not in str(error.value)
