"""The orientation in a file's metadata, and rotation of images to it."""

import re
import struct

from PIL import ExifTags, Image, ImageOps

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ENTRY = 12  # bytes
_KINDS = {1: "B", 3: "H", 4: "I"}  # types of whole numbers; the standard requires 3
_XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([1-8])')


def orientation(exif: bytes, xmp: bytes) -> int:
    """Return the EXIF orientation, else the one of the XMP packet, from 1 to 8; 1 without either.

    Only this value is read. Pillow would copy the data of each entry, and entries can refer to the
    same megabytes. Broken metadata is ignored, because the pixels can be intact.
    """
    found = _in_exif(exif)
    if found is None and (in_xmp := _XMP.search(xmp)):
        found = int(in_xmp[1])
    return found or 1


def _in_exif(exif: bytes) -> int | None:
    exif = exif.removeprefix(b"Exif\0\0")  # also in PNG and WebP, against the standard
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + entries * _ENTRY, _ENTRY):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ExifTags.Base.Orientation and kind in _KINDS:
                (value,) = struct.unpack_from(f"{order}{_KINDS[kind]}", exif, entry + 8)
                return int(value) if 1 <= value <= 8 else None  # noqa: PLR2004 - EXIF has eight
    except struct.error:  # the data ends before the entry
        return None
    return None


def upright(image: Image.Image, value: int) -> Image.Image:
    """Rotate and mirror an image in place by an EXIF orientation, and remove its metadata."""
    image.info = {}
    image.getexif()[ExifTags.Base.Orientation] = value
    ImageOps.exif_transpose(image, in_place=True)
    return image
