"""Questions about one or two images, with their answers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from consumer.runners.demonstration.training.scenes import COLOURS, SHAPES, Scene
from consumer.runners.demonstration.training.sentences import a, description, named, place_words

_TELL = ("Describe", "Caption", "Explain", "Tell me about", "Summarize", "Please describe")
_IT = ("this picture", "the picture", "this image", "the image", "it", "this")
_HOW = ("", "", "", " in one sentence", " briefly", " in detail", " please")
_WHAT = (
    "What is this?",
    "What do you see?",
    "What is it?",
    "What is in this picture?",
    "What is in the picture?",
    "What is in the image?",
    "What is shown in this image?",
    "What does the picture show?",
    "What can you see in this picture?",
    "What is there to see?",
    "Describe what you see.",
)
_DESCRIBE_ALL = (
    "Describe these pictures.",
    "Describe the pictures.",
    "Describe both pictures.",
    "Describe these images.",
    "Describe both images.",
    "What is in these pictures?",
    "What do you see in the pictures?",
    "What do you see?",
    "Describe them.",
)
_ORDER = ("first", "second")
_COMMON = 0.7  # probability of the more common spelling


@dataclass(frozen=True)
class Question:
    """A question about one or more images, and its answer."""

    question: str
    answer: str


def ask_for_description(scene: Scene, choice: random.Random) -> Question:
    """Return a question whose answer is the description of a scene."""
    text = choice.choice(_WHAT)
    if choice.random() < 0.6:
        text = f"{choice.choice(_TELL)} {choice.choice(_IT)}{choice.choice(_HOW)}."
    return Question(text, description(scene))


def ask_about(scene: Scene, choice: random.Random) -> Question:
    """Return a question about a detail of one image."""
    kinds = [_ask_background, _ask_how_many, _ask_whether, _ask_colour, _ask_shape]
    if len(scene.things) == 1:
        kinds += [_ask_where, _ask_size, _ask_colour, _ask_shape]
    else:
        kinds += [_ask_relation, _ask_relation]
    return choice.choice(kinds)(scene, choice)


def ask_about_two(scenes: Sequence[Scene], choice: random.Random) -> Question:
    """Return a question about two images."""
    kind = choice.randrange(4)
    which = choice.randrange(2)
    if kind == 0:
        answer = " ".join(
            f"The {nth} picture: {_lower_first(description(scene))}"
            for nth, scene in zip(_ORDER, scenes, strict=True)
        )
        return Question(choice.choice(_DESCRIBE_ALL), answer)
    if kind == 1:
        return _ask_of_one(scenes[which], _ORDER[which], choice)
    if kind == 2:
        return _ask_which(scenes, choice.choice(scenes[which].things).shape, choice)
    colour = "colour" if choice.random() < _COMMON else "color"
    question = f"What {colour} is the background of the {_ORDER[which]} picture?"
    return Question(question, _ask_background(scenes[which], choice).answer)


def _ask_of_one(scene: Scene, nth: str, choice: random.Random) -> Question:
    ways = (
        f"Describe the {nth} picture.",
        f"What is in the {nth} picture?",
        f"What is shown in the {nth} image?",
    )
    return Question(choice.choice(ways), description(scene))


def _ask_which(scenes: Sequence[Scene], shape: str, choice: random.Random) -> Question:
    found = [any(thing.shape == shape for thing in scene.things) for scene in scenes]
    ways = (
        f"Which picture has a {shape}?",
        f"Which picture shows a {shape}?",
        f"In which picture is a {shape}?",
    )
    answer = "Both pictures." if all(found) else f"The {_ORDER[found.index(True)]} picture."
    return Question(choice.choice(ways), answer)


def _spelling(choice: random.Random) -> str:
    return choice.choice(("colour", "color"))


def _ask_background(scene: Scene, choice: random.Random) -> Question:
    colour = _spelling(choice)
    ways = (f"What {colour} is the background?", f"What is the background {colour}?")
    return Question(choice.choice(ways), f"The background is {scene.background}.")


def _ask_how_many(scene: Scene, choice: random.Random) -> Question:
    ways = ("How many shapes are there?", "How many shapes are in the picture?")
    answer = "There is one shape." if len(scene.things) == 1 else "There are two shapes."
    return Question(choice.choice(ways), answer)


def _ask_whether(scene: Scene, choice: random.Random) -> Question:
    colour, shape = choice.choice(list(COLOURS)), choice.choice(SHAPES)
    if choice.random() < 0.6:
        thing = choice.choice(scene.things)
        colour, shape = thing.colour, thing.shape
        if choice.random() < 0.3:
            colour = choice.choice(list(COLOURS))
    if choice.random() < 0.5:
        there = any(t.shape == shape for t in scene.things)
        text = f"a {shape}"
    else:
        there = any((t.colour, t.shape) == (colour, shape) for t in scene.things)
        text = a(f"{colour} {shape}")
    ways = (f"Is there {text}?", f"Is there {text} in the picture?", f"Do you see {text}?")
    answer = f"Yes, there is {text}." if there else f"No, there is not {text}."
    return Question(choice.choice(ways), answer)


def _ask_colour(scene: Scene, choice: random.Random) -> Question:
    thing = choice.choice(scene.things)
    if sum(t.shape == thing.shape for t in scene.things) > 1:
        return _ask_background(scene, choice)
    colour = _spelling(choice)
    ways = [f"What {colour} is the {thing.shape}?", f"What {colour} does the {thing.shape} have?"]
    if len(scene.things) == 1:
        ways.append(f"What {colour} is the shape?")
    return Question(choice.choice(ways), f"The {thing.shape} is {thing.colour}.")


def _ask_shape(scene: Scene, choice: random.Random) -> Question:
    thing = choice.choice(scene.things)
    if len(scene.things) == 1:
        of_one = ("What shape is it?", "What shape is this?", "Which shape is in the picture?")
        return Question(choice.choice(of_one), f"The shape is {a(thing.shape)}.")
    if sum(t.colour == thing.colour for t in scene.things) > 1:
        return _ask_how_many(scene, choice)
    ways = (f"What shape is {thing.colour}?", f"Which shape is {thing.colour}?")
    return Question(choice.choice(ways), f"The {thing.shape} is {thing.colour}.")


def _ask_where(scene: Scene, choice: random.Random) -> Question:
    thing = scene.things[0]
    ways = (f"Where is the {thing.shape}?", "Where is it?", "Where is the shape?")
    return Question(choice.choice(ways), f"The {thing.shape} is {place_words(scene.place)}.")


def _ask_size(scene: Scene, choice: random.Random) -> Question:
    thing = scene.things[0]
    ways = (
        f"How large is the {thing.shape}?",
        f"How big is the {thing.shape}?",
        "What size is it?",
    )
    return Question(choice.choice(ways), f"The {thing.shape} is {thing.size}.")


def _ask_relation(scene: Scene, choice: random.Random) -> Question:
    if choice.random() < 0.5:
        scene = scene.turned
    first, second = scene.things
    answer = f"{named(first).replace('a ', 'the ', 1)}"
    if first.shape == second.shape:
        return _ask_how_many(scene, choice)
    answer = f"The {first.shape} is {scene.relation} the {second.shape}."
    if choice.random() < 0.5:
        return Question(f"Where is the {first.shape}?", answer)
    return Question(
        f"What is {scene.relation} the {second.shape}?", f"{named(first).capitalize()}."
    )


def _lower_first(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
