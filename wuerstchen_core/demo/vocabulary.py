"""The small world of the demo models: 128 things on 8 backgrounds, and their captions.

A model may know a part of it, and says which in its metadata: the first that shipped knows 72 things in the middle.

A scene is one thing on a flat background, large or small in the middle or small in a corner, or two small things side
by side. A fifth of the (thing, background) pairs is held out of training, so that the model can be asked for pictures
that it has never seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from ..common.text import listed


@dataclass(frozen=True)
class Thing:
    """A thing that can be asked for; `icon` names its drawing, `bare` drops the article."""

    name: str
    icon: str
    words: tuple[str, ...] = ()
    bare: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.words)


# The order is part of the trained model: `held_out` counts by position.
THINGS: tuple[Thing, ...] = (
    # fruit
    Thing("red apple", "red-apple", ("apple",)),
    Thing("banana", "banana"),
    Thing("strawberry", "strawberry"),
    Thing("lemon", "lemon"),
    Thing("grapes", "grapes", bare=True),
    Thing("watermelon", "watermelon", ("slice of watermelon", "watermelon slice")),
    Thing("cherries", "cherries", bare=True),
    Thing("pineapple", "pineapple"),
    Thing("pear", "pear"),
    # vegetables and other food
    Thing("carrot", "carrot"),
    Thing("broccoli", "broccoli", bare=True),
    Thing("eggplant", "eggplant", ("aubergine",)),
    Thing("corn", "ear-of-corn", ("maize", "sweetcorn"), bare=True),
    Thing("mushroom", "mushroom", ("toadstool",)),
    Thing("avocado", "avocado"),
    Thing("hamburger", "hamburger", ("burger", "cheeseburger")),
    Thing("pizza", "pizza", ("slice of pizza", "pizza slice")),
    Thing("french fries", "french-fries", ("fries",), bare=True),
    Thing("doughnut", "doughnut", ("donut",)),
    Thing("cupcake", "cupcake", ("muffin",)),
    Thing("ice cream", "soft-ice-cream", ("ice cream cone",)),
    Thing("lollipop", "lollipop", ("lolly",)),
    Thing("pretzel", "pretzel"),
    # animals
    Thing("cat", "cat-face", ("kitten", "kitty")),
    Thing("dog", "dog-face", ("puppy",)),
    Thing("panda", "panda"),
    Thing("frog", "frog"),
    Thing("pig", "pig-face", ("piglet", "piggy")),
    Thing("fox", "fox"),
    Thing("rabbit", "rabbit-face", ("bunny",)),
    Thing("penguin", "penguin"),
    Thing("owl", "owl"),
    Thing("flamingo", "flamingo"),
    Thing("parrot", "parrot"),
    Thing("elephant", "elephant"),
    Thing("turtle", "turtle", ("tortoise",)),
    Thing("dinosaur", "sauropod", ("dino", "brontosaurus")),
    Thing("octopus", "octopus"),
    Thing("crab", "crab"),
    Thing("fish", "fish"),
    Thing("butterfly", "butterfly"),
    Thing("ladybug", "lady-beetle", ("ladybird",)),
    Thing("bee", "honeybee", ("honeybee", "bumblebee")),
    # vehicles
    Thing("red car", "automobile", ("car", "automobile")),
    Thing("tractor", "tractor"),
    Thing("train", "locomotive", ("steam train", "locomotive")),
    Thing("rocket", "rocket", ("spaceship",)),
    Thing("airplane", "airplane", ("plane", "aeroplane")),
    Thing("helicopter", "helicopter"),
    Thing("sailboat", "sailboat", ("sailing boat", "boat")),
    # objects
    Thing("umbrella", "umbrella"),
    Thing("key", "key"),
    Thing("house", "house"),
    Thing("light bulb", "light-bulb", ("lightbulb", "bulb")),
    Thing("alarm clock", "alarm-clock", ("clock",)),
    Thing("guitar", "guitar", ("electric guitar",)),
    Thing("soccer ball", "soccer-ball", ("football",)),
    Thing("basketball", "basketball"),
    Thing("crown", "crown"),
    Thing("gift", "wrapped-gift", ("present", "gift box")),
    Thing("teddy bear", "teddy-bear", ("teddy",)),
    # nature
    Thing("tree", "deciduous-tree"),
    Thing("cactus", "cactus"),
    Thing("sunflower", "sunflower"),
    Thing("sun", "sun", ("sunshine",)),
    Thing("moon", "crescent-moon", ("crescent moon",)),
    Thing("star", "star"),
    Thing("rainbow", "rainbow"),
    Thing("snowman", "snowman-without-snow"),
    Thing("heart", "red-heart", ("red heart",)),
    # faces
    Thing("robot", "robot", ("robot face",)),
    Thing("pumpkin", "jack-o-lantern", ("halloween pumpkin",)),
    # food that came later, as all below did
    Thing("tomato", "tomato"),
    Thing("peach", "peach"),
    Thing("chili pepper", "hot-pepper", ("chili", "hot pepper")),
    Thing("croissant", "croissant"),
    Thing("bread", "bread", ("loaf of bread", "toast"), bare=True),
    Thing("cheese", "cheese-wedge", ("piece of cheese",), bare=True),
    Thing("cookie", "cookie", ("biscuit",)),
    Thing("fried egg", "cooking", ("egg in a pan",)),
    Thing("taco", "taco"),
    Thing("honey pot", "honey-pot", ("pot of honey", "honey")),
    Thing("cake", "birthday-cake", ("birthday cake",)),
    Thing("cup of coffee", "hot-beverage", ("coffee", "cup of tea")),
    # animals
    Thing("lion", "lion"),
    Thing("shark", "shark"),
    Thing("koala", "koala"),
    Thing("monkey", "monkey"),
    Thing("cow", "cow"),
    Thing("chicken", "chicken", ("hen",)),
    Thing("unicorn", "unicorn"),
    Thing("swan", "swan"),
    Thing("duck", "duck"),
    Thing("snail", "snail"),
    Thing("spider", "spider"),
    Thing("dolphin", "dolphin"),
    Thing("whale", "spouting-whale"),
    Thing("bat", "bat"),
    Thing("chick", "baby-chick", ("baby chick",)),
    Thing("wolf", "wolf"),
    # vehicles
    Thing("bus", "bus"),
    Thing("ambulance", "ambulance"),
    Thing("scooter", "motor-scooter", ("moped",)),
    Thing("flying saucer", "flying-saucer", ("ufo",)),
    # objects
    Thing("teapot", "teapot"),
    Thing("drum", "drum"),
    Thing("trumpet", "trumpet"),
    Thing("violin", "violin", ("fiddle",)),
    Thing("bell", "bell"),
    Thing("balloon", "balloon"),
    Thing("kite", "kite"),
    Thing("scissors", "scissors", bare=True),
    Thing("camera", "camera"),
    Thing("telephone", "telephone", ("phone",)),
    Thing("hat", "top-hat", ("top hat",)),
    Thing("shirt", "t-shirt"),
    Thing("diamond", "gem-stone", ("gem", "gemstone")),
    Thing("anchor", "anchor"),
    Thing("candle", "candle"),
    Thing("trophy", "trophy", ("golden cup",)),
    # nature
    Thing("cloud", "cloud"),
    Thing("fire", "fire", ("flame",)),
    Thing("snowflake", "snowflake"),
    Thing("tulip", "tulip"),
    Thing("rose", "rose"),
    Thing("leaf", "maple-leaf", ("maple leaf",)),
    Thing("fir", "evergreen-tree", ("conifer",)),
    # faces
    Thing("ghost", "ghost"),
    Thing("potato", "potato"),  # no shipped model was trained on it: `tools.demo.adapt` adds it by a LoRA
)
TRAINED_THINGS = len(THINGS) - 1  # all but the last

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (196, 32, 52),
    "orange": (252, 150, 58),
    "yellow": (255, 238, 130),
    "green": (96, 196, 140),
    "blue": (50, 98, 205),
    "purple": (176, 128, 226),
    "pink": (250, 172, 204),
    "gray": (134, 140, 146),
}

SIZES: dict[str, int] = {"large": 196, "small": 120}  # edge in pixels on a canvas of 256
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right")
SHAPES: dict[str, tuple[int, int]] = {"square": (256, 256), "portrait": (256, 384), "landscape": (384, 256)}  # w, h
LAYOUTS = ("large", "small", "corner", "pair")  # the kinds of scenes
SIMPLE = LAYOUTS[:2]  # one thing in the middle

_COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet")}
_SIZE_WORDS = {"large": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
_GROUND_WORDS = ("background", "backdrop")
_DEPICTIONS = ("picture", "image", "drawing", "emoji", "icon", "illustration")
_DEPICTED = "{depiction} of {subject}"
_TEMPLATES = (
    "{subject} on {ground}",
    "{subject} against {ground}",
    "{subject} with {ground}",
    "{subject} in front of {ground}",
    "{subject} and {ground} behind",
    "on {ground}, {subject}",
    "{subject}, {ground}",
    "{ground}, {subject}",
    "{ground} behind {subject}",
    "{subject} on {colour}",
)
_TEMPLATE_WEIGHTS = (10, 2, 2, 2, 1, 4, 4, 3, 2, 3)
_CENTRE_WORDS = ("centre", "center", "middle")
_PLACE_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_PLACED = ("in the {place}", "at the {place}", "in the {place} corner")
_PAIRED = (
    "{subject} and {other}",
    "{subject} next to {other}",
    "{subject} beside {other}",
    "{subject} on the left and {other} on the right",
)
_PAIRED_WEIGHTS = (6, 1, 1, 2)
_CONSONANT_SOUNDS = ("uni", "use", "eu", "one")  # a unicorn, not an unicorn


class Scene(NamedTuple):
    """Positions in `THINGS`, `COLOURS`, `SIZES`, `POSITIONS` and `SHAPES`; `other` is the thing on the right of two."""

    thing: int
    colour: int
    size: int
    position: int = 0
    shape: int = 0
    other: int | None = None

    @property
    def things(self) -> tuple[int, ...]:
        """Its one or two things."""
        return (self.thing,) if self.other is None else (self.thing, self.other)

    @property
    def layout(self) -> str:
        """Which of `LAYOUTS` it is."""
        if self.other is not None:
            return "pair"
        return "corner" if self.position else list(SIZES)[self.size]


def scenes(layouts: Collection[str] = SIMPLE, shape: int = 0) -> list[Scene]:
    """Every scene of these layouts, in a fixed order: things slowest, backgrounds next."""
    small, things = list(SIZES).index("small"), range(len(THINGS))
    found = []
    for thing, colour in product(things, range(len(COLOURS))):
        found += [Scene(thing, colour, size, 0, shape) for size, name in enumerate(SIZES) if name in layouts]
        if "corner" in layouts:
            found += [Scene(thing, colour, small, place, shape) for place in range(1, len(POSITIONS))]
        if "pair" in layouts:
            found += [Scene(thing, colour, small, 0, shape, other) for other in things if other != thing]
    return found


def held_out(scene: Scene) -> bool:
    """Whether training never sees this (thing, colour) pair, or one of both, in any layout."""
    return any((3 * thing + scene.colour) % 5 == 0 for thing in scene.things)


def _with_article(phrase: str, article: str = "a") -> str:
    """Put `article` in front: "a" (or "an", by sound), "the", or none when empty."""
    if article != "a":
        return f"{article} {phrase}".strip()
    vowel = phrase[0] in "aeiou" and not phrase.startswith(_CONSONANT_SOUNDS)
    return f"{'an' if vowel else 'a'} {phrase}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A sentence for a scene: the plain one, or with `rng` one of many wordings.

    Small things in the middle are always called small; large ones mostly go without a word for it, and so do those in
    corners and in twos, which are never large.
    """
    colour = list(COLOURS)[scene.colour]
    if rng is not None:
        return _finish(_random_wording(scene, colour, rng), rng)
    subject = _plain(THINGS[scene.thing], scene.layout in ("small", "corner"))
    if scene.other is not None:
        subject = _PAIRED[0].format(subject=subject, other=_plain(THINGS[scene.other], small=False))
    if scene.position:
        subject = f"{subject} {_PLACED[0].format(place=POSITIONS[scene.position])}"
    return f"{subject} on {_with_article(colour)} background"


def _plain(thing: Thing, small: bool) -> str:
    phrase = f"small {thing.name}" if small else thing.name
    return phrase if thing.bare else _with_article(phrase)


def _random_wording(scene: Scene, colour: str, rng: random.Random) -> str:
    article = rng.choices(("a", "the", ""), (6, 1, 3))[0]
    subject = _random_subject(THINGS[scene.thing], scene, article, rng)
    if scene.other is not None:
        other = _random_subject(THINGS[scene.other], scene, article, rng)
        subject = rng.choices(_PAIRED, _PAIRED_WEIGHTS)[0].format(subject=subject, other=other)
    if rng.random() < 0.2:
        depiction = _with_article(rng.choice(_DEPICTIONS), article)
        subject = _DEPICTED.format(depiction=depiction, subject=subject)
    if scene.position:
        height, side = POSITIONS[scene.position].split()
        subject += " " + rng.choice(_PLACED).format(place=f"{rng.choice(_PLACE_WORDS[height])} {side}")
    elif scene.other is None and rng.random() < 0.1:
        subject += " " + rng.choice(_PLACED[:2]).format(place=rng.choice(_CENTRE_WORDS))
    colour = rng.choice(_COLOUR_WORDS.get(colour, (colour,)))
    ground = _with_article(f"{colour} {rng.choices(_GROUND_WORDS, (4, 1))[0]}", article)
    template = rng.choices(_TEMPLATES, _TEMPLATE_WEIGHTS)[0]
    return template.format(subject=subject, ground=ground, colour=colour)


def _random_subject(thing: Thing, scene: Scene, article: str, rng: random.Random) -> str:
    subject = rng.choice((thing.name, rng.choice(thing.names)))
    share = {"large": 0.2, "small": 1.0, "corner": 0.5, "pair": 0.1}[scene.layout]
    if rng.random() < share:
        subject = f"{rng.choice(_SIZE_WORDS[list(SIZES)[scene.size]])} {subject}"
    return subject if thing.bare else _with_article(subject, article)


def _finish(text: str, rng: random.Random) -> str:
    """Vary the case of a caption, and end it with a full stop now and then."""
    draw = rng.random()
    if draw < 0.2:
        text = text[0].upper() + text[1:]
    elif draw < 0.23:
        text = text.upper()
    return f"{text}." if rng.random() < 0.2 else text


def _letters(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


@cache
def known_words(things: tuple[Thing, ...] = THINGS, layouts: tuple[str, ...] = LAYOUTS) -> tuple[str, ...]:
    """Every lower-case word that a caption of `things` in `layouts` can contain, sorted."""
    phrases = [name for thing in things for name in thing.names]
    phrases += [*COLOURS, *_GROUND_WORDS, *_DEPICTIONS, "a", "an", "the"]
    phrases += [word for words in _COLOUR_WORDS.values() for word in words]
    phrases += [word for words in _SIZE_WORDS.values() for word in words]
    phrases += _CENTRE_WORDS
    templates = [*_TEMPLATES, _DEPICTED, *_PLACED[:2]]
    if "corner" in layouts:
        phrases += [*POSITIONS, *(word for words in _PLACE_WORDS.values() for word in words)]
        templates += _PLACED
    if "pair" in layouts:
        templates += _PAIRED
    phrases += [re.sub(r"\{\w+\}", " ", template) for template in templates]
    return tuple(sorted({word for phrase in phrases for word in _letters(phrase)}))


def unknown_words_note(
    prompts: Iterable[str], metadata: Mapping[str, Any], reported: set[str], model: str | None = None
) -> str | None:
    """Returns two lines about words of the prompts that a model does not know, or None if it knows them all.

    The word list is the "vocabulary" in a bundle's metadata; a model without one knows every word. Words in `reported`
    are skipped, and new ones are added to it. `model` is the source for `inspect`, by default the shipped bundle.
    """
    known = metadata.get("vocabulary", {}).get("words")
    if known is None:
        return None
    words = [word for word in dict.fromkeys(_letters(" ".join(prompts))) if word not in {*known, *reported}]
    if not words:
        return None
    reported.update(words)
    candidates = [*metadata["vocabulary"].get("things", ()), *(word for word in known if len(word) > 2)]
    nearest = dict.fromkeys(near for word in words for near in get_close_matches(word, candidates, n=2))
    quoted = [f'"{word}"' for word in words]
    verb = "is" if len(words) == 1 else "are"
    hint = f"; nearest: {', '.join(list(nearest)[:4])}" if nearest else ""
    model = model or ("demo-v1" if metadata.get("version") == "v1" else "demo")
    return (
        f"{listed(quoted, most=5)} {verb} unknown to this model{hint}\n"
        f"`python -m wuerstchen_core inspect {model} --words` lists the {len(known)} words that it knows"
    )


def word_list(vocabulary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the words of a bundle's "vocabulary" by group: things, backgrounds, sizes, positions, shapes, others."""
    layouts = vocabulary.get("layouts", ())
    groups = {
        "things": list(vocabulary.get("things", ())),
        "backgrounds": list(vocabulary.get("colours", ())),
        "sizes": list(vocabulary.get("sizes", ())),
        "positions": [*(POSITIONS if "corner" in layouts else ()), *(["side by side"] if "pair" in layouts else [])],
        "shapes": list(vocabulary.get("shapes", ())),
    }
    used = {word for names in groups.values() for name in names for word in _letters(name)}
    groups["synonyms and other words"] = [word for word in vocabulary.get("words", ()) if word not in used]
    return {group: names for group, names in groups.items() if names}
