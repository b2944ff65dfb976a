"""PNG files, written fast: one filter for all rows, and Intel's ISA-L for the compression.

A picture of a model has grain, in which there is nothing to find: Pillow's encoder looks for it
all the same, for 100 to 500 ms at 1024x1024, while this takes 8 ms and some 5 % more bytes than its
best (`python -m tests.bench.encoders`). Both steps let go of the interpreter's lock.
"""

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

fast_compress: Callable[..., bytes] | None = None
with contextlib.suppress(ImportError):  # there is no wheel for every machine
    from isal.isal_zlib import compress as fast_compress

# Mode of Pillow -> colour type of PNG, with 8 bits for each channel.
COLOUR_TYPES = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS = 8
_UP = 2  # the filter: what differs from the pixel above
_LEVEL = 1  # of ISA-L; 2 and 3 take longer and give larger files of pictures with grain


def write_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A picture as a PNG file, with texts as its metadata.

    Args:
        image: Its mode is a key of `COLOUR_TYPES`; the pixels are kept as they are.
        texts: Name and value of a text chunk each.

    Returns:
        The file's bytes: the same for the same arguments and the same version of ISA-L.
    """
    header = struct.pack(
        ">IIBBBBB", image.width, image.height, _BITS, COLOUR_TYPES[image.mode], 0, 0, 0
    )
    chunks = [(b"IHDR", header), *_text_chunks(texts), (b"IDAT", _compressed(_filtered(image)))]
    parts = [part for chunk in (*chunks, (b"IEND", b"")) for part in _framed(*chunk)]
    return b"".join((_SIGNATURE, *parts))


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


def _filtered(image: Image.Image) -> NDArray[np.uint8]:
    """Shape (height, 1 + width * channels): the filter's number, then the row's differences."""
    rows = np.asarray(image).reshape(image.height, -1)
    filtered = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as PNG wants it
    return filtered


def _compressed(filtered: NDArray[np.uint8]) -> bytes:
    if fast_compress is not None:
        return fast_compress(filtered.data, level=_LEVEL)
    # Without the search for repetitions, but for runs: a quarter of the time of level 1.
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return deflate.compress(filtered.data) + deflate.flush()
