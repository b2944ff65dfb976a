"""The world that the demonstration models know: one or two coloured shapes on a plain background.

A `Scene` describes the content of an image; `draw` draws it with small random variations.
`held_out` selects the combinations that no training image shows.
"""

import itertools
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

SIDE = 64  # pixels, each side of an image
_SMOOTHING = 8  # images are drawn larger by this factor and then reduced, for smooth edges

COLOURS = {
    "red": (220, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "purple": (140, 50, 185),
    "pink": (255, 145, 195),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# Half the width of a shape in pixels: for a single shape, and for one of two shapes.
SIZES = {"small": 8.5, "medium": 11.5, "large": 15.5}
SIZES_OF_TWO = {"small": 7.8, "medium": 9.8, "large": 12.0}
# Column and row of the middle of a single shape, in a grid of three by three.
PLACES = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "center": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
_THIRDS = (19.0, 32.0, 45.0)  # pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_APART = 15.5  # pixels from the middle of the image to the middle of each of two shapes

_SHIFT = 1.2  # pixels; maximum random shift of a shape in each direction
_STRETCH = 0.05  # maximum random change of the size of a shape
_HELD_OUT = 10  # one of this many combinations is held out


@dataclass(frozen=True)
class Thing:
    """One shape, with names from `COLOURS`, `SHAPES` and `SIZES`."""

    colour: str
    shape: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Attributes:
        background: Name from `COLOURS`, different from the colours of the things.
        things: One thing at `place`, or two things: the first is `relation` the second.
        place: Name from `PLACES`; for one thing.
        relation: Name from `RELATIONS`; for two things.
    """

    background: str
    things: tuple[Thing, ...]
    place: str = "center"
    relation: str = ""

    @property
    def turned(self) -> "Scene":
        """The scene with its two things in reverse order and the opposite relation."""
        opposite = {"left of": "right of", "above": "below"}
        opposite |= {after: before for before, after in opposite.items()}
        return Scene(self.background, self.things[::-1], relation=opposite[self.relation])


def held_out(scene: Scene) -> bool:
    """Return whether the training excludes a colour, shape and background of the scene."""
    return any(
        zlib.crc32(f"{t.colour} {t.shape} {scene.background}".encode()) % _HELD_OUT == 0
        for t in scene.things
    )


def single_scenes() -> Iterator[Scene]:
    """Yield every scene with one thing."""
    for colour, shape, background in product(COLOURS, SHAPES, COLOURS):
        if colour != background:
            for size, place in product(SIZES, PLACES):
                yield Scene(background, (Thing(colour, shape, size),), place)


def some_scene(choice: random.Random, *, of_two: float = 0.0) -> Scene:
    """Return a random scene that is not held out.

    Args:
        choice: Random generator.
        of_two: Probability of a scene with two things.
    """
    while True:
        scene = _any_scene(choice, two=choice.random() < of_two)
        if not held_out(scene):
            return scene


def some_plain_scene(choice: random.Random) -> Scene:
    """Return a random scene with one thing in the center, on white, that is not held out.

    It is the meaning of a prompt that names only a thing.
    """
    while True:
        thing = some_scene(choice).things[0]
        scene = Scene("white", (thing,))
        if thing.colour != "white" and not held_out(scene):
            return scene


def some_held_out_scene(choice: random.Random, *, two: bool) -> Scene:
    """Return a random held-out scene."""
    while True:
        scene = _any_scene(choice, two=two)
        if held_out(scene):
            return scene


def draw(scene: Scene, choice: random.Random) -> Image.Image:
    """Draw a scene as an RGB image of `SIDE` by `SIDE` pixels.

    Args:
        scene: What to draw.
        choice: Random generator of the shifts and size changes of the shapes.
    """
    image = Image.new("RGB", (SIDE * _SMOOTHING,) * 2, COLOURS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing, (x, y), radius in zip(scene.things, _middles(scene), _radii(scene), strict=True):
        middle = (x + choice.uniform(-_SHIFT, _SHIFT), y + choice.uniform(-_SHIFT, _SHIFT))
        scale = radius * choice.uniform(1 - _STRETCH, 1 + _STRETCH)
        points = [
            ((middle[0] + px * scale) * _SMOOTHING, (middle[1] + py * scale) * _SMOOTHING)
            for px, py in outline(thing.shape)
        ]
        canvas.polygon(points, fill=COLOURS[thing.colour])
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape around (0, 0), within a distance of about 1; y points down."""
    turn = 2 * math.pi
    match shape:
        case "circle":
            return [(math.cos(turn * n / 64), math.sin(turn * n / 64)) for n in range(64)]
        case "square":
            return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
        case "triangle":
            return [(0.0, -0.95), (1.05, 0.85), (-1.05, 0.85)]
        case "star":
            corners = [(turn * n / 10, 1.1 if n % 2 == 0 else 0.46) for n in range(10)]
            return [(r * math.sin(a), 0.06 - r * math.cos(a)) for a, r in corners]
        case "heart":
            angles = [turn * n / 64 for n in range(64)]
            return [
                (
                    math.sin(a) ** 3,
                    -(
                        13 * math.cos(a)
                        - 5 * math.cos(2 * a)
                        - 2 * math.cos(3 * a)
                        - math.cos(4 * a)
                    )
                    / 16
                    - 0.1,
                )
                for a in angles
            ]
        case "cross":
            arm = 0.34
            return [
                (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
                (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
            ]  # fmt: skip
    raise ValueError(f"there is no shape {shape}")


def _any_scene(choice: random.Random, *, two: bool) -> Scene:
    background = choice.choice(list(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    sizes = list(SIZES)
    if not two:
        thing = Thing(choice.choice(colours), choice.choice(SHAPES), choice.choice(sizes))
        return Scene(background, (thing,), choice.choice(list(PLACES)))
    things = tuple(
        Thing(
            choice.choice(colours),
            choice.choice(SHAPES),
            choice.choices(sizes, weights=(1, 4, 1))[0],
        )
        for _ in range(2)
    )
    if (things[0].colour, things[0].shape) == (things[1].colour, things[1].shape):
        return _any_scene(choice, two=two)  # "left of" would have no meaning
    return Scene(background, things, relation=choice.choice(list(RELATIONS)))


def _middles(scene: Scene) -> list[tuple[float, float]]:
    if len(scene.things) == 1:
        column, row = PLACES[scene.place]
        return [(_THIRDS[column], _THIRDS[row])]
    dx, dy = (_APART * part for part in RELATIONS[scene.relation])
    middle = SIDE / 2
    return [(middle + dx, middle + dy), (middle - dx, middle - dy)]


def _radii(scene: Scene) -> list[float]:
    sizes = SIZES if len(scene.things) == 1 else SIZES_OF_TWO
    return [sizes[thing.size] for thing in scene.things]


ATTRIBUTES = (10, 3, 9, 10, 6, 3, 10, 6, 3)  # number of values of each of `attributes`
NONE = -100  # a missing attribute; torch leaves this label out of its losses


def attributes(scene: Scene) -> list[int]:
    """Return a scene as numbers, the labels for the training of text encoders.

    The numbers are the background, the arrangement (one thing, side by side, one above the other),
    the place, and the colour, shape and size of each thing, starting at the left or the top.
    """
    if scene.relation in {"right of", "below"}:
        scene = scene.turned
    arrangement = 0 if not scene.relation else 1 + (scene.relation == "above")
    place = NONE if scene.relation else list(PLACES).index(scene.place)
    numbers = [list(COLOURS).index(scene.background), arrangement, place]
    for thing in scene.things:
        numbers += [
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            list(SIZES).index(thing.size),
        ]
    return numbers + [NONE] * (len(ATTRIBUTES) - len(numbers))


def covered(scene: Scene, across: int) -> list[tuple[int, int, int, int]]:
    """Return the content of each cell of an image, the labels for the training of a vision tower.

    Args:
        scene: The content of the image.
        across: Number of cells in a row and in a column.

    Returns:
        For each cell, row by row: the numbers of its shape, colour and size, from 1, or 0 for
        background; and the number of the background's colour, from 0.
    """
    colours, sizes = list(COLOURS), list(SIZES)
    side = SIDE / across
    cells = []
    for row, column in itertools.product(range(across), repeat=2):
        x, y = (column + 0.5) * side, (row + 0.5) * side
        here = (0, 0, 0)
        for thing, middle, radius in zip(scene.things, _middles(scene), _radii(scene), strict=True):
            if math.dist((x, y), middle) < max(radius, 0.75 * side):
                here = (
                    SHAPES.index(thing.shape) + 1,
                    colours.index(thing.colour) + 1,
                    sizes.index(thing.size) + 1,
                )
        cells.append((*here, colours.index(scene.background)))
    return cells
