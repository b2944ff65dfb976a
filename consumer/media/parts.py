"""The parts of an input file that decoding needs."""

from typing import Literal, NamedTuple

from consumer.ports.media import InputUnavailable

MAX_PROFILE = 4 * 2**20  # bytes of one colour profile; profiles for printing have up to 3 MB


class FileParts(NamedTuple):
    """A file for Pillow, and the metadata that affects its pixels.

    Attributes:
        format: Pillow's name of the format.
        file: A file with the pixels only.
        second_file: A file that must decode to the same pixels; None where one file is enough.
        exif: The EXIF block, which begins with a TIFF header; empty without one.
        xmp: The XMP packet; empty without one.
        profile: The ICC profile; empty without one.
        transparent: The samples of the transparent colour, in the file's bit depth.
        depth: Bits of one sample.
    """

    format: Literal["PNG", "JPEG", "WEBP"]
    file: bytes
    second_file: bytes | None = None
    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""
    transparent: tuple[int, ...] = ()
    depth: int = 8


def broken() -> InputUnavailable:
    """Return the error for a file whose pixels cannot all be decoded."""
    return InputUnavailable("the image is broken or incomplete")
