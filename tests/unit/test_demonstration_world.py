"""The training data of the demonstration models: images match their texts."""

import random
from itertools import product

import pytest

from consumer.runners.demonstration.training import prompts, questions
from consumer.runners.demonstration.training.scenes import (
    ATTRIBUTES,
    COLOURS,
    NONE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    attributes,
    covered,
    draw,
    held_out,
    outline,
    single_scenes,
    some_held_out_scene,
    some_plain_scene,
    some_scene,
)
from consumer.runners.demonstration.training.sentences import a, description

STAR = Scene("white", (Thing("red", "star", "small"),), "top")
PAIR = Scene("gray", (Thing("red", "circle"), Thing("blue", "square", "large")), relation="left of")


def test_description_of_a_scene_matches_its_prompt() -> None:
    assert description(STAR) == "A small red star on a white background at the top."
    assert description(PAIR) == "A red circle left of a large blue square on a gray background."
    assert description(PAIR.turned) == description(PAIR)


def test_no_two_scenes_have_the_same_description() -> None:
    by_description: dict[str, Scene] = {}
    for scene in single_scenes():
        assert by_description.setdefault(description(scene), scene) == scene


def test_training_has_no_held_out_combination() -> None:
    choice = random.Random(0)
    held_out_combinations = {
        (thing.colour, thing.shape, scene.background)
        for scene in single_scenes()
        for thing in scene.things
        if held_out(scene)
    }
    of_all = len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES)
    assert 0.07 < len(held_out_combinations) / of_all < 0.13
    for _ in range(3_000):
        scene = choice.choice((some_scene(choice, of_two=0.5), some_plain_scene(choice)))
        assert held_out_combinations.isdisjoint(
            (t.colour, t.shape, scene.background) for t in scene.things
        )
    for two in (False, True):
        assert held_out(some_held_out_scene(choice, two=two))


def test_training_has_every_pair_of_attributes() -> None:
    """Only combinations of three attributes are held out; training has each pair of attributes."""
    training = [scene for scene in single_scenes() if not held_out(scene)]
    pairs = {(s.things[0].colour, s.things[0].shape) for s in training}
    assert pairs == set(product(COLOURS, SHAPES))
    pairs = {(s.things[0].shape, s.background) for s in training}
    assert pairs == set(product(SHAPES, COLOURS))


def test_prompt_contains_every_non_default_attribute() -> None:
    choice = random.Random(1)
    words = {"disc": "circle", "plus": "cross", "grey": "gray", "violet": "purple"}
    for _ in range(2_000):
        scene = some_scene(choice, of_two=0.4)
        text = prompts.prompt(scene, choice)
        named = {words.get(word.strip(",").lower(), word.strip(",")) for word in text.split()}
        for thing in scene.things:
            assert {thing.colour, thing.shape} <= named
        if scene.background != "white":
            assert scene.background in named


def test_shortest_prompts_match_their_scenes() -> None:
    choice = random.Random(6)
    scenes = {
        prompts.prompt(scene, choice): scene
        for scene in (some_plain_scene(choice) for _ in range(5_000))
    }
    assert scenes["a blue star"] == Scene("white", (Thing("blue", "star"),))
    assert scenes["a small blue star"] == Scene("white", (Thing("blue", "star", "small"),))


def test_equal_seed_gives_equal_prompt_and_image() -> None:
    assert prompts.prompt(PAIR, random.Random(2)) == prompts.prompt(PAIR, random.Random(2))
    assert draw(PAIR, random.Random(2)).tobytes() == draw(PAIR, random.Random(2)).tobytes()
    assert draw(PAIR, random.Random(2)).tobytes() != draw(PAIR, random.Random(3)).tobytes()


def test_every_outline_is_inside_the_image() -> None:
    choice = random.Random(4)
    for scene in single_scenes():
        if (scene.things[0].size, scene.background) == ("large", "white"):
            image = draw(scene, choice)
            assert image.size == (SIDE, SIDE)
            corners = [(0, 0), (0, SIDE - 1), (SIDE - 1, 0), (SIDE - 1, SIDE - 1)]
            assert {image.getpixel(corner) for corner in corners} == {COLOURS["white"]}
    with pytest.raises(ValueError, match="no shape"):
        outline("hexagon")


def test_attributes_do_not_depend_on_the_order_of_things() -> None:
    assert attributes(PAIR) == attributes(PAIR.turned)
    assert attributes(PAIR)[2] == NONE  # two objects have no position
    assert attributes(STAR)[6:] == [NONE] * 3
    for relation in RELATIONS:
        numbers = attributes(Scene("gray", PAIR.things, relation=relation))
        assert all(n == NONE or n < most for n, most in zip(numbers, ATTRIBUTES, strict=True))


def test_cells_contain_the_thing_or_the_background() -> None:
    cells = covered(STAR, 4)
    white = list(COLOURS).index("white")
    assert {cell[3] for cell in cells} == {white}
    actual = {cell[:3] for cell in cells} - {(0, 0, 0)}
    assert actual == {(SHAPES.index("star") + 1, list(COLOURS).index("red") + 1, 1)}
    assert covered(Scene("white", STAR.things, "bottom"), 4) != cells


def test_answers_match_their_scene() -> None:
    choice = random.Random(5)
    expected = {
        "What colour is the background?": "The background is white.",
        "What shape is it?": "The shape is a star.",
        "Where is the star?": "The star is at the top.",
        "How large is the star?": "The star is small.",
        "What colour is the star?": "The star is red.",
        "How many shapes are there?": "There is one shape.",
        "Is there a star?": "Yes, there is a star.",
        "Is there a circle?": "No, there is not a circle.",
    }
    actual: dict[str, str] = {}
    for _ in range(4_000):
        question = questions.ask_about(STAR, choice)
        if question.question in expected:
            actual[question.question] = question.answer
    assert actual == expected


def test_question_about_two_images_has_the_right_answer() -> None:
    choice = random.Random(6)
    circle = Scene("blue", (Thing("pink", "circle"),), "left")
    answers = {
        question.question: question.answer
        for question in (questions.ask_about_two([STAR, circle], choice) for _ in range(500))
    }
    assert answers["Which picture has a star?"] == "The first picture."
    assert answers["Which picture has a circle?"] == "The second picture."
    assert answers["Describe the second picture."] == description(circle)
    assert answers["Describe both pictures."] == (
        "The first picture: a small red star on a white background at the top. "
        "The second picture: a pink circle on a blue background on the left."
    )


def test_article_matches_its_word() -> None:
    assert a("orange star") == "an orange star"
    assert a("red star") == "a red star"


def test_all_positions_differ() -> None:
    assert len(set(PLACES.values())) == len(PLACES) == 9
