"""Names of file formats that are not read, for the error message."""

import re

_BEGINNINGS = (
    (b"GIF8", "a GIF file"),
    (b"BM", "a BMP file"),
    (b"II*\0", "a TIFF file"),
    (b"MM\0*", "a TIFF file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"\0\0\x01\0", "an ICO file"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"PK\x03\x04", "a ZIP file"),
    (b"\x1a\x45\xdf\xa3", "a video"),
)
_BRANDS = (  # of ISO base media files, the container of HEIF and MP4; AVIF may name HEIF's as well
    (rb"avi[fs]", "an AVIF file"),
    (rb"he[ivc][cxmsf]|mif1|msf1", "a HEIC file"),
)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|!doctype|html|svg|!--)", re.IGNORECASE)


def format_name(data: bytes) -> str | None:
    """Return the format of a file that is not PNG, JPEG or WebP, with an article; None: unknown."""
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4]), 256)]
        return next((name for brand, name in _BRANDS if re.search(brand, brands)), "a video")
    if markup := _MARKUP.match(data):
        is_svg = b"<svg" in data[: markup.end() + 1_000].lower()
        return "an SVG file" if is_svg else "an HTML or XML page"
    return None
