"""Cost of encoding an image: `python -m tests.bench.encoders`.

Prints the CPU time, the file size, and whether the encoder releases the GIL. One image has a little
noise, like the images of models; the other has none.
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


def test_image(side: int, grain: float) -> Image.Image:
    """Return smooth colours with noise of this standard deviation."""
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


def png_writer(*, fast: bool) -> Encode:
    def encode(image: Image.Image) -> bytes:
        fast_encoder = png.fast
        try:
            if not fast:
                png.fast = None
            return png.write_png(image, {})
        finally:
            png.fast = fast_encoder

    return encode


CODEC = ImageCodec()
WITHOUT_MARK = ImageCodec(ai_mark=False)


def with_codec(output_format: str, codec: ImageCodec = CODEC) -> Encode:
    return lambda image: codec.encode(image, output_format, seed=0).data  # type: ignore[arg-type]


ENCODERS: dict[str, Encode] = {
    "PNG, Pillow, level 6 (its default)": pillow("PNG"),
    "PNG, Pillow, level 1": pillow("PNG", compress_level=1),
    "PNG, one filter and ISA-L": png_writer(fast=True),
    "PNG, one filter and zlib's run lengths": png_writer(fast=False),
    "WebP without loss, quality 0, method 0": pillow("WEBP", lossless=True, quality=0, method=0),
    "WebP 90, method 2": pillow("WEBP", quality=90, method=2),
    "WebP 90, method 0": pillow("WEBP", quality=90, method=0),
    "JPEG 95, 4:4:4": pillow("JPEG", quality=95, subsampling=0),
    "the codec, png, with hashes": with_codec("png"),
    "the codec, webp, with hashes": with_codec("webp"),
    "the codec, jpeg, with hashes": with_codec("jpeg"),
    **{
        f"the codec, {output_format}, with hashes, without the AI mark": with_codec(
            output_format, WITHOUT_MARK
        )
        for output_format in ("png", "webp", "jpeg")
    },
}


def cpu_milliseconds(encode: Encode, image: Image.Image, times: int) -> float:
    """Return the minimum of several runs."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        encode(image)
        spent.append(time.process_time() - began)
    return min(spent) * 1000


def releases_gil(encode: Encode, image: Image.Image) -> bool:
    """Return whether other threads run while the encoder works."""
    count, stop = 0, threading.Event()

    def count_acquisitions() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0)  # releases the GIL and acquires it again

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count_acquisitions)
    thread.start()
    try:
        sys.setswitchinterval(FOREVER)  # no thread is forced to release the GIL
        before = count
        encode(image)
        return count > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


@click.command()
@click.option("--side", default=1024, show_default=True, help="pixels")
@click.option("--times", default=7, show_default=True)
def main(side: int, times: int) -> None:
    """Print a table."""
    grainy, smooth = test_image(side, 4.0), test_image(side, 0.0)
    click.echo(f"| {side}x{side} | ms | KB | ms, no grain | KB, no grain | lock let go |")
    click.echo("|---|---|---|---|---|---|")
    for name, encode in ENCODERS.items():
        cells = [
            cell
            for image in (grainy, smooth)
            for cell in (
                f"{cpu_milliseconds(encode, image, times):.1f}",
                f"{len(encode(image)) / 1024:.0f}",
            )
        ]
        released = "yes" if releases_gil(encode, grainy) else "no"
        click.echo(f"| {name} | {' | '.join(cells)} | {released} |")


if __name__ == "__main__":
    main()
