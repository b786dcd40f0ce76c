"""The judge recognises the original drawings, and rejects other images, blobs and empty backgrounds."""

import io
import math
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tools.demo.judge import NOTHING, Judge, psnr, wilson_interval
from wuerstchen_core.demo.vocabulary import COLOURS, LAYOUTS, POSITIONS, SHAPES, SIMPLE, SIZES, THINGS, Scene

KINDS = [*product(LAYOUTS[:4], range(3)), *product(LAYOUTS[4:], range(2)), *product(LAYOUTS[:1], (3, 4))]
BACKGROUNDS = {layout: 3 for layout in LAYOUTS} | {"large": 0}  # one per size: references are slow to draw


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    return Judge()


def some(layout, shape, step):
    """Returns scenes of every `step`-th thing; corners alternate, and several things are 50 and 90 apart."""
    things = range(0, len(THINGS), step)
    small, corners = int(layout != "large"), (1 + i % 4 if layout == "corner" else 0 for i in range(len(things)))
    steps = {"pair": [50], "two": [0], "three": [0, 0], "trio": [50, 90]}.get(layout, [])
    return [
        Scene(thing, BACKGROUNDS[layout], small, position, shape, *((thing + step) % len(THINGS) for step in steps))
        for thing, position in zip(things, corners, strict=True)
    ]


def drawn(scenes):
    from wuerstchen_core.demo.artwork import draw_all

    return [draw_all([scene])[0] for scene in scenes]


@pytest.fixture(scope="module")
def pictures(judge):
    """Returns scenes of all layouts and shapes with their drawings."""
    scenes = [scene for layout, shape in KINDS for scene in some(layout, shape, 9)]
    return list(zip(scenes, drawn(scenes), strict=True))


def blurred(picture, sigma):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def soft_and_compressed(picture):
    stream = io.BytesIO()
    Image.fromarray(blurred(picture, 1.5)).save(stream, "JPEG", quality=20)
    return np.asarray(Image.open(stream).convert("RGB"))


def things_of(scene):
    return {*scene.things} - {NOTHING}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda picture: picture, KINDS),
        (soft_and_compressed, KINDS[::2]),
        (lambda picture: np.roll(picture, (5, -7), (0, 1)), KINDS[1::2]),
    ],
    ids=["true", "soft and compressed", "shifted"],
)
def test_drawings_are_recognised(judge, pictures, change, kinds):
    shown = [(scene, picture) for scene, picture in pictures if (scene.layout, scene.shape) in kinds]
    assert {(scene.layout, scene.shape) for scene, _ in shown} == set(kinds)
    right = [judge.identify(change(picture), scene) == scene for scene, picture in shown]
    assert sum(right) / len(right) >= 0.99


def test_the_requested_thing_makes_no_difference(judge, pictures):
    for scene, picture in pictures[::7]:
        zeros = dict.fromkeys(("thing", "other", "third")[: len(scene.things)], 0)
        assert judge.identify(picture, scene._replace(**zeros)) == scene


def test_two_things_are_judged_separately(judge):
    """The right one is missing or blurred; both are swapped."""
    for scene in some("pair", 0, 30):
        [picture] = drawn([scene])
        half, without = picture.shape[1] // 2, picture.copy()
        without[:, half:] = COLOURS[list(COLOURS)[scene.colour]]
        assert judge.identify(without, scene) == scene._replace(other=NOTHING)
        without[:, half:] = blurred(picture, 12)[:, half:]
        assert judge.identify(without, scene) == scene._replace(other=NOTHING)
        swapped = scene._replace(thing=scene.other, other=scene.thing)
        assert judge.identify(drawn([swapped])[0], scene) == swapped


def test_blobs_are_rejected(judge, pictures):
    seen = [judge.identify(blurred(picture, 12), scene) for scene, picture in pictures]
    wrong = [things_of(one) & things_of(scene) for one, (scene, _) in zip(seen, pictures, strict=True)]
    assert sum(map(bool, wrong)) / len(wrong) <= 0.05


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_another_layout_is_rejected(judge, shape):
    """The same thing large, small, in a pair, and in each corner is right only where it was requested."""
    base = Scene(0, 3, 1, 0, shape)
    layouts = [
        base._replace(size=0),
        base._replace(other=40),
        *(base._replace(position=i) for i in range(len(POSITIONS))),
    ]
    for thing in (0, 46, 93):
        ways = [scene._replace(thing=thing, colour=BACKGROUNDS[scene.layout]) for scene in layouts]
        for requested, actual in product(ways, ways):
            [picture] = drawn([actual._replace(colour=requested.colour)])
            seen = judge.identify(picture, requested)
            assert seen == requested if requested == actual else thing not in things_of(seen), (requested, actual)


@pytest.mark.parametrize("requested", range(len(SIZES)), ids=SIZES)
def test_things_of_another_size_are_rejected(judge, requested):
    scenes = [Scene(thing, 3 * requested, 1 - requested) for thing in range(len(THINGS))]
    seen = [
        judge.identify(picture, scene._replace(size=requested))
        for scene, picture in zip(scenes, drawn(scenes), strict=True)
    ]
    assert sum(map(len, map(things_of, seen))) == 0


def test_small_shifts_are_accepted(judge, pictures):
    middle = [(scene, picture) for scene, picture in pictures if scene.layout in SIMPLE]
    for shift, accepted in ((10, 1.0), (-10, 1.0), (28, 0.0)):
        right = [judge.identify(np.roll(picture, (shift, shift), (0, 1)), scene) == scene for scene, picture in middle]
        assert sum(right) / len(right) == pytest.approx(accepted, abs=0.01)


def test_a_bare_background_shows_nothing(judge):
    for layout, shape in KINDS:
        scene, (width, height) = some(layout, shape, 200)[0], list(SHAPES.values())[shape]
        bare = np.full((height, width, 3), COLOURS[list(COLOURS)[scene.colour]], dtype=np.uint8)
        assert things_of(judge.identify(bare, scene)) == set()


@pytest.mark.parametrize(("shape", "shift"), [(1, (-130, 0)), (1, (0, 100)), (2, (0, 130)), (2, (100, 0))])
@pytest.mark.parametrize("layout", ["large", "small"])
def test_repeated_and_cut_things_are_rejected(judge, layout, shape, shift):
    """Rejects a second copy, whole or cut off, next to the first, and a cut-off thing alone."""
    for scene in some(layout, shape, 25):
        [picture] = drawn([scene])
        cut = picture.copy()
        rows, columns = (slice(max(x, 0), x if x < 0 else None) for x in shift)
        from_rows, from_columns = (slice(max(-x, 0), -x if x > 0 else None) for x in shift)
        cut[:] = picture[0, 0]
        cut[rows, columns] = picture[from_rows, from_columns]
        twice = np.where(picture == picture[0, 0], cut, picture)
        assert things_of(judge.identify(cut, scene)) == things_of(judge.identify(twice, scene)) == set()


def test_specks_are_allowed(judge):
    [scene] = some("small", 1, 200)
    [picture] = drawn([scene])
    speckled = picture.copy()
    speckled[20:32, 40:52] = 255 - picture[0, 0]
    assert judge.identify(speckled, scene) == scene
    speckled[20:52, 40:72] = 255 - picture[0, 0]
    assert judge.identify(speckled, scene).thing == NOTHING


def test_distances_are_to_every_thing(judge, pictures):
    for scene, picture in pictures[::7]:
        found = judge.distances(picture, scene)
        things = list(scene.things)
        assert found.shape == (len(things), len(THINGS)) and found.argmin(axis=1).tolist() == things
        assert found.min() < 0.1 < np.sort(found, axis=1)[:, 1].min()


def test_backgrounds_are_distinguished(judge, pictures):
    assert all(judge.background(picture) == scene.colour for scene, picture in pictures)
    noise = np.random.default_rng(0).normal(0, 12, (256, 256, 3))
    for index, colour in enumerate(COLOURS.values()):
        assert judge.background(np.clip(colour + noise, 0, 255).astype(np.uint8)) == index


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (0, 255, 255), (90, 60, 30)])
def test_an_unknown_background_is_rejected(colour):
    assert Judge().background(np.full((256, 256, 3), colour, dtype=np.uint8)) == NOTHING


def test_a_background_of_two_colours_is_rejected():
    picture = np.full((256, 256, 3), COLOURS["red"], dtype=np.uint8)
    picture[:, 128:] = COLOURS["blue"]
    assert Judge().background(picture) == NOTHING


def test_bad_input_is_named():
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="64 pixels, got 100"):
        Judge(canvas=100)
    five = r"\[256, 256, 3\] or \[384, 256, 3\] or .*, got uint8 \(128, 128, 3\)$"
    with pytest.raises(ValueError, match=five):
        Judge().background(picture)
    with pytest.raises(ValueError, match=r"\[192, 128, 3\], got uint8 \(128, 128, 3\)$"):
        Judge(canvas=128).identify(picture, Scene(0, 0, 0, 0, 1))
    with pytest.raises(ValueError, match="no background 8"):
        Judge(canvas=128).identify(picture, Scene(0, 8, 0))
    with pytest.raises(ValueError, match="of one shape"):
        psnr(picture, picture[:64])
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_psnr():
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)
