"""Reads the scene that an image of the demonstration model shows from the pixels alone.

The checker uses the palette and the outlines of the shapes, and no model or prompt. It finds
regions of one colour with their positions and sizes. It compares each region with every outline.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from consumer.runners.demonstration.training.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    SIZES_OF_TWO,
    Scene,
    Thing,
    outline,
)

LARGE = 128  # pixels; each side of the enlarged image that is analysed
SCALE = LARGE / SIDE
MOST_OFF = 70.0  # distance in RGB; two colours of the palette are at least 75 apart
LEAST_INSIDE = 20  # pixels of a thing that have no part in its edge
LEAST_PIXELS = 90  # pixels of a thing; the smallest cross has about 240
LEAST_LIKE = 0.78  # intersection over union with the most similar outline
# Half the pixels of a small star are edge pixels, so a blurred small star matches its outline less.
# Its similarity to that outline must then clearly exceed the similarity to every other outline.
SMALL = 650  # pixels
LEAST_LIKE_SMALL = 0.70
LEAST_AHEAD = 0.10
LEAST_PLAIN = 0.80  # fraction of the background pixels that have the background colour


@dataclass(frozen=True)
class Region:
    """One region of an image.

    Attributes:
        thing: The shape, its colour, and its size as of a single thing.
        radius: Half the width with which the shape would be drawn, in pixels.
        middle: The centre of the drawn shape in pixels of the enlarged image: x and y.
    """

    thing: Thing
    radius: float
    middle: tuple[float, float]


def read_scene(image: Image.Image) -> Scene | None:
    """Return the scene that an image shows, or None if the image shows no scene."""
    pixels = np.asarray(
        image.convert("RGB").resize((LARGE, LARGE), Image.Resampling.BICUBIC), dtype=np.float32
    )
    background = _background(pixels)
    if background is None:
        return None
    regions = list(_regions(pixels, background))
    if any(region is None for region in regions):
        return None
    things = [region for region in regions if region is not None]
    if len(things) == 1:
        return Scene(background, (things[0].thing,), _place(things[0].middle))
    if len(things) == 2:
        return _scene_of_two(background, things[0], things[1])
    return None


def _background(pixels: NDArray[np.float32]) -> str | None:
    edge = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    edge = np.concatenate([edge, pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    return _colour(np.median(edge, axis=0))


def _colour(value: NDArray[np.float32]) -> str | None:
    distances = {
        name: float(np.linalg.norm(value - np.array(rgb))) for name, rgb in COLOURS.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MOST_OFF else None


def _regions(pixels: NDArray[np.float32], background: str) -> Iterator[Region | None]:
    """Yield the things in an image, and None for a region that is not a thing."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=3)
    off = distances[:, :, names.index(background)]
    # The threshold is half the distance to the strongest nearby colour: the middle of a soft edge.
    strongest = ndimage.maximum_filter(off, size=5)
    mask = (off > np.maximum(strongest / 2, 30.0)) & (strongest > 45.0)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    for number in range(1, count + 1):
        region = labels == number
        if region.sum() >= LEAST_PIXELS:
            yield _thing(pixels, region)
    outside = (off > MOST_OFF) & ~ndimage.binary_dilation(mask, iterations=4)
    if outside.mean() > 1 - LEAST_PLAIN:
        yield None


def _thing(pixels: NDArray[np.float32], region: NDArray[np.bool_]) -> Region | None:
    inside = ndimage.binary_erosion(region, iterations=2)
    colour = _colour(np.median(pixels[inside if inside.sum() > LEAST_INSIDE else region], axis=0))
    down, across = ndimage.center_of_mass(region)
    # The radius follows from the area: the tips of a star are too thin to measure.
    radii = {shape: math.sqrt(float(region.sum()) / _area(shape)) for shape in SHAPES}
    likeness = {
        shape: _likeness(region, shape, radius, (across, down)) for shape, radius in radii.items()
    }
    second, best = sorted(likeness.values())[-2:]
    shape = max(likeness, key=likeness.__getitem__)
    small = region.sum() < SMALL and best - second >= LEAST_AHEAD
    clear = best >= (LEAST_LIKE_SMALL if small else LEAST_LIKE)
    if colour is None or not clear:
        return None
    radius = radii[shape] / SCALE
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    x, y = (across, down) - np.array(_centroid(shape)) * radii[shape]
    return Region(Thing(colour, shape, size), radius, (float(x), float(y)))


def _likeness(
    region: NDArray[np.bool_], shape: str, radius: float, middle: tuple[float, float]
) -> float:
    """Return the intersection over union with the outline of equal area and centre."""
    origin = np.array(middle) - np.array(_centroid(shape)) * radius
    points = np.array(outline(shape)) * radius + origin
    canvas = Image.new("1", (region.shape[1], region.shape[0]))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=1)
    expected = np.asarray(canvas)
    return float((region & expected).sum() / (region | expected).sum())


@cache
def _centroid(shape: str) -> tuple[float, float]:
    """Return the centre of mass of a shape of radius 1."""
    points = outline(shape)
    x_sum = y_sum = twice = 0.0
    for (x, y), (next_x, next_y) in zip(points, [*points[1:], points[0]], strict=True):
        cross = x * next_y - next_x * y
        twice += cross
        x_sum += (x + next_x) * cross
        y_sum += (y + next_y) * cross
    return x_sum / (3 * twice), y_sum / (3 * twice)


@cache
def _area(shape: str) -> float:
    """Return the area of a shape of radius 1."""
    points = outline(shape)
    pairs = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in pairs)) / 2


def _place(middle: tuple[float, float]) -> str:
    thirds = tuple(
        min(2, max(0, round((part - LARGE / 2) / (13.0 * SCALE)) + 1)) for part in middle
    )
    return next(name for name, place in PLACES.items() if place == thirds)


def _scene_of_two(background: str, first: Region, second: Region) -> Scene:
    across = first.middle[0] - second.middle[0]
    down = first.middle[1] - second.middle[1]
    if abs(across) > abs(down):
        relation = "left of" if across < 0 else "right of"
    else:
        relation = "above" if down < 0 else "below"
    things = tuple(
        Thing(
            one.thing.colour,
            one.thing.shape,
            min(SIZES_OF_TWO, key=lambda name: abs(SIZES_OF_TWO[name] - one.radius)),
        )
        for one in (first, second)
    )
    return Scene(background, things, relation=relation)


def same_scene(one: Scene, other: Scene) -> bool:
    """Return whether two scenes are equal. The order of two things does not matter."""
    return one == other or (len(other.things) == 2 and one == other.turned)
