"""What writing a picture costs: `python -m tests.bench.encoders`.

CPU milliseconds, the file's size, and whether the interpreter's lock is let go for
other threads. One picture with a little grain (as models make them), one without (as they seldom
do).
"""

import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO

import click
import numpy as np
from PIL import Image

from consumer.media import png_writer as png
from consumer.media.codec import ImageCodec

FOREVER = 3_600.0  # seconds

Encode = Callable[[Image.Image], bytes]


def picture(side: int, grain: float) -> Image.Image:
    """Soft colours, and noise of so many levels."""
    y, x = np.mgrid[0:side, 0:side]
    soft = np.stack([np.sin(x / 160), np.sin(y / 160), np.sin((x + y) / 320)], -1)
    noise = np.random.default_rng(1).normal(0, grain, soft.shape) if grain else 0.0
    return Image.fromarray(np.clip(128 + 90 * soft + noise, 0, 255).astype(np.uint8))


def pillow(image_format: str, **options: object) -> Encode:
    def encode(image: Image.Image) -> bytes:
        file = BytesIO()
        image.save(file, image_format, **options)  # type: ignore[arg-type] # of each format
        return file.getvalue()

    return encode


def own(*, fast: bool) -> Encode:
    def encode(image: Image.Image) -> bytes:
        kept = png.fast
        try:
            if not fast:
                png.fast = None
            return png.write_png(image, {})
        finally:
            png.fast = kept

    return encode


CODEC = ImageCodec()


def by_codec(output_format: str) -> Encode:
    return lambda image: CODEC.encode(image, output_format, seed=0).data  # type: ignore[arg-type]


WAYS: dict[str, Encode] = {
    "PNG, Pillow, level 6 (its default)": pillow("PNG"),
    "PNG, Pillow, level 1": pillow("PNG", compress_level=1),
    "PNG, one filter and ISA-L": own(fast=True),
    "PNG, one filter and zlib's run lengths": own(fast=False),
    "WebP without loss, quality 0, method 0": pillow("WEBP", lossless=True, quality=0, method=0),
    "WebP 90, method 2": pillow("WEBP", quality=90, method=2),
    "WebP 90, method 0": pillow("WEBP", quality=90, method=0),
    "JPEG 95, 4:4:4": pillow("JPEG", quality=95, subsampling=0),
    "the codec, png, with hashes": by_codec("png"),
    "the codec, webp, with hashes": by_codec("webp"),
    "the codec, jpeg, with hashes": by_codec("jpeg"),
}


def cpu_milliseconds(encode: Encode, image: Image.Image, times: int) -> float:
    """The least of several times."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        encode(image)
        spent.append(time.process_time() - began)
    return min(spent) * 1000


def lets_go(encode: Encode, image: Image.Image) -> bool:
    """Whether other threads run while it encodes."""
    turns, over = 0, threading.Event()

    def wait_in_turns() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            time.sleep(0)  # gives the lock away, and needs it to go on

    usual = sys.getswitchinterval()
    thread = threading.Thread(target=wait_in_turns)
    thread.start()
    try:
        sys.setswitchinterval(FOREVER)  # nobody has to give the lock away
        before = turns
        encode(image)
        return turns > before
    finally:
        sys.setswitchinterval(usual)
        over.set()
        thread.join()


@click.command()
@click.option("--side", default=1024, show_default=True, help="pixels")
@click.option("--times", default=7, show_default=True)
def main(side: int, times: int) -> None:
    """Print a table."""
    grainy, smooth = picture(side, 4.0), picture(side, 0.0)
    click.echo(f"| {side}x{side} | ms | KB | ms, no grain | KB, no grain | lock let go |")
    click.echo("|---|---|---|---|---|---|")
    for name, encode in WAYS.items():
        cells = [
            cell
            for image in (grainy, smooth)
            for cell in (
                f"{cpu_milliseconds(encode, image, times):.1f}",
                f"{len(encode(image)) / 1024:.0f}",
            )
        ]
        released = "yes" if lets_go(encode, grainy) else "no"
        click.echo(f"| {name} | {' | '.join(cells)} | {released} |")


if __name__ == "__main__":
    main()
