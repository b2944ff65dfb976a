"""The pixels of the codec match those of OpenCV, upright and composited over white.

OpenCV has separate builds of libpng, libjpeg-turbo and libwebp, and shares no code with Pillow.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from consumer.media.codec import ImageCodec
from tests.support.odd_images import (
    PNG_SIGNATURE,
    as_file,
    exif_of,
    in_jpeg,
    png_chunk,
    srgb_profile,
    xmp_of,
)

Pixels = NDArray[Any]
CODEC = ImageCodec()
unhurried = settings(deadline=None, max_examples=150)  # a slow machine is no failure
ORIENTATIONS = st.integers(1, 8)
SIDES = st.integers(4, 21)
SEEDS = st.integers(0, 2**32 - 1)
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
GREY, RGB, PALETTE = 0, 2, 3  # colour types
ROUNDING = 1  # of images composited over white
# For lossy formats: libraries round colours and subsampled colours in different ways.
LOSSY_ROUNDING = 4


class ImageFile(NamedTuple):
    """A file, its version for the second decoder, and the pixels before rotation, if known."""

    data: bytes
    orientation: int
    plain: bytes
    pixels: Pixels | None = None


# -- files ----------------------------------------------------------------------------------------


@st.composite
def png_files(draw: st.DrawFn) -> ImageFile:
    """Draw any colour type and depth, interlaced or not, with every kind of transparency."""
    colour = draw(st.sampled_from(sorted(DEPTHS)))
    depth = draw(st.sampled_from(DEPTHS[colour]))
    width, height, chance = draw(SIDES), draw(SIDES), np.random.default_rng(draw(SEEDS))
    # Few values: then the transparent colour is met, and missed by one bit.
    values = chance.integers(0, 2**depth, 6)
    samples = chance.choice(values, (height, width, CHANNELS[colour]))
    interlaced, orientation = draw(st.booleans()), draw(ORIENTATIONS)
    palette = np.frombuffer(chance.bytes(3 * 2**depth), "u1") if colour == PALETTE else None
    transparent = b""
    if colour in {GREY, RGB}:
        key = samples[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))]
        transparent = draw(st.sampled_from([b"", key.astype(">u2").tobytes()]))
    elif palette is not None:
        transparent = chance.bytes(draw(st.integers(0, 2**depth)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *draw(st.sampled_from(metadata(orientation)))]
    chunks += [] if palette is None else [(b"PLTE", palette.tobytes())]
    chunks += [(b"tRNS", transparent)] if transparent else []
    passes = list(interlacing(samples)) if interlaced else [samples]
    rows = b"".join(filtered(part, depth, chance) for part in passes if part.size)
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)
    pixels = drawn(samples, depth, palette, transparent)
    # OpenCV does not read the transparent colour of a grey image.
    return ImageFile(data, orientation, b"" if colour == GREY and transparent else data, pixels)


def drawn(samples: Pixels, depth: int, palette: Pixels | None, transparent: bytes) -> Pixels:
    """The pixels over white by the PNG standard: height x width x 3, 0 to 255."""
    channels = samples.shape[2]
    if palette is not None:
        alphas = np.frombuffer(transparent.ljust(2**depth, b"\xff"), "u1")
        colours, alpha = palette.reshape(-1, 3)[samples[:, :, 0]], alphas[samples] / 255
    else:
        scaled = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
        colours = scaled[:, :, : channels - 1 + channels % 2]
        alpha = np.ones((*samples.shape[:2], 1)) if channels % 2 else scaled[:, :, -1:] / 255
        if transparent:
            key = np.frombuffer(transparent, ">u2")
            alpha = np.any(samples != key, axis=2, keepdims=True).astype(float)
    return np.broadcast_to(colours * alpha + 255 * (1 - alpha), (*samples.shape[:2], 3))


def metadata(orientation: int) -> list[list[tuple[bytes, bytes]]]:
    exif, text = (b"eXIf", exif_of(orientation)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))
    xmp = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(orientation))
    profile = (b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile()))
    return [[exif], [xmp, text], [text, text, exif], [profile, exif]]


def interlacing(samples: Pixels) -> Iterator[Pixels]:
    for left, top, across, down in (*ADAM7, (0, 1, 1, 2)):
        yield samples[top::down, left::across]


def filtered(samples: Pixels, depth: int, chance: np.random.Generator) -> bytes:
    """Rows with the filters for none, the pixel to the left, and the one above."""
    pixel = max(1, samples.shape[2] * depth // 8)
    above = None
    written = b""
    for row in samples.reshape(len(samples), -1):
        packed = np.frombuffer(packed_row(row, depth), "u1").astype("i2")
        left = np.concatenate([np.zeros(pixel, "i2"), packed[:-pixel]])[: len(packed)]
        by = int(chance.integers(3))
        minus = (0, left, 0 if above is None else above)[by]
        written += bytes((by,)) + (packed - minus).astype("u1").tobytes()
        above = packed
    return written


def packed_row(row: Pixels, depth: int) -> bytes:
    if depth >= 8:
        return row.astype(">u2" if depth > 8 else "u1").tobytes()
    bits = np.unpackbits(row.astype("u1")[:, None], axis=1)[:, 8 - depth :]
    return np.packbits(bits.ravel()).tobytes()


@st.composite
def jpeg_files(draw: st.DrawFn) -> ImageFile:
    """Grey, colour or print colours, in each order of scans; with or without its end marker."""
    image = smooth(draw, draw(st.sampled_from(["L", "RGB", "CMYK"])))
    data = as_file(
        image,
        "JPEG",
        quality=draw(st.integers(30, 100)),
        progressive=draw(st.booleans()),
        optimize=draw(st.booleans()),
        restart_marker_blocks=draw(st.integers(0, 2)),
        subsampling=0 if image.mode == "CMYK" else draw(st.integers(0, 2)),
    )
    orientation = draw(ORIENTATIONS)
    marked = in_jpeg((0xE1, b"Exif\0\0" + exif_of(orientation)), (0xFE, b"\xff\xda"), file=data)
    behind = draw(st.sampled_from([b"", b"\xff\xda" * 200, as_file(image, "JPEG")]))
    odd = (marked if draw(st.booleans()) else marked[:-2]) + behind
    return ImageFile(odd, orientation, data)


@st.composite
def webp_files(draw: st.DrawFn) -> ImageFile:
    image = smooth(draw, draw(st.sampled_from(["RGB", "RGBA"])))
    lossless, orientation = draw(st.booleans()), draw(ORIENTATIONS)
    quality = draw(st.integers(30, 100))
    exif, xmp = draw(st.sampled_from([(exif_of(orientation), b""), (b"", xmp_of(orientation))]))
    options = {"lossless": lossless, "quality": quality, "exif": exif, "xmp": xmp, "exact": True}
    data = as_file(image, "WEBP", **options)
    return ImageFile(data, orientation, data)


def smooth(draw: st.DrawFn, mode: str) -> Image.Image:
    chance = np.random.default_rng(draw(SEEDS))
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = chance.integers(0, 256, (3, 3, bands), dtype=np.uint8)
    small = Image.frombytes(mode, (3, 3), coarse.tobytes())
    return small.resize((draw(SIDES), draw(SIDES)), Image.Resampling.BILINEAR)


# -- the second decoder ---------------------------------------------------------------------------


def decoded_by_opencv(file: ImageFile) -> Pixels:
    """Decode with OpenCV: upright, over white, RGB of shape (height, width, 3), 0 to 255."""
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(file.plain, "u1"), flags)
    assert decoded is not None
    if decoded.dtype == np.uint16:
        decoded = decoded >> 8
    values = decoded.astype(float)
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.shape[2] == 4:
        alpha = values[:, :, 3:] / 255
        values = values[:, :, :3] * alpha + 255 * (1 - alpha)
    return upright(values[:, :, ::-1], file.orientation)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate by the EXIF standard: the orientation gives the position of row 0 and column 0."""
    if orientation in {5, 6, 7, 8}:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in {2, 3, 6, 7} else pixels


def assert_agree(file: ImageFile, tolerance: int) -> None:
    decoded = np.asarray(CODEC.decode(file.data), float)
    expected = [] if file.pixels is None else [upright(file.pixels, file.orientation)]
    expected += [decoded_by_opencv(file)] if file.plain else []
    for pixels in expected:
        assert decoded.shape == pixels.shape
        assert np.abs(decoded - pixels).max() <= tolerance


@unhurried
@given(png_files())
def test_png_pixels_match_opencv(file: ImageFile) -> None:
    assert_agree(file, ROUNDING)


@unhurried
@given(jpeg_files())
def test_jpeg_pixels_match_opencv(file: ImageFile) -> None:
    assert_agree(file, LOSSY_ROUNDING)


@unhurried
@given(webp_files())
def test_webp_pixels_match_opencv(file: ImageFile) -> None:
    assert_agree(file, LOSSY_ROUNDING)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_match_opencv(orientation: int) -> None:
    """`upright` rotates like OpenCV, which reads the orientation of a JPEG itself."""
    image = Image.frombytes("RGB", (9, 5), np.random.default_rng(1).bytes(135)).resize((36, 20))
    data = in_jpeg((0xE1, b"Exif\0\0" + exif_of(orientation)), file=as_file(image, "JPEG"))
    turned = cv2.imdecode(np.frombuffer(data, "u1"), cv2.IMREAD_COLOR)
    assert turned is not None
    assert np.array_equal(turned[:, :, ::-1], decoded_by_opencv(ImageFile(data, orientation, data)))


@pytest.mark.parametrize(
    "behind", [b"", b"\xff", b"\0", b"\0" * 9], ids=["nothing", "half a marker", "a zero", "zeros"]
)
def test_a_jpeg_without_its_end_marker_may_end_in_a_stuffed_byte(behind: bytes) -> None:
    """A last byte of 0xFF is followed by a zero, which belongs to the scan."""
    files = (as_file(Image.frombytes("L", (8, 8), chance(64)), "JPEG") for chance in _sources())
    complete = next(data for data in files if data.endswith(b"\xff\0\xff\xd9"))
    found = CODEC.decode(complete[:-2] + behind)
    assert found.tobytes() == CODEC.decode(complete).tobytes()


def _sources() -> Iterator[Callable[[int], bytes]]:
    return (np.random.default_rng(seed).bytes for seed in range(100_000))
