"""WebP input files: the chunks that decoding needs."""

from collections.abc import Iterator

from consumer.media.parts import FileParts, broken
from consumer.ports.media import InputUnavailable

_RIFF, _WEBP = b"RIFF", b"WEBP"
_HEADER = 12  # bytes
_MAX_CHUNKS = 20_000
_IMAGE = {b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF"}
_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # of VP8X: profile, EXIF, XMP


def is_webp(data: bytes) -> bool:
    """Return whether a file begins as a WebP file."""
    return data.startswith(_RIFF) and data[8:_HEADER] == _WEBP


def webp_parts(data: bytes) -> FileParts:
    """Read the chunks of a WebP file; an impossible size in its header is ignored.

    Raises:
        InputUnavailable: Animated, an image chunk is cut off, or too many chunks.
    """
    chunks: list[bytes] = []
    metadata: dict[bytes, bytes] = {}
    frames = 0
    for kind, size, body in _chunks(data):
        if kind not in _IMAGE:
            metadata.setdefault(kind, body)
            continue
        if len(body) < size:
            raise broken()
        frames += kind == b"ANMF"
        flags = bytes((body[0] & ~_METADATA_FLAGS,)) if kind == b"VP8X" and body else body[:1]
        chunks += kind, size.to_bytes(4, "little"), flags, body[1:], bytes(size % 2)
    if frames > 1:
        raise InputUnavailable("the image is animated")
    image = b"".join((_WEBP, *chunks))
    return FileParts(
        format="WEBP",
        file=b"".join((_RIFF, len(image).to_bytes(4, "little"), image)),
        exif=metadata.get(b"EXIF", b""),
        xmp=metadata.get(b"XMP ", b""),
        profile=metadata.get(b"ICCP", b""),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield kind, size and body of each chunk; the last body may be shorter than its size."""
    claimed = 8 + int.from_bytes(data[4:8], "little")
    end = claimed if _HEADER < claimed <= len(data) else len(data)
    at = _HEADER
    for _ in range(_MAX_CHUNKS):
        if at + 8 > end:
            return
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], size, data[at + 8 : min(at + 8 + size, end)]
        at += 8 + size + size % 2
    raise InputUnavailable("the image has too many WebP chunks")
