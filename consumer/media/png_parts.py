"""PNG input files: the chunks that decoding needs."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from consumer.media.parts import MAX_PROFILE, FileParts, broken
from consumer.ports.media import InputUnavailable

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks in one file. Encoders write image data in chunks of 4 KB or more.
_MIN_CHUNKS_ALLOWED = 20_000
_BYTES_PER_CHUNK = 1_000
_HEADER = 13  # bytes
_PALETTE = 3  # colour type
_SAMPLES = {0: 1, 2: 3}  # colour types grey and RGB -> samples of a transparent colour
_MAX_XMP = 2**20  # bytes, inflated
_MAX_EXIF_TEXT = 2**18  # bytes, inflated
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
_EXIF_KEYWORD = b"Raw profile type exif\0"  # ImageMagick's


class _Chunk(NamedTuple):
    kind: bytes
    body: bytes
    intact: bool  # the body is complete and its checksum is correct


class _UsedChunks:
    """The chunks of one file that are used."""

    def __init__(self) -> None:
        self.header = b""
        self.palette = b""
        self.transparent = b""
        self.pixels: list[bytes] = []
        self.frames = 0  # number of frames in the animation header
        self.first_frame_is_image = False
        self.metadata: dict[bytes, bytes] = {}


def png_parts(data: bytes) -> FileParts:
    """Read the chunks of a PNG file.

    Text chunks are not inflated, except for an XMP packet and EXIF. Chunks that do not affect the
    pixels are left out, also damaged ones.

    Raises:
        InputUnavailable: Animated, damaged, of another format, or too many chunks.
    """
    if data[12:16] == b"CgBI":
        raise InputUnavailable(
            "the image is a PNG file in Apple's CgBI format; standard PNG files are read"
        )
    found = _used_chunks(data)
    depth, colour = found.header[8:10]
    palette = b""
    if colour == _PALETTE:
        if not found.palette:
            raise broken()
        palette = _chunk_bytes(b"PLTE", found.palette)
        if found.transparent:
            palette += _chunk_bytes(b"tRNS", found.transparent)
    return FileParts(
        format="PNG",
        file=b"".join(
            (
                SIGNATURE,
                _chunk_bytes(b"IHDR", found.header),
                palette,
                _chunk_bytes(b"IDAT", b"".join(found.pixels)),
                _chunk_bytes(b"IEND", b""),
            )
        ),
        exif=_exif(found.metadata),
        xmp=_xmp(found.metadata.get(_XMP_KEYWORD, b"")),
        profile=_profile(found.metadata.get(b"iCCP", b"")),
        transparent=_transparent_colour(found.transparent, depth, _SAMPLES.get(colour, 0)),
        depth=depth,
    )


def _transparent_colour(body: bytes, depth: int, samples: int) -> tuple[int, ...]:
    if not body or not samples:
        return ()
    if len(body) < 2 * samples:
        raise broken()
    mask = 2**depth - 1  # the other bits have no meaning
    return tuple(sample & mask for sample in struct.unpack_from(f">{samples}H", body))


def _used_chunks(data: bytes) -> _UsedChunks:
    """Collect the chunks that are used, in the order in which a decoder reads them."""
    found = _UsedChunks()
    for kind, body, intact in _chunks(data):
        if kind == b"IDAT":
            found.pixels.append(body)  # zlib checks the pixels itself
        elif kind in {b"IHDR", b"PLTE", b"tRNS"} and not found.pixels:
            if not intact:
                raise broken()
            _add(found, kind, body)
        elif intact:
            _add_metadata(found, kind, body)
    if len(found.header) != _HEADER or not found.pixels:
        raise broken()
    # Without an fcTL chunk before it, the image is not a frame of the animation.
    if found.frames and found.frames + (not found.first_frame_is_image) > 1:
        raise InputUnavailable("the image is animated")
    return found


def _add(found: _UsedChunks, kind: bytes, body: bytes) -> None:
    if kind == b"IHDR":
        found.header = body
    elif kind == b"PLTE":
        found.palette = body
    else:
        found.transparent = body


def _add_metadata(found: _UsedChunks, kind: bytes, body: bytes) -> None:
    if kind == b"acTL" and not found.pixels:
        # No decoder animates a file with a second acTL chunk, or with one without frames.
        found.frames = 0 if found.frames else int.from_bytes(body[:4])
    elif kind == b"fcTL" and not found.pixels:
        found.first_frame_is_image = True
    elif kind in {b"eXIf", b"iCCP"}:
        found.metadata.setdefault(kind, body)
    elif kind in {b"iTXt", b"zTXt", b"tEXt"}:
        for keyword in (_XMP_KEYWORD, _EXIF_KEYWORD):
            if body.startswith(keyword):
                found.metadata.setdefault(keyword, kind + body[len(keyword) :])


def _chunks(data: bytes) -> Iterator[_Chunk]:
    at = len(SIGNATURE)
    for _ in range(max(_MIN_CHUNKS_ALLOWED, len(data) // _BYTES_PER_CHUNK)):
        kind = data[at + 4 : at + 8]
        if len(kind) < 4 or kind == b"IEND":  # noqa: PLR2004 - a kind has four letters
            return
        size = int.from_bytes(data[at : at + 4])
        body = data[at + 8 : at + 8 + size]
        checksum = data[at + 8 + size : at + 12 + size]
        yield _Chunk(kind, body, checksum == zlib.crc32(body, zlib.crc32(kind)).to_bytes(4))
        at += 12 + size
    raise InputUnavailable("the image has too many PNG chunks")


def _chunk_bytes(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join((len(body).to_bytes(4), kind, body, checksum.to_bytes(4)))


def _exif(metadata: dict[bytes, bytes]) -> bytes:
    if exif := metadata.get(b"eXIf"):
        return exif
    text = metadata.get(_EXIF_KEYWORD, b"")
    if text.startswith(b"zTXt"):
        text = _inflated(text[5:], _MAX_EXIF_TEXT)
    # The lines are: an empty line, the name, the length, and the bytes as hexadecimal digits.
    digits = b"".join(text[:_MAX_EXIF_TEXT].split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _xmp(text: bytes) -> bytes:
    """Return the packet from an iTXt chunk; `text` is its kind, its flags and its text."""
    if not text.startswith(b"iTXt"):
        return b""
    compressed, packet = text[4:5] == b"\1", text[6:].split(b"\0", 2)[-1]
    return _inflated(packet, _MAX_XMP) if compressed else packet


def _profile(body: bytes) -> bytes:
    _, _, compressed = body.partition(b"\0")
    return _inflated(compressed[1:], MAX_PROFILE)


def _inflated(data: bytes, limit: int) -> bytes:
    """Inflate metadata; empty if it is damaged or larger than the limit in bytes."""
    if not data:
        return b""
    inflating = zlib.decompressobj()
    try:
        inflated = inflating.decompress(data, limit)
    except zlib.error:
        return b""
    return inflated if inflating.eof else b""
