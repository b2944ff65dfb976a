"""Prompts for a scene, in many wordings.

A prompt without a size, a place or a background means a medium shape in the center, on white. A
prompt without a colour or a shape means any colour or shape.
"""

import random
from collections.abc import Sequence

from consumer.runners.demonstration.training.scenes import Scene, Thing
from consumer.runners.demonstration.training.sentences import a

_SHAPE_WORDS = {"circle": ("circle", "disc"), "cross": ("cross", "plus sign")}
_COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet")}
_SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
_NAMES_MEDIUM = 0.25  # probability that a prompt names a medium size
_NAMES_CENTER = 0.45
_NAMES_WHITE = 0.5

_CORNER = "in the {0} {1} corner", "at the {0} {1}", "in the {0} {1}", "{0} {1}", "at {0} {1}"
_EDGE = "at the {0}", "near the {0}", "{0}", "at the {0} edge", "in the {0} part"
_SIDE = "on the {0}", "at the {0}", "{0}", "on the {0} side", "near the {0} edge"
_CENTER = "in the center", "in the centre", "in the middle", "centered", "center", "at the center"
_OTHER_WORDS = {"top": "upper", "bottom": "lower"}

_INTRODUCTIONS = (
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "draw ",
    "paint ",
    "show ",
    "show me ",
    "please draw ",
    "create ",
    "generate ",
    "make a picture of ",
    "i want ",
    "there is ",
)
_PLAIN = 0.6  # probability of a prompt without an introduction
_OF_BACKGROUND = (
    "on {a} background",
    "on {c}",
    "against {a} background",
    "with {a} background",
    "over {a} background",
    "in front of {a} background",
    "on a background of {c}",
    "{c} background",
)
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
_BOTH_SIDES = {
    "left of": ("left", "right", "on the"),
    "above": ("top", "bottom", "at the"),
}


def prompt(scene: Scene, choice: random.Random) -> str:
    """Return a random prompt for a scene, in lower case."""
    if len(scene.things) == 1:
        return _prompt_for_one(scene, choice)
    return _prompt_for_two(scene, choice)


def vague_prompt(scene: Scene, choice: random.Random) -> str:
    """Return a prompt that names one or two attributes only."""
    thing = choice.choice(scene.things)
    colour, shape = _colour(thing.colour, choice), _shape(thing.shape, choice)
    return choice.choice(
        (
            colour,
            shape,
            f"a {shape}",
            f"something {colour}",
            f"{a(colour)} shape",
            f"{a(colour)} {shape}" if _is_default(scene) else shape,
            _background(scene.background, choice),
            f"a {shape} {_background(scene.background, choice)}",
            f"{a(colour)} shape {_background(scene.background, choice)}",
        )
    )


def _prompt_for_one(scene: Scene, choice: random.Random) -> str:
    thing = scene.things[0]
    noun = _noun(thing, choice)
    background = ""
    if scene.background != "white" or choice.random() < _NAMES_WHITE:
        background = _background(scene.background, choice)
    place = ""
    if scene.place != "center" or choice.random() < _NAMES_CENTER:
        place = _place(scene.place, choice)
    if choice.random() < 0.12:
        bare = f"{_colour(thing.colour, choice)} {_shape(thing.shape, choice)}"
        size = "" if thing.size == "medium" else choice.choice(_SIZE_WORDS[thing.size])
        parts = [bare, size, background, place]
        return _joined(parts, ", ")
    introduction = "" if choice.random() < _PLAIN else choice.choice(_INTRODUCTIONS)
    order = choice.choices(
        (
            (noun, background, place),
            (noun, place, background),
            (place + "," if place else "", noun, background),
            (background + "," if background else "", noun, place),
        ),
        weights=(5, 4, 1, 1),
    )[0]
    if order[0] is not noun:
        introduction = ""
    return introduction + _joined(order, " ")


def _prompt_for_two(scene: Scene, choice: random.Random) -> str:
    if choice.random() < 0.5:
        scene = scene.turned
    first, second = (_noun(thing, choice) for thing in scene.things)
    introduction = "" if choice.random() < _PLAIN else choice.choice(_INTRODUCTIONS)
    background = ""
    if scene.background != "white" or choice.random() < _NAMES_WHITE:
        background = _background(scene.background, choice)
    chance = choice.random()
    if chance < 0.7:
        words = choice.choice(_RELATION_WORDS[scene.relation])
        text = f"{first} {words} {second}"
    elif chance < 0.85:
        upright = scene if scene.relation in _BOTH_SIDES else scene.turned
        one, other, at = _BOTH_SIDES[upright.relation]
        first, second = (_noun(thing, choice) for thing in upright.things)
        text = f"{first} {at} {one} and {second} {at} {other}"
    else:
        joint = choice.choice(("and", "and", "next to", "beside"))
        if joint != "and" and scene.relation in {"above", "below"}:
            joint = "and"
        text = f"{first} {joint} {second}"
    return introduction + _joined((text, background), " ")


def _noun(thing: Thing, choice: random.Random) -> str:
    colour, shape = _colour(thing.colour, choice), _shape(thing.shape, choice)
    size = ""
    if thing.size != "medium" or choice.random() < _NAMES_MEDIUM:
        size = _one_of(_SIZE_WORDS[thing.size], choice)
    if size and choice.random() < 0.08:
        return f"a {shape} that is {size} and {colour}"
    return a(f"{size} {colour} {shape}".strip())


def _colour(colour: str, choice: random.Random) -> str:
    return _one_of(_COLOUR_WORDS.get(colour, (colour,)), choice)


def _shape(shape: str, choice: random.Random) -> str:
    return _one_of(_SHAPE_WORDS.get(shape, (shape,)), choice)


def _background(colour: str, choice: random.Random) -> str:
    colour = _colour(colour, choice)
    return _one_of(_OF_BACKGROUND, choice).format(a=a(colour), c=colour)


def _place(place: str, choice: random.Random) -> str:
    if place == "center":
        return _one_of(_CENTER, choice)
    words = place.split()
    if choice.random() < 0.3:
        words = [_OTHER_WORDS.get(word, word) for word in words]
    if len(words) == 2:
        return _one_of(_CORNER, choice).format(*words)
    if words[0] in {"upper", "lower"}:
        return f"in the {words[0]} part"
    return _one_of(_EDGE if place in {"top", "bottom"} else _SIDE, choice).format(*words)


def _one_of(ways: Sequence[str], choice: random.Random) -> str:
    return ways[0] if choice.random() < 0.5 else choice.choice(ways)


def _is_default(scene: Scene) -> bool:
    return scene.background == "white" and scene.place == "center" and not scene.relation


def _joined(parts: Sequence[str], by: str) -> str:
    return by.join(part for part in parts if part)
