"""The pixel checker reads valid scenes and returns None for other images."""

import random
from collections.abc import Callable
from itertools import product

import pytest
from PIL import Image, ImageDraw, ImageFilter

from consumer.runners.demonstration.training.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    Thing,
    draw,
    some_scene,
)
from tests.support.pixel_checker import read_scene, same_scene


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_checker_reads_every_shape_and_size_at_every_position(shape: str, size: str) -> None:
    choice = random.Random(0)
    for place in PLACES:
        scene = Scene("white", (Thing("red", shape, size),), place)
        assert read_scene(draw(scene, choice)) == scene


def test_checker_reads_every_pair_of_colours() -> None:
    choice = random.Random(1)
    for colour, background in product(COLOURS, COLOURS):
        if colour != background:
            scene = Scene(background, (Thing(colour, "heart", "medium"),))
            assert read_scene(draw(scene, choice)) == scene


def test_checker_reads_two_things_in_any_order() -> None:
    choice = random.Random(2)
    for _ in range(150):
        scene = some_scene(choice, of_two=1.0)
        actual = read_scene(draw(scene, choice))
        assert actual is not None
        # Of two small things the size can be read wrong: it is the middle of three that are near.
        assert same_scene(_without_sizes(actual), _without_sizes(scene))


def test_checker_accepts_blurred_edges() -> None:
    choice = random.Random(3)
    for _ in range(60):
        scene = some_scene(choice)
        assert read_scene(draw(scene, choice).filter(ImageFilter.GaussianBlur(0.7))) == scene


def _half(canvas: ImageDraw.ImageDraw) -> None:
    canvas.pieslice((16, 16, 48, 48), 0, 180, fill="red")


def _ring(canvas: ImageDraw.ImageDraw) -> None:
    canvas.ellipse((16, 16, 48, 48), outline="red", width=4)


def _three(canvas: ImageDraw.ImageDraw) -> None:
    for x in (4, 24, 44):
        canvas.ellipse((x, 24, x + 15, 39), fill="red")


def _long(canvas: ImageDraw.ImageDraw) -> None:
    canvas.rectangle((8, 26, 56, 38), fill="red")


def _two_colours(canvas: ImageDraw.ImageDraw) -> None:
    canvas.rectangle((0, 0, 64, 40), fill="blue")
    canvas.ellipse((22, 22, 42, 42), fill="red")


def _nothing(_: ImageDraw.ImageDraw) -> None:
    pass


@pytest.mark.parametrize("fault", [_half, _ring, _three, _long, _two_colours, _nothing])
def test_checker_returns_none_without_a_scene(fault: Callable[[ImageDraw.ImageDraw], None]) -> None:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    fault(ImageDraw.Draw(image))
    assert read_scene(image) is None


def _small_half(canvas: ImageDraw.ImageDraw) -> None:
    canvas.pieslice((23, 23, 41, 41), 0, 180, fill="red")


def _small_ring(canvas: ImageDraw.ImageDraw) -> None:
    canvas.ellipse((24, 24, 40, 40), outline="red", width=3)


def _small_long(canvas: ImageDraw.ImageDraw) -> None:
    canvas.rectangle((22, 28, 42, 33), fill="red")


def _small_corner(canvas: ImageDraw.ImageDraw) -> None:
    canvas.rectangle((24, 24, 29, 40), fill="red")
    canvas.rectangle((24, 35, 40, 40), fill="red")


@pytest.mark.parametrize("fault", [_small_half, _small_ring, _small_long, _small_corner])
def test_checker_returns_none_for_small_unknown_shapes(
    fault: Callable[[ImageDraw.ImageDraw], None],
) -> None:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    fault(ImageDraw.Draw(image))
    assert read_scene(image.filter(ImageFilter.GaussianBlur(0.7))) is None
    assert read_scene(image) is None


def test_checker_reads_blurred_small_shapes() -> None:
    choice = random.Random(6)
    for shape in SHAPES:
        for place in PLACES:
            scene = Scene("blue", (Thing("yellow", shape, "small"),), place)
            actual = read_scene(draw(scene, choice).filter(ImageFilter.GaussianBlur(0.9)))
            assert actual is not None
            assert actual.things[0].shape == shape


def test_checker_returns_none_for_noise() -> None:
    noise = Image.frombytes("RGB", (SIDE, SIDE), random.Random(4).randbytes(SIDE * SIDE * 3))
    assert read_scene(noise) is None


def test_checker_does_not_guess_a_strongly_blurred_shape() -> None:
    star = draw(Scene("white", (Thing("red", "star", "small"),)), random.Random(5))
    actual = read_scene(star.filter(ImageFilter.GaussianBlur(4)))
    assert actual is None or actual.things[0].shape != "star"


def _without_sizes(scene: Scene) -> Scene:
    things = tuple(Thing(thing.colour, thing.shape) for thing in scene.things)
    return Scene(scene.background, things, scene.place, scene.relation)


def test_scenes_of_one_and_two_things_differ() -> None:
    red, blue = Thing("red", "star"), Thing("blue", "heart")
    one, two = Scene("white", (red,)), Scene("white", (red, blue), relation="above")
    assert not same_scene(one, two)
    assert not same_scene(two, one)
    assert same_scene(two, two.turned)
