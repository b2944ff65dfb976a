"""The image grid of the README: `python -m tests.bench.grid docs/demonstration.png`.

Each cell has a prompt, the image that the demonstration model generates with its defaults, and the
description of that image by the other model. The seed of each image is its number.
"""

import textwrap
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from tests.bench.models import Bench

PROMPTS = (
    "a small red star on a white background at the top",
    "a large blue heart on a yellow background",
    "a green cross on a purple background in the bottom right corner",
    "a tiny white circle on black in the top left corner",
    "orange triangle, large, gray background, left",
    "a pink square at the bottom, on a green background",
    "draw a big yellow star in the middle of a blue background",
    "a grey heart on the right side, on orange",
    "a red circle left of a blue square",
    "a yellow star above a green heart on a black background",
    "a purple triangle to the right of a small orange cross on white",
    "a white square at the top and a red circle at the bottom on a gray background",
)
COLUMNS = 4
IMAGE_SIDE = 192  # pixels of an enlarged image
CELL = (248, 318)  # pixels
QUESTION = "Describe this picture."


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--models", type=click.Path(path_type=Path), help="default: the shipped ones")
def main(file: Path, models: Path | None) -> None:
    """Generate and describe the images, and save the grid as one PNG."""
    bench = Bench(models)
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (CELL[0] * COLUMNS, CELL[1] * rows), "white")
    for number, prompt in enumerate(PROMPTS):
        image = bench.image(prompt, seed=number)
        text = bench.text([image], QUESTION)
        corner = (number % COLUMNS * CELL[0], number // COLUMNS * CELL[1])
        sheet.paste(cell(prompt, image, text), corner)
    sheet.save(file, optimize=True)


def cell(prompt: str, image: Image.Image, text: str) -> Image.Image:
    """Return an image between its prompt and its description."""
    output = Image.new("RGB", CELL, "white")
    canvas = ImageDraw.Draw(output)
    font = ImageFont.load_default(size=14)
    left = (CELL[0] - IMAGE_SIDE) // 2
    canvas.multiline_text((left, 8), textwrap.fill(prompt, 28), "black", font, spacing=3)
    enlarged = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    output.paste(enlarged, (left, 66))
    canvas.rectangle((left - 1, 65, left + IMAGE_SIDE, 66 + IMAGE_SIDE), outline="lightgray")
    below = textwrap.fill(text, 30)
    canvas.multiline_text((left, 70 + IMAGE_SIDE), below, "dimgray", font, spacing=3)
    return output


if __name__ == "__main__":
    main()
