"""The vocabulary of the demo models: 128 things on 8 backgrounds, with captions.

A scene is one thing on a flat background, large or small in the middle or small in a corner, two small things side by
side, or three in a triangle; several can be the same thing. Training leaves out a fifth of the combinations of thing
and background, which test generalisation. A bundle's metadata lists the things, layouts and words that its model was
trained on.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from ..common.text import listed

# The order is fixed: `held_out` depends on the index.
_NAMES = (
    # fruit
    "red apple", "banana", "strawberry", "lemon", "grapes", "watermelon", "cherries", "pineapple", "pear",
    # vegetables and other food
    "carrot", "broccoli", "eggplant", "corn", "mushroom", "avocado", "hamburger", "pizza", "french fries", "doughnut",
    "cupcake", "ice cream", "lollipop", "pretzel",
    # animals
    "cat", "dog", "panda", "frog", "pig", "fox", "rabbit", "penguin", "owl", "flamingo", "parrot", "elephant",
    "turtle", "dinosaur", "octopus", "crab", "fish", "butterfly", "ladybug", "bee",
    # vehicles
    "red car", "tractor", "train", "rocket", "airplane", "helicopter", "sailboat",
    # objects
    "umbrella", "key", "house", "light bulb", "alarm clock", "guitar", "soccer ball", "basketball", "crown", "gift",
    "teddy bear",
    # nature
    "tree", "cactus", "sunflower", "sun", "moon", "star", "rainbow", "snowman", "heart",
    # faces
    "robot", "pumpkin",
    # added later, in the same order of kinds
    "tomato", "peach", "chili pepper", "croissant", "bread", "cheese", "cookie", "fried egg", "taco", "honey pot",
    "cake", "cup of coffee", "lion", "shark", "koala", "monkey", "cow", "chicken", "unicorn", "swan", "duck", "snail",
    "spider", "dolphin", "whale", "bat", "chick", "wolf", "bus", "ambulance", "scooter", "flying saucer", "teapot",
    "drum", "trumpet", "violin", "bell", "balloon", "kite", "scissors", "camera", "telephone", "hat", "shirt",
    "diamond", "anchor", "candle", "trophy", "cloud", "fire", "snowflake", "tulip", "rose", "leaf", "fir", "ghost",
    # not in the shipped models: `tools.demo.adapt` adds each by a LoRA
    "potato", "tent", "otter",
)  # fmt: skip
_SYNONYMS = {
    "red apple": ("apple",), "watermelon": ("slice of watermelon", "watermelon slice"), "eggplant": ("aubergine",),
    "corn": ("maize", "sweetcorn"), "mushroom": ("toadstool",), "hamburger": ("burger", "cheeseburger"),
    "pizza": ("slice of pizza", "pizza slice"), "french fries": ("fries",), "doughnut": ("donut",),
    "cupcake": ("muffin",), "ice cream": ("ice cream cone",), "lollipop": ("lolly",), "cat": ("kitten", "kitty"),
    "dog": ("puppy",), "pig": ("piglet", "piggy"), "rabbit": ("bunny",), "turtle": ("tortoise",),
    "dinosaur": ("dino", "brontosaurus"), "ladybug": ("ladybird",), "bee": ("honeybee", "bumblebee"),
    "red car": ("car", "automobile"), "train": ("steam train", "locomotive"), "rocket": ("spaceship",),
    "airplane": ("plane", "aeroplane"), "sailboat": ("sailing boat", "boat"), "light bulb": ("lightbulb", "bulb"),
    "alarm clock": ("clock",), "guitar": ("electric guitar",), "soccer ball": ("football",),
    "gift": ("present", "gift box"), "teddy bear": ("teddy",), "sun": ("sunshine",), "moon": ("crescent moon",),
    "heart": ("red heart",), "robot": ("robot face",), "pumpkin": ("halloween pumpkin",),
    "chili pepper": ("chili", "hot pepper"), "bread": ("loaf of bread", "toast"), "cheese": ("piece of cheese",),
    "cookie": ("biscuit",), "fried egg": ("egg in a pan",), "honey pot": ("pot of honey", "honey"),
    "cake": ("birthday cake",), "cup of coffee": ("coffee", "cup of tea"), "chicken": ("hen",),
    "chick": ("baby chick",), "scooter": ("moped",), "flying saucer": ("ufo",), "violin": ("fiddle",),
    "telephone": ("phone",), "hat": ("top hat",), "diamond": ("gem", "gemstone"), "trophy": ("golden cup",),
    "fire": ("flame",), "leaf": ("maple leaf",), "fir": ("conifer",),
}  # fmt: skip
# Names of the drawings in artwork.json.xz, where they differ from the thing's name.
_ICONS = {
    "corn": "ear-of-corn", "ice cream": "soft-ice-cream", "cat": "cat-face", "dog": "dog-face", "pig": "pig-face",
    "rabbit": "rabbit-face", "dinosaur": "sauropod", "ladybug": "lady-beetle", "bee": "honeybee",
    "red car": "automobile", "train": "locomotive", "gift": "wrapped-gift", "tree": "deciduous-tree",
    "moon": "crescent-moon", "snowman": "snowman-without-snow", "heart": "red-heart", "pumpkin": "jack-o-lantern",
    "chili pepper": "hot-pepper", "cheese": "cheese-wedge", "fried egg": "cooking", "cake": "birthday-cake",
    "cup of coffee": "hot-beverage", "whale": "spouting-whale", "chick": "baby-chick", "scooter": "motor-scooter",
    "hat": "top-hat", "shirt": "t-shirt", "diamond": "gem-stone", "leaf": "maple-leaf", "fir": "evergreen-tree",
}  # fmt: skip
_NO_ARTICLE = {"grapes", "cherries", "broccoli", "corn", "french fries", "bread", "cheese", "scissors"}


@dataclass(frozen=True)
class Thing:
    """Something that a prompt can name; `icon` is the name of its drawing."""

    name: str
    icon: str
    synonyms: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    @property
    def countable(self) -> bool:
        """True if captions count it."""
        return self.name not in _NO_ARTICLE

    @property
    def plurals(self) -> tuple[str, ...]:
        """The plurals of its names; none if it is not countable."""
        return tuple(_plural(name) for name in self.names if self.countable and name not in _UNCOUNTABLE)


def _plural(name: str) -> str:
    """Returns the plural of a name such as "cup of coffee"."""
    phrase, of, rest = name.partition(" of ")
    *words, noun = phrase.split(" ")
    if noun in _PLURALS:
        plural = _PLURALS[noun]
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        plural = f"{noun[:-1]}ies"
    else:
        plural = noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
    return " ".join([*words, plural]) + of + rest


THINGS = tuple(Thing(name, _ICONS.get(name, name.replace(" ", "-")), _SYNONYMS.get(name, ())) for name in _NAMES)
TRAINED_THINGS = _NAMES.index("potato")

COLOURS = {  # of the background, in RGB
    "red": (196, 32, 52),
    "orange": (252, 150, 58),
    "yellow": (255, 238, 130),
    "green": (96, 196, 140),
    "blue": (50, 98, 205),
    "purple": (176, 128, 226),
    "pink": (250, 172, 204),
    "gray": (134, 140, 146),
}

SIZES = {"large": 196, "small": 120}  # edge of a thing in pixels, on a canvas of 256
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right")
SHAPES = {  # width, height
    "square": (256, 256),
    "portrait": (256, 384),
    "landscape": (384, 256),
    "tall": (256, 512),
    "wide": (512, 256),
}
# Kinds of scenes: "two" and "three" show one thing two and three times, "pair" and "trio" different things.
LAYOUTS = ("large", "small", "corner", "pair", "two", "three", "trio")
SIMPLE = LAYOUTS[:2]  # one thing in the middle

_COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet")}
_SIZE_WORDS = {"large": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
_GROUND_WORDS = ("background", "backdrop")
_DEPICTIONS = ("picture", "image", "drawing", "emoji", "icon", "illustration")
_TEMPLATES = {  # and their weights
    "{subject} on {ground}": 10,
    "{subject} against {ground}": 2,
    "{subject} with {ground}": 2,
    "{subject} in front of {ground}": 2,
    "{subject} and {ground} behind": 1,
    "on {ground}, {subject}": 4,
    "{subject}, {ground}": 4,
    "{ground}, {subject}": 3,
    "{ground} behind {subject}": 2,
    "{subject} on {colour}": 3,
}
_CENTRE_WORDS = ("centre", "center", "middle")
_ROW_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_POSITIONED = ("in the {position}", "at the {position}", "in the {position} corner")
_PAIRED = {
    "{subject} and {other}": 6,
    "{subject} next to {other}": 1,
    "{subject} beside {other}": 1,
    "{subject} on the left and {other} on the right": 2,
}
_TRIO = "{first}, {second} and {third}"
_NUMBERS = {  # and their weights; without a number, a plural is two or three
    "two": {"two": 6, "2": 2, "a pair of": 1, "": 1},
    "three": {"three": 6, "3": 2, "": 1},
}
_UNCOUNTABLE = {"sunshine", "honey", "egg in a pan"}  # names without a plural
_PLURALS = {"fish": "fish", "cactus": "cacti", "leaf": "leaves", "wolf": "wolves", "tomato": "tomatoes"}
_PLURALS |= {"potato": "potatoes", "snowman": "snowmen"}
_TRIO_STEPS = ((5, 77), (11, 40), (23, 90), (31, 8), (47, 101), (59, 17), (67, 113), (83, 29))  # to the other things
# How often a caption names the size
_SIZE_WORD_RATES = {"large": 0.2, "small": 1.0, "corner": 0.5} | dict.fromkeys(("pair", "two", "three", "trio"), 0.1)
_NAMED = 5  # unknown words that a note names; it counts the others
_CONSONANT_SOUNDS = ("uni", "use", "eu", "one")  # "a unicorn", not "an unicorn"


class Scene(NamedTuple):
    """Indices into THINGS, COLOURS, SIZES, POSITIONS and SHAPES.

    `other` is the right one of two things. Of three, `thing` is above, `other` on the left and `third` on the right.
    """

    thing: int
    colour: int
    size: int
    position: int = 0
    shape: int = 0
    other: int | None = None
    third: int | None = None

    @property
    def things(self) -> tuple[int, ...]:
        """Its one, two or three things."""
        return tuple(thing for thing in (self.thing, self.other, self.third) if thing is not None)

    @property
    def layout(self) -> str:
        """Its kind, one of LAYOUTS."""
        if len(self.things) > 1:
            names = ("two", "three") if len(set(self.things)) == 1 else ("pair", "trio")
            return names[len(self.things) - 2]
        return "corner" if self.position else list(SIZES)[self.size]


def scenes(layouts: Collection[str] = SIMPLE, shape: int = 0) -> list[Scene]:
    """Returns all scenes of these layouts in a fixed order: by thing, then by background.

    Of three different things, only eight scenes for each thing and background.
    """
    small, things = list(SIZES).index("small"), range(len(THINGS))
    found = []
    for thing, colour in product(things, range(len(COLOURS))):
        found += [Scene(thing, colour, size, 0, shape) for size, name in enumerate(SIZES) if name in layouts]
        if "corner" in layouts:
            found += [Scene(thing, colour, small, position, shape) for position in range(1, len(POSITIONS))]
        if "pair" in layouts:
            found += [Scene(thing, colour, small, 0, shape, other) for other in things if other != thing]
        if "two" in layouts and THINGS[thing].countable:
            found.append(Scene(thing, colour, small, 0, shape, thing))
        if "three" in layouts and THINGS[thing].countable:
            found.append(Scene(thing, colour, small, 0, shape, thing, thing))
        if "trio" in layouts:
            others = [[(thing + step) % len(THINGS) for step in steps] for steps in _TRIO_STEPS]
            found += [Scene(thing, colour, small, 0, shape, *pair) for pair in others]
    return found


def held_out(scene: Scene) -> bool:
    """True if training leaves out the combination of a thing of the scene and its background."""
    return any((3 * thing + scene.colour) % 5 == 0 for thing in scene.things)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Returns the plain caption of a scene, or with `rng` a random wording.

    A small thing in the middle is always called small. Other captions name the size only sometimes: large is the
    default, and things in corners and pairs are always small.
    """
    colour = list(COLOURS)[scene.colour]
    if rng is not None:
        return _random_case(_random_wording(scene, colour, rng), rng)
    if scene.layout in _NUMBERS:
        subject = f"{scene.layout} {THINGS[scene.thing].plurals[0]}"
    else:
        subject = _noun_phrase(scene.thing, "small" if scene.layout in ("small", "corner") else "")
    if scene.layout == "pair":
        subject = f"{subject} and {_noun_phrase(scene.things[1])}"
    elif scene.layout == "trio":
        subject = _join(subject, *map(_noun_phrase, scene.things[1:]))
    if scene.position:
        subject = f"{subject} in the {POSITIONS[scene.position]}"
    return f"{subject} on {_with_article(colour)} background"


def _join(first: str, second: str, third: str) -> str:
    return _TRIO.format(first=first, second=second, third=third)


def _noun_phrase(thing: int, adjective: str = "", article: str = "a", name: str = "") -> str:
    phrase = f"{adjective} {name or THINGS[thing].name}".strip()
    return phrase if THINGS[thing].name in _NO_ARTICLE else _with_article(phrase, article)


def _with_article(phrase: str, article: str = "a") -> str:
    """Puts an article in front: "a" (or "an", by sound), "the" or "", which is none."""
    if article != "a":
        return f"{article} {phrase}".strip()
    vowel = phrase[0] in "aeiou" and not phrase.startswith(_CONSONANT_SOUNDS)
    return f"{'an' if vowel else 'a'} {phrase}"


def _random_wording(scene: Scene, colour: str, rng: random.Random) -> str:
    article = rng.choices(("a", "the", ""), (6, 1, 3))[0]
    if scene.layout in _NUMBERS:
        subject = _random_plural(scene, rng)
    else:
        subject = _random_subject(scene.thing, scene, article, rng)
    others = [_random_subject(thing, scene, article, rng) for thing in scene.things[1:]]
    if scene.layout == "pair":
        subject = rng.choices(list(_PAIRED), list(_PAIRED.values()))[0].format(subject=subject, other=others[0])
    elif scene.layout == "trio":
        subject = _join(subject, *others)
    if rng.random() < 0.2:
        subject = f"{_with_article(rng.choice(_DEPICTIONS), article)} of {subject}"
    if scene.position:
        row, side = POSITIONS[scene.position].split()
        subject += " " + rng.choice(_POSITIONED).format(position=f"{rng.choice(_ROW_WORDS[row])} {side}")
    elif scene.other is None and rng.random() < 0.1:
        subject += " " + rng.choice(_POSITIONED[:2]).format(position=rng.choice(_CENTRE_WORDS))
    colour = rng.choice(_COLOUR_WORDS.get(colour, (colour,)))
    ground = _with_article(f"{colour} {rng.choices(_GROUND_WORDS, (4, 1))[0]}", article)
    template = rng.choices(list(_TEMPLATES), list(_TEMPLATES.values()))[0]
    return template.format(subject=subject, ground=ground, colour=colour)


def _random_subject(thing: int, scene: Scene, article: str, rng: random.Random) -> str:
    name = rng.choice((THINGS[thing].name, rng.choice(THINGS[thing].names)))
    named = rng.random() < _SIZE_WORD_RATES[scene.layout]
    return _noun_phrase(thing, rng.choice(_SIZE_WORDS[list(SIZES)[scene.size]]) if named else "", article, name)


def _random_plural(scene: Scene, rng: random.Random) -> str:
    plurals, numbers = THINGS[scene.thing].plurals, _NUMBERS[scene.layout]
    number = rng.choices(list(numbers), list(numbers.values()))[0]
    small = rng.choice(_SIZE_WORDS["small"]) if rng.random() < _SIZE_WORD_RATES[scene.layout] else ""
    name = rng.choice((plurals[0], rng.choice(plurals)))
    return " ".join(word for word in (number, small, name) if word)


def _random_case(text: str, rng: random.Random) -> str:
    """Randomly capitalises a caption or its first letter, and adds a full stop."""
    draw = rng.random()
    if draw < 0.2:
        text = text[0].upper() + text[1:]
    elif draw < 0.23:
        text = text.upper()
    return f"{text}." if rng.random() < 0.2 else text


def _split(text: str) -> list[str]:
    """Returns the words of a text in the form that the tokenizer gives them: composed and lower-case."""
    return re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower())


@cache
def known_words(things: tuple[Thing, ...] = THINGS, layouts: tuple[str, ...] = LAYOUTS) -> tuple[str, ...]:
    """Returns every lower-case word that captions of these things and layouts can contain, sorted."""
    groups = [thing.names for thing in things]
    groups += [*_COLOUR_WORDS.values(), *_SIZE_WORDS.values(), _GROUND_WORDS, _DEPICTIONS, _CENTRE_WORDS]
    groups += [tuple(COLOURS), ("a", "an", "the", "of"), tuple(_TEMPLATES), _POSITIONED[:2]]
    if "corner" in layouts:
        groups += [POSITIONS, *_ROW_WORDS.values(), _POSITIONED]
    if "pair" in layouts:
        groups += [tuple(_PAIRED)]
    if "trio" in layouts:
        groups += [(_TRIO,)]
    for name in {*_NUMBERS}.intersection(layouts):
        groups += [tuple(_NUMBERS[name]), *(thing.plurals for thing in things)]
    phrases = [re.sub(r"\{\w+\}", " ", phrase) for group in groups for phrase in group]
    return tuple(sorted({word for phrase in phrases for word in _split(phrase)}))


def unknown_words_note(
    prompts: Iterable[str], metadata: Mapping[str, Any], reported: set[str], model: str | None = None
) -> str | None:
    """Returns two lines about words of the prompts that a model does not know, or None if it knows them all.

    The word list is the "vocabulary" in a bundle's metadata; a model without one knows every word. Words in `reported`
    are skipped, and new ones are added to it. `model` is the source for `inspect`, by default the shipped bundle.
    """
    vocabulary = metadata.get("vocabulary", {})
    known = vocabulary.get("words", ())
    skipped = reported.union(known)
    words = [word for word in dict.fromkeys(_split(" ".join(prompts))) if word not in skipped]
    if not known or not words:
        return None
    reported.update(words)
    candidates = [*vocabulary.get("things", ()), *(word for word in known if len(word) > 2)]
    nearest = dict.fromkeys(near for word in words[:_NAMED] for near in get_close_matches(word, candidates, n=2))
    quoted = [f'"{word}"' for word in words]
    subject = f"{listed(quoted, most=_NAMED)} {'is' if len(words) == 1 else 'are'}"
    hint = f"; nearest: {', '.join(list(nearest)[:4])}" if nearest else ""
    model = model or ("demo-v1" if metadata.get("version") == "v1" else "demo")
    return (
        f"{subject} unknown to this model{hint}\n"
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
        "numbers": [name for name in _NUMBERS if name in layouts],
        "shapes": list(vocabulary.get("shapes", ())),
    }
    used = {word for names in groups.values() for name in names for word in _split(name)}
    groups["synonyms and other words"] = [word for word in vocabulary.get("words", ()) if word not in used]
    return {group: names for group, names in groups.items() if names}
