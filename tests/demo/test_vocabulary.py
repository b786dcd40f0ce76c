"""The demo's vocabulary: things, captions, the held-out pairs and notes on unknown words."""

import random
import re

import numpy as np
import pytest

from wuerstchen_core.demo import artwork
from wuerstchen_core.demo.vocabulary import (
    COLOURS,
    LAYOUTS,
    POSITIONS,
    SHAPES,
    SIMPLE,
    SIZES,
    THINGS,
    Scene,
    caption,
    held_out,
    known_words,
    scenes,
    unknown_words_note,
    word_list,
)

NAMES = {thing.name: index for index, thing in enumerate(THINGS)}
LARGE, SMALL = list(SIZES).index("large"), list(SIZES).index("small")
YELLOW, ORANGE = list(COLOURS).index("yellow"), list(COLOURS).index("orange")


def test_there_are_enough_things_and_none_twice():
    assert len(THINGS) >= 128
    assert len({thing.icon for thing in THINGS}) == len(THINGS)
    names = [name for thing in THINGS for name in thing.names]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", name) for name in names)


def test_no_name_of_a_thing_occurs_in_the_name_of_another():
    for thing in THINGS:
        others = [name for other in THINGS if other is not thing for name in other.names]
        for name in thing.names:
            assert not [other for other in others if f" {name} " in f" {other} "]


def test_a_colour_word_in_a_name_never_stands_alone():
    names = {name for thing in THINGS for name in thing.names}
    assert names.isdisjoint(COLOURS)


def test_scenes_are_all_combinations_in_a_fixed_order():
    everything, each = scenes(), len(THINGS) * len(COLOURS)
    assert len(set(everything)) == len(everything) == each * len(SIZES)
    assert everything[:3] == [Scene(0, 0, 0), Scene(0, 0, 1), Scene(0, 1, 0)]
    corners, pairs = scenes(["corner"]), scenes(["pair"], shape=2)
    assert len(set(corners)) == each * 4 and corners[:2] == [Scene(0, 0, 1, 1), Scene(0, 0, 1, 2)]
    assert len(set(pairs)) == each * (len(THINGS) - 1) and pairs[0] == Scene(0, 0, 1, 0, 2, 1)
    for found, layout in ((everything, {"large", "small"}), (corners, {"corner"}), (pairs, {"pair"})):
        assert {scene.layout for scene in found} == layout
    assert not [scene for scene in pairs if scene.other == scene.thing]
    twos, threes, trios = (scenes([layout], shape=1) for layout in ("two", "three", "trio"))
    countable = [thing.countable for thing in THINGS]
    assert len(set(twos)) == len(set(threes)) == len(COLOURS) * sum(countable) < each
    assert all(countable[scene.thing] for scene in twos + threes) and len(set(trios)) == 8 * each
    assert {len(set(scene.things)) for scene in twos + threes} == {1} and {len(set(s.things)) for s in trios} == {3}
    for found, layout, number in ((twos, "two", 2), (threes, "three", 3), (trios, "trio", 3)):
        assert {(scene.layout, len(scene.things)) for scene in found} == {(layout, number)}
    several = [scene._replace(shape=0) for scene in pairs + twos + threes + trios]
    assert set(scenes(LAYOUTS)) == {*everything, *corners, *several}


def test_a_fifth_of_the_pairs_is_held_out_and_training_has_every_thing_and_colour():
    trained = [scene for scene in scenes() if not held_out(scene)]
    fraction = 1 - len(trained) / len(scenes())
    assert 0.18 <= fraction <= 0.22
    assert {scene.thing for scene in trained} == set(range(len(THINGS)))
    assert {scene.colour for scene in trained} == set(range(len(COLOURS)))
    assert all(held_out(scene) == held_out(scene._replace(size=0)) for scene in scenes())


def test_pairs_are_held_out_in_every_layout_and_shape():
    for scene in scenes(["corner"], shape=1):
        assert held_out(scene) == held_out(Scene(scene.thing, scene.colour, 0))
    pairs = scenes(["pair"], shape=2)
    for scene in pairs:
        single = [held_out(Scene(thing, scene.colour, 0)) for thing in (scene.thing, scene.other)]
        assert held_out(scene) == any(single)
    assert 0.34 <= sum(map(held_out, pairs)) / len(pairs) <= 0.38  # 1 - 0.8 * 0.8


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene(NAMES["red apple"], YELLOW, LARGE), "a red apple on a yellow background"),
        (Scene(NAMES["cat"], YELLOW, SMALL), "a small cat on a yellow background"),
        (Scene(NAMES["umbrella"], ORANGE, LARGE), "an umbrella on an orange background"),
        (Scene(NAMES["grapes"], ORANGE, SMALL), "small grapes on an orange background"),
        (Scene(NAMES["unicorn"], YELLOW, LARGE), "a unicorn on a yellow background"),
        (Scene(NAMES["cat"], YELLOW, SMALL, 3), "a small cat in the bottom left on a yellow background"),
        (Scene(NAMES["owl"], YELLOW, SMALL, 0, 1, NAMES["corn"]), "an owl and corn on a yellow background"),
        (Scene(NAMES["cat"], YELLOW, SMALL, 0, 1, NAMES["cat"]), "two cats on a yellow background"),
        (Scene(*(NAMES["leaf"], YELLOW, SMALL, 0, 0), *2 * [NAMES["leaf"]]), "three leaves on a yellow background"),
        (
            Scene(NAMES["owl"], YELLOW, SMALL, 0, 0, 0, NAMES["cat"]),
            "an owl, a red apple and a cat on a yellow background",
        ),
    ],
)
def test_the_plain_caption(scene, text):
    assert caption(scene) == text


def sample_scenes(seed):
    """Returns all scenes of one thing, once and several times, 2,000 of two different things, and 500 of three."""
    rng, counts = random.Random(seed), {"pair": 2000, "trio": 500}
    several = [scene for layout, count in counts.items() for scene in rng.sample(scenes([layout]), count)]
    return scenes(["large", "small", "corner", "two", "three"]) + several


def test_plain_captions_of_the_scenes_of_a_shape_all_differ():
    assert len({caption(scene) for scene in scenes(LAYOUTS)}) == len(scenes(LAYOUTS))


def words_of(texts):
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


@pytest.mark.parametrize("layouts", [SIMPLE, ("small", "corner"), ("large", "pair"), LAYOUTS], ids="+".join)
def test_captions_use_known_words_and_together_all_of_them(layouts):
    """Also for a model that knows only the first 12 things."""
    rng, things = random.Random(0), THINGS[:12]
    shown = [scene for scene in scenes(layouts) if max(scene.things) < 12]
    shown = shown if "pair" not in layouts else random.Random(1).sample(shown, 600)
    trio = [Scene(0, 0, SMALL, 0, 0, 1, 2)] if "trio" in layouts else []  # no other has only the first 12 things
    shown += trio
    texts = [caption(scene, rng) for scene in shown for _ in range(20)] + [caption(scene) for scene in shown]
    known = known_words(things, layouts)
    assert list(known) == sorted(known)
    sizes = {"large": {"big", "large", "huge"}, "small": {"small", "little", "tiny"}}
    missing = set(known) - words_of(texts)
    assert words_of(texts) <= set(known) and missing <= (sizes["large"] if "large" not in layouts else set())


def test_captions_of_all_things_use_all_words():
    rng = random.Random(0)
    assert words_of(caption(scene, rng) for scene in sample_scenes(0) for _ in range(8)) == set(known_words())


def test_random_captions_name_the_thing_the_background_and_smallness():
    rng = random.Random(1)
    colours = {"gray": "gray|grey", "purple": "purple|violet"}
    for scene in sample_scenes(1):
        text = caption(scene, rng).lower()
        colour = list(COLOURS)[scene.colour]
        thing, counted = THINGS[scene.thing], scene.layout in ("two", "three")
        assert any(name in text for name in (thing.plurals if counted else thing.names))
        assert re.search(rf"\b({colours.get(colour, colour)})\b", text)
        smallness = bool(re.search(r"\b(small|little|tiny)\b", text))
        assert smallness == (scene.size == SMALL) or scene.layout not in SIMPLE


def test_random_captions_name_the_corner_and_no_other():
    rng, words = random.Random(2), {"top": "top|upper", "bottom": "bottom|lower"}
    for scene in sample_scenes(2):
        text = caption(scene, rng).lower()
        found = re.findall(r"\b(top|upper|bottom|lower) (left|right)\b", text)
        assert len(found) == bool(scene.position)
        if scene.position:
            height, side = POSITIONS[scene.position].split()
            assert found[0][0] in words[height].split("|") and found[0][1] == side


def test_random_captions_name_two_things_from_left_to_right():
    rng = random.Random(3)
    for scene in random.Random(3).sample(scenes(["pair"]), 1000):
        text = caption(scene, rng).lower()
        left, right = ({text.find(name) for name in THINGS[thing].names} - {-1} for thing in (scene.thing, scene.other))
        assert left and right and min(left) < max(right)


def test_random_captions_count_one_thing_and_name_three_in_their_order():
    rng = random.Random(4)
    numbers = {"two": r"two|2|a pair of|[a-z]+s|fish|cacti|snowmen", "three": r"three|3|[a-z]+s|fish|cacti|snowmen"}
    for layout, number in numbers.items():
        for scene in random.Random(4).sample(scenes([layout]), 300):
            text = caption(scene, rng).lower()
            assert re.search(rf"\b({number})\b", text)
            assert not re.search(r"\b(two|2|pair)\b" if layout == "three" else r"\b(three|3)\b", text)
    for scene in random.Random(5).sample(scenes(["trio"]), 300):
        text = caption(scene, rng).lower()
        first = [min({text.find(name) for name in THINGS[thing].names} - {-1}) for thing in scene.things]
        assert first == sorted(first)


def test_plurals():
    plurals = {name: THINGS[index].plurals for name, index in NAMES.items()}
    assert plurals["cup of coffee"] == ("cups of coffee", "coffees", "cups of tea")
    assert plurals["strawberry"] == ("strawberries",) and plurals["gift"] == ("gifts", "presents", "gift boxes")
    assert plurals["wolf"] == ("wolves",) and plurals["monkey"] == ("monkeys",) and plurals["fish"] == ("fish",)
    assert plurals["sun"] == ("suns",) and plurals["corn"] == plurals["scissors"] == ()


def test_random_captions_depend_on_the_seed_only():
    scene = Scene(NAMES["doughnut"], YELLOW, LARGE)
    first, again = ([caption(scene, rng) for _ in range(50)] for rng in map(random.Random, (3, 3)))
    assert first == again
    assert len(set(first)) > 25


def extent(picture):
    """Returns left, top, right and bottom of the pixels that differ from the background."""
    rows, columns = np.nonzero((picture != picture[0, 0]).any(axis=-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
@pytest.mark.parametrize("position", range(len(POSITIONS)), ids=POSITIONS)
def test_drawings_are_at_their_positions(shape, position):
    """A ball is round and fills its box of 120 pixels up to a pixel or two."""
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    ball, (width, height) = NAMES["basketball"], list(SHAPES.values())[shape]
    picture = np.asarray(artwork.draw(Scene(ball, YELLOW, SMALL, position, shape)))
    assert picture.shape == (height, width, 3) and (picture[0, 0] == COLOURS["yellow"]).all()
    edge, margin = SIZES["small"], artwork.MARGIN
    column, row = (width - edge) // 2, (height - edge) // 2
    if position:
        column = margin if "left" in POSITIONS[position] else width - margin - edge
        row = margin if "top" in POSITIONS[position] else height - margin - edge
    assert extent(picture) == pytest.approx((column, row, column + edge - 1, row + edge - 1), abs=8)
    assert artwork.boxes(Scene(ball, YELLOW, SMALL, position, shape)) == [(column, row, edge, edge)]


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_two_things_are_drawn_side_by_side(shape):
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    ball, star = NAMES["basketball"], NAMES["star"]
    picture = np.asarray(artwork.draw(Scene(ball, YELLOW, SMALL, 0, shape, star)))
    width, edge, margin = picture.shape[1], SIZES["small"], artwork.MARGIN
    row = (picture.shape[0] - edge) // 2
    for thing, column in ((ball, margin), (star, width - margin - edge)):
        alone = np.asarray(artwork.draw(Scene(thing, YELLOW, SMALL, 0, shape)))
        middle = (width - edge) // 2
        drawing = alone[row : row + edge, middle : middle + edge]
        assert np.array_equal(picture[row : row + edge, column : column + edge], drawing)
        picture = picture.copy()
        picture[row : row + edge, column : column + edge] = COLOURS["yellow"]
    assert (picture == COLOURS["yellow"]).all()


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_three_things_are_drawn_in_a_triangle(shape):
    scene, (width, height) = Scene(0, YELLOW, SMALL, 0, shape, 1, 2), list(SHAPES.values())[shape]
    edge, margin = SIZES["small"], artwork.MARGIN
    low, right = height - margin - edge, width - margin - edge
    corners = [((width - edge) // 2, margin), (margin, low), (right, low)]
    assert artwork.boxes(scene) == [(*corner, edge, edge) for corner in corners]


def test_a_smaller_canvas_shows_the_same_picture():
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    scene = Scene(NAMES["pizza"], ORANGE, LARGE)
    half = artwork.draw_all([scene], canvas=128)[0].astype(float)
    full = artwork.draw_all([scene])[0].reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - full).mean() < 2


def test_every_thing_has_its_drawing():
    assert {thing.icon for thing in THINGS} == set(artwork.artwork()["icons"])


def vocabulary(**values):
    return {"vocabulary": {"words": ["an", "apple", "cat", "red"], "things": ["red apple", "cat"], **values}}


def test_unknown_words_are_named_once_with_the_nearest_known_ones():
    reported = set()
    note = unknown_words_note(["A CATS an aple, aple!", "2 xylophones"], vocabulary(), reported, "my model")
    words, more = note.splitlines()
    assert words.startswith('"a", "cats", "aple", "xylophones" are') and words.endswith(": cat, apple, red apple")
    assert "inspect my model --words" in more and " 4 " in more
    assert reported == {"a", "cats", "aple", "xylophones"}
    again = unknown_words_note(["cats and an aple"], vocabulary(), reported)
    assert again.startswith('"and" is') and "inspect demo --words" in again
    assert unknown_words_note(["an apple", "and cats"], vocabulary(), reported) is None
    assert unknown_words_note(["a zebra"], {}, set()) is None


def test_the_note_on_a_long_prompt_stays_short():
    words = [f"{a}{b}{c}x" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    note = unknown_words_note([" ".join(words)], vocabulary(), set())
    assert len(note) < 300 and '"aaax"' in note and "995 more" in note


def test_the_word_list_is_grouped():
    about = {"words": ["apple", "big", "blue", "cat", "on", "red"], "colours": ["blue"], "sizes": ["large", "small"]}
    groups = {"things": ["red apple", "cat"], "backgrounds": ["blue"], "sizes": ["large", "small"]}
    others = {"synonyms and other words": ["big", "on"]}
    assert word_list(vocabulary(**about)["vocabulary"]) == {**groups, **others}
    more = {**about, "layouts": list(LAYOUTS), "shapes": ["square", "portrait"]}
    everything = {**groups, "positions": [*POSITIONS, "side by side"], "shapes": ["square", "portrait"], **others}
    everything["numbers"] = ["two", "three"]
    assert word_list(vocabulary(**more)["vocabulary"]) == everything
