"""PNG files are read back by Pillow and by libpng through torchvision, which share no code."""

import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from consumer.media import png_writer as png
from consumer.media.codec import ImageCodec
from consumer.media.png_writer import COLOUR_TYPES, write_png
from tests.bench.encoders import releases_gil

# torchvision gives its decoders away to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (64, 64), (257, 129), (1021, 3), (601, 1303)]


@pytest.fixture(params=["ISA-L", "zlib"])
def compressor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zlib":
        monkeypatch.setattr(png, "fast", None)
    else:
        assert png.fast is not None
    return str(request.param)


def noise(mode: str, size: tuple[int, int], seed: int = 1) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def by_pillow(data: bytes) -> Image.Image:
    opened = Image.open(BytesIO(data), formats=["PNG"])
    opened.load()
    return opened


def by_libpng(data: bytes) -> np.ndarray:
    tensor = decode_png(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
    )
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", COLOUR_TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pillow_and_libpng_read_equal_pixels(
    mode: str, size: tuple[int, int], compressor: str
) -> None:
    image = noise(mode, size)
    written = write_png(image, {})
    expected = np.asarray(image).reshape(size[1], size[0], -1)
    assert by_pillow(written).mode == mode
    assert np.array_equal(np.asarray(by_pillow(written)).reshape(expected.shape), expected)
    assert np.array_equal(by_libpng(written), expected)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_single_colour_image_is_read_back(value: int, compressor: str) -> None:
    image = Image.new("RGB", (640, 480), (value, value, 255 - value))
    written = write_png(image, {})
    assert by_pillow(written).tobytes() == image.tobytes()
    assert len(written) < 10_000


def test_equal_images_give_equal_bytes(compressor: str) -> None:
    image = noise("RGB", (200, 100))
    assert write_png(image, {"a": "b"}) == write_png(image.copy(), {"a": "b"})


def test_every_chunk_has_its_checksum(compressor: str) -> None:
    data = write_png(noise("RGB", (30, 20)), {"Software": "x", "Prompt": "ein Bär 🐻"})
    kinds = []
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        assert zlib.crc32(body) == checksum
        kinds.append(body[:4].decode())
        position += 12 + length
    assert kinds == ["IHDR", "tEXt", "iTXt", "IDAT", "IDAT", "IEND"]


def test_text_chunks_are_read_back(compressor: str) -> None:
    texts = {"Software": "generation", "Prompt": "ein Bär, 一只猫 🐻", "empty": ""}
    opened = by_pillow(write_png(noise("RGB", (8, 8)), texts))
    assert isinstance(opened, Image.Image)
    assert opened.info == texts


@pytest.mark.parametrize("mode", COLOUR_TYPES)
def test_codec_keeps_grey_and_alpha(mode: str) -> None:
    image = noise(mode, (33, 21))
    encoded = ImageCodec().encode(image, "png", seed=0)
    opened = by_pillow(encoded.data)
    assert opened.mode == mode
    assert opened.tobytes() == image.tobytes()


def test_one_transparent_colour_is_written_over_white() -> None:
    image = Image.new("RGB", (4, 4), (0, 0, 255))
    image.info["transparency"] = (0, 0, 255)
    opened = by_pillow(ImageCodec().encode(image, "png", seed=0).data)
    assert opened.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_other_threads_run_while_an_image_is_compressed(compressor: str) -> None:
    image = noise("RGB", (2000, 1500))
    rows = np.asarray(image).reshape(image.height, -1)  # one strip, long enough to be measured
    filtered = png._filtered(png._Pixels(rows, None, last=True))
    assert releases_gil(lambda _: png._compressed(filtered, last=True), image)


def test_strips_are_compressed_concurrently_with_equal_bytes(compressor: str) -> None:
    image = noise("RGB", (1024, 1024))
    strips = len(png._strips(image))
    all_there = threading.Barrier(strips, timeout=30)

    def together(function: Callable[..., Any], things: Iterable[Any], /) -> Iterator[Any]:
        def meet(thing: Any) -> Any:
            all_there.wait()
            return function(thing)

        with ThreadPoolExecutor(strips) as threads:
            return iter([*threads.map(meet, things)])

    assert strips == 4
    assert write_png(image, {}, each=together) == write_png(image, {})


def test_combined_checksum_of_strips_matches_the_whole_image() -> None:
    data = np.random.default_rng(3).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    for cut in (0, 1, 65_520, 65_521, 65_522, 131_042, len(data)):
        first, second = data[:cut], data[cut:]
        joined = png._joined(zlib.adler32(first), zlib.adler32(second), len(second))
        assert joined == zlib.adler32(data)
