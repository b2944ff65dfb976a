"""PNG files, written fast: one filter for all rows, and Intel's ISA-L for the compression.

An image of a model has grain, in which there is nothing to find: Pillow's encoder looks for it
all the same, for 100 to 500 ms at 1024x1024, while this takes 8 ms and some 5 % more bytes than its
best (`python -m tests.bench.encoders`). All of it lets go of the interpreter's lock.

A large image is written in strips, which several threads can make at the same time: each is a
part of the one deflate stream (RFC 1951) that ends at a whole byte, in an IDAT chunk of its own.
"""

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

fast: Any = None
with contextlib.suppress(ImportError):  # there is no wheel for every machine
    from isal import isal_zlib as fast

# Mode of Pillow -> colour type of PNG, with 8 bits for each channel.
COLOUR_TYPES = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}

T = TypeVar("T")
R = TypeVar("R")

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS = 8
_UP = 2  # the filter: what differs from the pixel above
_LEVEL = 1  # of ISA-L; 2 and 3 take longer and give larger files of images with grain
# Bytes, about: 1024x1024 are four strips. By the image alone, whatever the machine has: the same
# image must give the same bytes everywhere.
_STRIP = 3 * 2**18
_ZLIB_HEADER = b"\x78\x01"  # RFC 1950: deflate, a window of 32 KiB, the fastest level
_ADLER_BASE = 65_521  # RFC 1950: the largest prime below 2^16


class Each(Protocol):
    """Calls a function with each of several things, and gives what it returns in their order."""

    def __call__(self, function: Callable[[T], R], things: Iterable[T], /) -> Iterator[R]:
        """As the built-in `map`, or an executor's."""


def write_png(image: Image.Image, texts: Mapping[str, str], *, each: Each = map) -> bytes:
    """An image as a PNG file, with texts as its metadata.

    Args:
        image: Its mode is a key of `COLOUR_TYPES`; the pixels are kept as they are.
        texts: Name and value of a text chunk each.
        each: Makes the strips: one after the other, or at the same time.

    Returns:
        The file's bytes: the same for the same image, texts and version of ISA-L.
    """
    header = struct.pack(
        ">IIBBBBB", image.width, image.height, _BITS, COLOUR_TYPES[image.mode], 0, 0, 0
    )
    before = [(b"IHDR", header), *_text_chunks(texts)]
    parts = [part for chunk in before for part in _framed(*chunk)]
    adler = 1
    strips = _strips(image)
    for strip in each(_make_strip, strips) if len(strips) > 1 else map(_make_strip, strips):
        parts += strip.chunk
        adler = _joined(adler, strip.adler, strip.length)
    parts += [*_framed(b"IDAT", struct.pack(">I", adler)), *_framed(b"IEND", b"")]
    return b"".join((_SIGNATURE, *parts))


class _Pixels(NamedTuple):
    """Some rows of an image, and what has to be known of the rest of it.

    Attributes:
        rows: Shape (rows, width * channels).
        above: The row before the first; None: there is none.
        last: Whether no rows follow.
    """

    rows: NDArray[np.uint8]
    above: NDArray[np.uint8] | None
    last: bool


class _Strip(NamedTuple):
    """The same rows as a part of a file.

    Attributes:
        chunk: An IDAT chunk, in parts.
        adler: The Adler-32 of what was compressed.
        length: Bytes of what was compressed.
    """

    chunk: tuple[bytes, ...]
    adler: int
    length: int


def _strips(image: Image.Image) -> list[_Pixels]:
    rows = np.asarray(image).reshape(image.height, -1)
    number = max(1, min(image.height, round(rows.nbytes / _STRIP)))
    bounds = [image.height * strip // number for strip in range(number + 1)]
    return [
        _Pixels(rows[begin:end], rows[begin - 1] if begin else None, last=end == image.height)
        for begin, end in pairwise(bounds)
    ]


def _make_strip(pixels: _Pixels) -> _Strip:
    filtered = _filtered(pixels)
    compressed = _compressed(filtered, last=pixels.last)
    if pixels.above is None:
        compressed = _ZLIB_HEADER + compressed
    adler = (fast or zlib).adler32(filtered.data)
    return _Strip(_framed(b"IDAT", compressed), adler, filtered.nbytes)


def _text_chunks(texts: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    # Pillow knows which of the two kinds a text needs, and how it is encoded.
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        info.add_text(name, value)
    for kind, data, *_ in info.chunks:
        yield kind, data


def _framed(kind: bytes, data: bytes) -> tuple[bytes, ...]:
    checked = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", checked)


def _filtered(pixels: _Pixels) -> NDArray[np.uint8]:
    """Shape (rows, 1 + width * channels): the filter's number, then the row's differences."""
    rows, above, _ = pixels
    filtered = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    # Modulo 256, as PNG wants it; above the first row there is nothing, which counts as zeros.
    np.subtract(rows[0], 0 if above is None else above, out=filtered[0, 1:])
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _compressed(filtered: NDArray[np.uint8], *, last: bool) -> bytes:
    """A part of a deflate stream, without what zlib puts around it."""
    if fast is not None:
        deflate = fast.compressobj(_LEVEL, fast.DEFLATED, -zlib.MAX_WBITS)
    else:
        # Without the search for repetitions, but for runs: a quarter of the time of level 1.
        deflate = zlib.compressobj(
            1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE
        )
    data: bytes = deflate.compress(filtered.data)
    end: bytes = deflate.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)
    return data + end


def _joined(adler: int, following: int, length: int) -> int:
    """The Adler-32 of two pieces of data, by that of each and the length of the second.

    It is two sums modulo a prime (RFC 1950): of the bytes plus 1, and of what the first has been
    after each byte. So the second grows by the length times what the first had before.
    """
    low, high = adler & 0xFFFF, adler >> 16
    low_after, high_after = following & 0xFFFF, following >> 16
    summed = (high + high_after + length * (low - 1)) % _ADLER_BASE
    return summed << 16 | (low + low_after - 1) % _ADLER_BASE
