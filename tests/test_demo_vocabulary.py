"""The demo's vocabulary: distinct things, captions of known words, a fair held-out part."""

import random
import re

import numpy as np
import pytest

from wuerstchen_core.demo import artwork
from wuerstchen_core.demo.vocabulary import (
    COLOURS,
    SIZES,
    THINGS,
    Scene,
    caption,
    held_out,
    known_words,
    scenes,
    unknown_words,
    vocabulary_note,
)

NAMES = {thing.name: index for index, thing in enumerate(THINGS)}
LARGE, SMALL = list(SIZES).index("large"), list(SIZES).index("small")
YELLOW, ORANGE = list(COLOURS).index("yellow"), list(COLOURS).index("orange")


def test_there_are_enough_things_and_none_twice():
    assert len(THINGS) >= 64
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
    everything = scenes()
    assert len(set(everything)) == len(everything) == len(THINGS) * len(COLOURS) * len(SIZES)
    assert everything[:3] == [Scene(0, 0, 0), Scene(0, 0, 1), Scene(0, 1, 0)]


def test_a_fifth_of_the_pairs_is_held_out_and_every_part_stays_known():
    kept = [scene for scene in scenes() if not held_out(scene)]
    share = 1 - len(kept) / len(scenes())
    assert 0.18 <= share <= 0.22
    assert {scene.thing for scene in kept} == set(range(len(THINGS)))
    assert {scene.colour for scene in kept} == set(range(len(COLOURS)))
    assert all(held_out(scene) == held_out(scene._replace(size=0)) for scene in scenes())


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene(NAMES["red apple"], YELLOW, LARGE), "a red apple on a yellow background"),
        (Scene(NAMES["cat"], YELLOW, SMALL), "a small cat on a yellow background"),
        (Scene(NAMES["umbrella"], ORANGE, LARGE), "an umbrella on an orange background"),
        (Scene(NAMES["grapes"], ORANGE, SMALL), "small grapes on an orange background"),
    ],
)
def test_the_plain_caption(scene, text):
    assert caption(scene) == text


def test_plain_captions_tell_all_scenes_apart():
    assert len({caption(scene) for scene in scenes()}) == len(scenes())


def test_captions_use_known_words_and_together_all_of_them():
    rng = random.Random(0)
    texts = [caption(scene, rng) for scene in scenes() for _ in range(30)]
    texts += [caption(scene) for scene in scenes()]
    used = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert used == set(known_words())
    assert list(known_words()) == sorted(known_words())


def test_worded_captions_name_the_thing_the_background_and_smallness():
    rng = random.Random(1)
    colours = {"gray": "gray|grey", "purple": "purple|violet"}
    for scene in scenes():
        text = caption(scene, rng).lower()
        colour = list(COLOURS)[scene.colour]
        assert any(name in text for name in THINGS[scene.thing].names)
        assert re.search(rf"\b({colours.get(colour, colour)})\b", text)
        assert bool(re.search(r"\b(small|little|tiny)\b", text)) == (scene.size == SMALL)


def test_captions_repeat_with_their_seed_and_vary_without():
    scene = Scene(NAMES["doughnut"], YELLOW, LARGE)
    first, again = ([caption(scene, rng) for _ in range(50)] for rng in map(random.Random, (3, 3)))
    assert first == again
    assert len(set(first)) > 25


def test_unknown_words_are_listed_once_in_order():
    prompt = "A DRAGON, a red dragon's cat on 2 blue castles!"
    assert unknown_words(prompt, known_words()) == ["dragon", "s", "castles"]
    assert unknown_words("", known_words()) == []


def test_drawings_are_centred_on_their_background():
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    scene = Scene(NAMES["basketball"], YELLOW, SMALL)
    picture = np.asarray(artwork.draw(scene))
    assert picture.shape == (256, 256, 3)
    ground = np.array(COLOURS["yellow"])
    rows, columns = np.nonzero((picture != ground).any(axis=-1))
    for places in (rows, columns):
        assert 100 <= np.ptp(places) < SIZES["small"]
        assert abs(places.mean() - 127.5) < 3


def test_a_smaller_canvas_shows_the_same_picture():
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    scene = Scene(NAMES["pizza"], ORANGE, LARGE)
    half = artwork.draw_all([scene], canvas=128)[0].astype(float)
    full = artwork.draw_all([scene])[0].reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - full).mean() < 2


def test_drawing_refuses_a_tiny_canvas():
    with pytest.raises(ValueError, match="at least 16 pixels, got 8"):
        artwork.draw_all([], canvas=8)


def test_every_thing_has_its_drawing():
    assert {thing.icon for thing in THINGS} == set(artwork._artwork()["icons"])


def test_a_long_prompt_of_unknown_words_is_noted_in_a_short_line():
    words = [f"{a}{b}{c}x" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    note = vocabulary_note([" ".join(words)], {"vocabulary": {"words": ["apple"]}})
    assert note is not None and len(note) < 400
    assert "'aaax'" in note and "and 980 more words" in note
