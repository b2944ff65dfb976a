"""Unusual and hostile image files, with the expected pixels or error message of the codec.

Every file shows one photograph, in which each rotation, flip and missing part is visible.
"""

import base64
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageCms

RED, BLUE, WHITE = (200, 30, 40), (20, 40, 190), (255, 255, 255)
BROKEN = "the image is broken or incomplete"
UNKNOWN = "the image is not a readable PNG, JPEG or WebP file"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def photograph(width: int = 40, height: int = 24) -> Image.Image:
    """Return an image, red above and blue below, with a white corner: every rotation differs."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width, height // 2))
    image.paste(WHITE, (0, 0, width // 4, height // 4))
    return image


def as_file(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


# -- PNG ------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_file(
    width: int,
    height: int,
    rows: bytes,
    *,
    depth: int = 1,
    colour: int = 0,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return a file of rows that start with their filter byte, with chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)


def in_png(*chunks: bytes, png: bytes = b"", behind: bool = False) -> bytes:
    """Add chunks before or behind the pixels of a PNG file."""
    png = png or as_file(photograph())
    at = png.index(b"IEND") - 4 if behind else 33
    return png[:at] + b"".join(chunks) + png[at:]


def rows() -> bytes:
    pixels = photograph().tobytes()
    return b"".join(b"\0" + pixels[at : at + 120] for at in range(0, len(pixels), 120))


def png_of(stream: bytes, *, checksum: bool = True, size: int = 10**6) -> bytes:
    """Return the photograph with its compressed pixels in chunks of `size` bytes."""
    empty = as_file(photograph())[:33]
    for at in range(0, len(stream), size):
        chunk = png_chunk(b"IDAT", stream[at : at + size])
        empty += chunk if checksum else bad_checksum(chunk)
    return empty + png_chunk(b"IEND", b"")


def bad_checksum(chunk: bytes) -> bytes:
    return chunk[:-4] + bytes(byte ^ 0xFF for byte in chunk[-4:])


def compressed_text(kind: bytes, size: int) -> bytes:
    """Return a text chunk as ComfyUI writes it. Its inflated size exceeds Pillow's limit."""
    text = zlib.compress(b'{"node": 1}, ' * (size // 13))
    flags = b"\0\1\0\0\0" if kind == b"iTXt" else b"\0\0"
    return png_chunk(kind, b"workflow" + flags + text)


def grey_with_key(depth: int, *, interlaced: bool = False) -> bytes:
    """Return four grey columns: black, the transparent level, the next level, and white."""
    top = 2**depth - 1
    values = (0, 1, 1, 1) if depth == 1 else (0, 1, 2, top)
    if depth == 16:
        row = struct.pack(">4H", *values)
    else:
        bits = "".join(f"{value:0{depth}b}" for value in values).ljust(8, "0")
        row = int(bits, 2).to_bytes(len(bits) // 8)
    key = (b"tRNS", struct.pack(">H", 1))
    return png_file(4, 4, (b"\0" + row) * 4, depth=depth, before=[key], interlaced=interlaced)


def four_greys(*levels: int) -> Image.Image:
    image = Image.new("RGB", (4, 4))
    for x, level in enumerate(levels):
        image.paste((level, level, level), (x, 0, x + 1, 4))
    return image


def rgb16_with_key() -> bytes:
    """Return columns that differ from the transparent colour in no, the low, and the high byte."""
    key = (0x1234, 0x0102, 0x0003)
    columns = (key, (0x1235, 0x0102, 0x0003), (0x1334, 0x0102, 0x0003), key)
    row = b"\0" + b"".join(struct.pack(">3H", *column) for column in columns)
    return png_file(4, 4, row * 4, depth=16, colour=2, before=[(b"tRNS", struct.pack(">3H", *key))])


def decoded_rgb16() -> Image.Image:
    image = Image.new("RGB", (4, 4), WHITE)
    image.paste((0x12, 0x01, 0), (1, 0, 2, 4))
    image.paste((0x13, 0x01, 0), (2, 0, 3, 4))
    return image


def rgba16(colour: int) -> bytes:
    """Return 16-bit columns with alpha: one opaque, one half transparent, two transparent."""
    samples = (0x8080,) if colour == 4 else (0x8080, 0x8080, 0x8080)
    row = b"".join(
        struct.pack(f">{len(samples) + 1}H", *samples, alpha) for alpha in (0xFFFF, 0x8080, 0, 0)
    )
    return png_file(4, 4, (b"\0" + row) * 4, depth=16, colour=colour)


def palette_with_key(depth: int) -> bytes:
    """Return an image with a palette of two colours. The first colour is transparent."""
    row = {1: b"\x50", 2: b"\x11", 4: b"\x01\x01", 8: b"\0\1\0\1"}[depth]
    before = [(b"PLTE", bytes((*RED, *BLUE))), (b"tRNS", b"\0")]
    return png_file(4, 4, (b"\0" + row) * 4, depth=depth, colour=3, before=before)


def white_and_blue() -> Image.Image:
    image = Image.new("RGB", (4, 4), WHITE)
    for x in (1, 3):
        image.paste(BLUE, (x, 0, x + 1, 4))
    return image


def animated_png(frames: int, *, image_is_frame: bool = True) -> bytes:
    """Return an animation header for `frames` frames; the image may or may not be a frame."""
    control = struct.pack(">IIIIIHHBB", 0, 40, 24, 0, 0, 1, 10, 0, 0)
    chunks = [png_chunk(b"acTL", struct.pack(">II", frames, 0))]
    if image_is_frame:
        chunks.append(png_chunk(b"fcTL", control))
    return in_png(*chunks)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def xmp_of(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></x:xmpmeta>'
        % orientation
    )


def turned() -> Image.Image:
    """Return the photograph as a phone in portrait mode stores it, with EXIF orientation 6."""
    return photograph().transpose(Image.Transpose.ROTATE_90)


def turned_png(*chunks: bytes, behind: bool = False) -> bytes:
    return in_png(*chunks, png=as_file(turned()), behind=behind)


def raw_exif_profile() -> bytes:
    exif = b"Exif\0\0" + exif_of(6)
    text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    return png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


# -- JPEG -----------------------------------------------------------------------------------------


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return as_file(image or photograph(), "JPEG", quality=95, subsampling=0, **options)


def in_jpeg(*segments: tuple[int, bytes], file: bytes = b"") -> bytes:
    file = file or jpeg()
    added = (
        bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return file[:2] + b"".join(added) + file[2:]


def without_last_scan() -> bytes:
    data = jpeg(progressive=True)
    return data[: data.rindex(b"\xff\xda")]


def repeated_first_scan() -> bytes:
    """Return a progressive JPEG with 200 copies of its first scan. Each scan costs a full pass."""
    data = jpeg(progressive=True)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 1)
    return data[:second] + data[first:second] * 200 + data[second:]


def grain(count: int) -> bytes:
    return random.Random(1).randbytes(count)


def video() -> bytes:
    """Return a video as a phone appends it. The video contains bytes that look like markers."""
    return (
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\xff\xda\xff\xe1\xff\xfe" * 3_000 + grain(2**20)
    )


def cmyk(*, ycck: bool = False) -> bytes:
    """Return a CMYK file as Adobe programs write it: inverted, optionally as YCCK."""
    image = photograph().convert("CMYK")
    if not ycck:
        return jpeg(image)
    *inks, black = image.split()
    inverted = [band.point(lambda value: 255 - value) for band in inks]
    rgb = Image.merge("RGB", [band.point(lambda value: 255 - value) for band in inverted])
    bands = [band.point(lambda value: 255 - value) for band in rgb.convert("YCbCr").split()]
    data = bytearray(jpeg(Image.merge("CMYK", [*bands, black])))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYG"
    "CAsICQoKCgoKBggLDAsKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoK"
    "CgoKCgoKCgoKCgoKCgoKCgoKCgr/yQARCAAQABADAREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANyr"
    "X/8Ady7zO2qd7eb/2Q=="
)
LOSSLESS = (
    "/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgACAAQA1IRAEcRAEIRAP/EABcAAQEBAQAAAAAAAAAAAAAAAAAHCAT/2gAMA1IA"
    "RwBCAAEAAKRHZOAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAMl9WlgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB//2Q=="
)
TWELVE_BITS = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYG"
    "CAsICQoKCgoKBggLDAsKDAkKCgr/wQALDAAIABABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAv/xAAYEAACAwAAAAAA"
    "AAAAAAAAAAAAHmyr6f/aAAgBAQAAPwCb+0Y8Gusyc1g0Y8Gusyc1j//Z"
)


def two_colours(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width, height // 2))
    return image


def standard_tables_left_out() -> bytes:
    """Return a frame of a Motion JPEG video, which has no Huffman tables."""
    data = as_file(photograph(), "JPEG", quality=95, subsampling=0, optimize=False)
    segments, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        size = 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] != 0xC4:
            segments.append(data[at : at + size])
        at += size
    return b"".join(segments) + data[at:]


# -- WebP -----------------------------------------------------------------------------------------


def webp(image: Image.Image | None = None, **options: Any) -> bytes:
    return as_file(image or photograph(), "WEBP", lossless=True, exact=True, **options)


def riff_size(data: bytes, size: int) -> bytes:
    return data[:4] + struct.pack("<I", size) + data[8:]


def over_white_below() -> Image.Image:
    image = photograph()
    image.paste(WHITE, (0, 12, 40, 24))
    return image


def one_frame_webp() -> bytes:
    """Return an animation of one frame, as some editors save it."""
    simple = webp()
    frame = simple[12:] if len(simple) % 2 == 0 else simple[12:] + b"\0"
    size = (39).to_bytes(3, "little") + (23).to_bytes(3, "little")
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + size
    loop = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body = bytes(6) + size + (100).to_bytes(3, "little") + b"\2" + frame
    body = b"WEBP" + canvas + loop + b"ANMF" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(body)) + body


def damaged(replacement: bytes) -> bytes:
    """Return a complete JPEG file with replaced bytes in the middle of its scan."""
    file = jpeg()
    at = (file.index(b"\xff\xda") + len(file)) // 2
    return file[:at] + replacement + file[at + len(replacement) :]


def opened(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


# -- colour profiles ------------------------------------------------------------------------------


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """Return a profile with exchanged red and blue."""
    profile = srgb_profile()
    tags = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    swapped = bytearray(profile)
    for at, name in zip(tags, (b"bXYZ", b"rXYZ"), strict=True):
        swapped[at : at + 4] = name
    return bytes(swapped)


def swapped() -> Image.Image:
    red, green, blue = photograph().split()
    return Image.merge("RGB", (blue, green, red))


def profile_in_pieces(profile: bytes, *order: int) -> bytes:
    cuts = [0, 100, 300, len(profile)]
    pieces = [profile[start:end] for start, end in pairwise(cuts)]
    segments = [
        (0xE2, b"ICC_PROFILE\0" + bytes((number, 3)) + pieces[number - 1]) for number in order
    ]
    return in_jpeg(*segments, file=jpeg(swapped()))


def profile_of_elements(repeated: int = 3) -> bytes:
    """Return a profile that applies one matrix repeatedly. The matrix exchanges red and blue."""
    swap = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 0, 0, 1, 0, 1, 0, 1, *[0] * 5)
    entry = struct.pack(">II", 16 + 8 * repeated, len(swap))
    tag = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, repeated) + entry * repeated + swap
    header = bytearray(srgb_profile()[:128])
    header[:4] = struct.pack(">I", 144 + len(tag))
    header[8:12] = b"\x04\x30\0\0"  # the ICC version that introduced multiprocess elements
    return bytes(header) + struct.pack(">I4sII", 1, b"D2B1", 144, len(tag)) + tag


# -- the table ------------------------------------------------------------------------------------


class Odd(NamedTuple):
    """One file, with the expected result.

    Attributes:
        make: Makes the file.
        expected: The pixels, or the error message.
        tolerance: Allowed difference of a pixel, in levels of 255, because of JPEG rounding.
    """

    make: Callable[[], bytes]
    expected: Callable[[], Image.Image] | str = photograph
    tolerance: int = 0


JPEG_ROUNDING = 14  # at quality 95 next to a colour edge

ODD_IMAGES: dict[str, Odd] = {
    # Data after the end of the image.
    "jpeg-and-a-video": Odd(lambda: jpeg() + video(), tolerance=JPEG_ROUNDING),
    "jpeg-and-a-second-one": Odd(
        lambda: as_file(
            photograph(),
            "MPO",
            quality=95,
            subsampling=0,
            save_all=True,
            append_images=[Image.new("RGB", (40, 24), (0, 255, 0))],
        ),
        tolerance=JPEG_ROUNDING,
    ),
    "jpeg-and-a-zip": Odd(lambda: jpeg() + b"PK\3\4" + jpeg() * 400, tolerance=JPEG_ROUNDING),
    "png-and-bytes": Odd(lambda: as_file(photograph()) + grain(2**20)),
    "png-and-a-video": Odd(lambda: as_file(photograph()) + video()),
    "png-and-profiles": Odd(lambda: as_file(photograph()) + b"iCCP" * 100),
    "webp-and-a-video": Odd(lambda: webp() + video()),
    # Data before the start of the image.
    "line-end-before-png": Odd(lambda: b"\r\n" + as_file(photograph()), UNKNOWN),
    "byte-order-mark-before-jpeg": Odd(lambda: b"\xef\xbb\xbf" + jpeg(), UNKNOWN),
    # Truncated files: the codec accepts a file with all pixels.
    "png-without-iend": Odd(lambda: as_file(photograph())[:-12]),
    "png-without-the-last-checksum": Odd(lambda: as_file(photograph())[:-16]),
    "half-a-png": Odd(lambda: as_file(photograph())[:80], BROKEN),
    "jpeg-without-its-end": Odd(lambda: jpeg()[:-2], tolerance=JPEG_ROUNDING),
    "jpeg-without-its-last-byte": Odd(lambda: jpeg()[:-1], tolerance=JPEG_ROUNDING),
    "progressive-jpeg-without-its-end": Odd(
        lambda: jpeg(progressive=True)[:-2], tolerance=JPEG_ROUNDING
    ),
    "jpeg-without-its-end-and-a-second-one": Odd(
        lambda: jpeg()[:-2] + jpeg(), tolerance=JPEG_ROUNDING
    ),
    # Some phones save panoramas in this form.
    "jpeg-without-its-end-and-a-video": Odd(
        lambda: jpeg()[:-2] + b"\0\0\1\n\x0e\0\0\0Image_UTC_Data" + video(),
        tolerance=JPEG_ROUNDING,
    ),
    "jpeg-and-8-bytes": Odd(lambda: jpeg() + b"dhav\x59\x19\1\0", tolerance=JPEG_ROUNDING),
    "jpeg-and-200-more-scans": Odd(
        lambda: jpeg()[:-2] + jpeg()[jpeg().index(b"\xff\xda") : -2] * 200 + b"\xff\xd9",
        tolerance=JPEG_ROUNDING,
    ),
    "progressive-jpeg-with-200-scans": Odd(
        repeated_first_scan, "the image has too many JPEG segments"
    ),
    "jpeg-without-its-last-data": Odd(lambda: jpeg()[:-4], BROKEN),
    "half-a-jpeg": Odd(lambda: jpeg()[:-200], BROKEN),
    "half-a-jpeg-and-a-second-one": Odd(lambda: jpeg()[:-200] + jpeg(), BROKEN),
    "half-a-download": Odd(lambda: jpeg()[:-200] + bytes(2_000), BROKEN),
    "progressive-jpeg-without-its-last-scan": Odd(without_last_scan, BROKEN),
    "jpeg-without-its-end-and-zeros": Odd(
        lambda: jpeg()[:-2] + bytes(100), tolerance=JPEG_ROUNDING
    ),
    "jpeg-without-its-end-and-a-video-of-zeros": Odd(
        lambda: jpeg()[:-2] + video() + bytes(100), tolerance=JPEG_ROUNDING
    ),
    "jpeg-with-damaged-pixels": Odd(lambda: damaged(b"\x55"), lambda: opened(damaged(b"\x55"))),
    "jpeg-with-damage-like-a-marker": Odd(lambda: damaged(b"\xff\xe5"), BROKEN),
    "webp-without-its-last-byte": Odd(lambda: webp()[:-3], BROKEN),
    "webp-cut-in-its-metadata": Odd(lambda: webp(xmp=b"x" * 1_000)[:-500]),
    "webp-that-counts-too-many-bytes": Odd(lambda: riff_size(webp(), 2**20)),
    "webp-that-counts-no-bytes": Odd(lambda: riff_size(webp(), 0)),
    # Metadata.
    **{
        f"png-with-a-workflow-in-{kind.decode()}-{'behind' if behind else 'before'}": Odd(
            lambda kind=kind, behind=behind: in_png(compressed_text(kind, 1_800_000), behind=behind)
        )
        for kind in (b"iTXt", b"zTXt", b"iCCP")
        for behind in (False, True)
    },
    "png-with-an-uncompressed-workflow": Odd(
        lambda: in_png(png_chunk(b"tEXt", b"workflow\0" + b"x" * 2**21))
    ),
    "png-with-66-texts": Odd(lambda: in_png(compressed_text(b"zTXt", 2**20) * 66)),
    "png-with-a-broken-text": Odd(lambda: in_png(png_chunk(b"zTXt", b"x\0\0no zlib"))),
    "png-with-a-bad-checksum-in-a-text": Odd(
        lambda: in_png(bad_checksum(png_chunk(b"tEXt", b"x\0y")))
    ),
    "png-with-a-profile-of-unknown-compression": Odd(
        lambda: in_png(png_chunk(b"iCCP", b"x\0\7zzz"))
    ),
    "png-with-bad-checksums-in-its-profile": Odd(
        lambda: in_png(
            bad_checksum(png_chunk(b"iCCP", b"x\0\0" + bad_checksum(zlib.compress(b"profile"))))
        )
    ),
    "png-with-a-bad-checksum-of-its-pixels-chunk": Odd(
        lambda: png_of(zlib.compress(rows()), checksum=False)
    ),
    "png-with-bytes-after-its-pixels": Odd(lambda: png_of(zlib.compress(rows() + bytes(9_000)))),
    "png-with-a-bad-checksum-of-its-pixels": Odd(
        lambda: png_of(bad_checksum(zlib.compress(rows()))), BROKEN
    ),
    "png-in-chunks-of-one-byte": Odd(lambda: png_of(zlib.compress(rows()), size=1)),
    "png-with-zeros-between-chunks": Odd(lambda: in_png(bytes(8)), BROKEN),
    "png-with-a-bad-checksum-in-the-header": Odd(
        lambda: (
            PNG_SIGNATURE + bad_checksum(as_file(photograph())[8:33]) + as_file(photograph())[33:]
        ),
        BROKEN,
    ),
    "jpeg-with-5-MB-of-segments": Odd(
        lambda: in_jpeg(*[(0xEB, grain(65_000))] * 80), tolerance=JPEG_ROUNDING
    ),
    "jpeg-with-600-exif-segments": Odd(
        lambda: in_jpeg(*[(0xE1, b"Exif\0\0ab")] * 600), tolerance=JPEG_ROUNDING
    ),
    "jpeg-with-a-broken-exif": Odd(
        lambda: in_jpeg((0xE1, b"Exif\0\0II*\0" + b"\xff" * 40)), tolerance=JPEG_ROUNDING
    ),
    "png-with-a-broken-exif": Odd(lambda: in_png(png_chunk(b"eXIf", b"not a TIFF header"))),
    "webp-with-a-broken-exif": Odd(lambda: webp(exif=b"II*\0" + b"\xff" * 40)),
    "png-with-an-exif-of-one-megabyte-a-thousand-times": Odd(
        lambda: in_png(
            png_chunk(
                b"eXIf",
                b"II*\0\x08\0\0\0"
                + struct.pack("<H", 9_000)
                + struct.pack("<HHII", 0x9000, 7, 2**20, 9_000) * 9_000
                + bytes(2**20),
            )
        )
    ),
    # Orientation.
    "png-turned-by-exif": Odd(lambda: turned_png(png_chunk(b"eXIf", exif_of(6)))),
    "png-turned-by-exif-behind": Odd(
        lambda: turned_png(png_chunk(b"eXIf", exif_of(6)), behind=True)
    ),
    "png-turned-by-xmp": Odd(
        lambda: turned_png(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(6)))
    ),
    "png-turned-by-compressed-xmp": Odd(
        lambda: turned_png(
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp_of(6)))
        )
    ),
    "png-turned-by-imagemagick": Odd(lambda: turned_png(raw_exif_profile())),
    "png-of-which-exif-and-xmp-differ": Odd(
        lambda: turned_png(
            png_chunk(b"eXIf", exif_of(6)),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(3)),
        )
    ),
    "jpeg-turned-by-xmp": Odd(
        lambda: in_jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp_of(6)), file=jpeg(turned())),
        tolerance=JPEG_ROUNDING,
    ),
    "png-turned-by-exif-with-its-name": Odd(
        lambda: turned_png(png_chunk(b"eXIf", b"Exif\0\0" + exif_of(6)))
    ),
    "png-turned-by-a-long": Odd(
        lambda: turned_png(
            png_chunk(b"eXIf", b"MM\0*" + struct.pack(">IHHHII", 8, 1, 0x112, 4, 1, 6) + bytes(4))
        )
    ),
    "png-with-a-bad-checksum-in-its-exif": Odd(
        lambda: in_png(bad_checksum(png_chunk(b"eXIf", exif_of(6))))
    ),
    "png-with-xmp-as-exif": Odd(lambda: in_png(png_chunk(b"eXIf", b"http://ns.adobe.com/xap"))),
    "webp-turned-by-exif": Odd(lambda: webp(turned(), exif=exif_of(6))),
    "webp-turned-by-exif-with-its-name": Odd(lambda: webp(turned(), exif=b"Exif\0\0" + exif_of(6))),
    "webp-turned-by-xmp": Odd(lambda: webp(turned(), xmp=xmp_of(6))),
    "png-with-orientation-9": Odd(lambda: in_png(png_chunk(b"eXIf", exif_of(9)))),
    # Transparent colours and depths.
    "grey-1-with-key": Odd(lambda: grey_with_key(1), lambda: four_greys(0, 255, 255, 255)),
    "grey-2-with-key": Odd(lambda: grey_with_key(2), lambda: four_greys(0, 255, 170, 255)),
    "grey-4-with-key": Odd(lambda: grey_with_key(4), lambda: four_greys(0, 255, 34, 255)),
    "grey-8-with-key": Odd(lambda: grey_with_key(8), lambda: four_greys(0, 255, 2, 255)),
    "grey-16-with-key": Odd(lambda: grey_with_key(16), lambda: four_greys(0, 255, 0, 255)),
    "rgb-16-with-key": Odd(rgb16_with_key, decoded_rgb16),
    "rgb-8-with-key": Odd(
        lambda: as_file(photograph(), transparency=BLUE),
        over_white_below,
    ),
    "key-with-bits-over-the-depth": Odd(
        lambda: png_file(4, 4, b"\0\x1b" * 4, depth=2, before=[(b"tRNS", b"\xff\xfd")]),
        lambda: four_greys(0, 255, 170, 255),
    ),
    "key-that-is-too-short": Odd(
        lambda: png_file(4, 4, b"\0\x1b" * 4, depth=2, before=[(b"tRNS", b"\1")]), BROKEN
    ),
    "key-with-a-bad-checksum": Odd(
        lambda: in_png(bad_checksum(png_chunk(b"tRNS", bytes(6)))), BROKEN
    ),
    **{
        f"palette-{depth}-with-key": Odd(
            lambda depth=depth: palette_with_key(depth), white_and_blue
        )
        for depth in (1, 2, 4, 8)
    },
    "palette-that-is-missing": Odd(
        lambda: png_file(4, 4, b"\0\x1b" * 4, depth=2, colour=3), BROKEN
    ),
    "grey-and-alpha-16": Odd(lambda: rgba16(4), lambda: four_greys(128, 191, 255, 255), 1),
    "rgb-and-alpha-16": Odd(lambda: rgba16(6), lambda: four_greys(128, 191, 255, 255), 1),
    # Animations.
    "png-animation": Odd(lambda: animated_png(2), "the image is animated"),
    "png-animation-of-one-frame": Odd(lambda: animated_png(1)),
    "png-animation-of-no-frame": Odd(lambda: animated_png(0)),
    "png-animation-that-is-not-its-image": Odd(
        lambda: animated_png(1, image_is_frame=False), "the image is animated"
    ),
    "webp-animation": Odd(
        lambda: webp(save_all=True, append_images=[swapped()]), "the image is animated"
    ),
    "webp-animation-of-one-frame": Odd(one_frame_webp),
    # Kinds of JPEG.
    "jpeg-arithmetic": Odd(lambda: base64.b64decode(ARITHMETIC), lambda: two_colours(16, 16), 2),
    "jpeg-lossless": Odd(lambda: base64.b64decode(LOSSLESS), lambda: two_colours(16, 8)),
    "jpeg-of-12-bits": Odd(
        lambda: base64.b64decode(TWELVE_BITS),
        "the image is a JPEG file with 12 bits per sample; 8 are read",
    ),
    "jpeg-hierarchical": Odd(
        lambda: jpeg().replace(b"\xff\xc0\0", b"\xff\xc5\0", 1),
        "the image is a hierarchical or JPEG-LS file; baseline and progressive JPEG are read",
    ),
    "jpeg-progressive": Odd(lambda: jpeg(progressive=True), tolerance=JPEG_ROUNDING),
    "jpeg-with-restarts": Odd(lambda: jpeg(restart_marker_blocks=1), tolerance=JPEG_ROUNDING),
    "jpeg-with-fill-bytes": Odd(
        lambda: jpeg().replace(b"\xff\xdb", b"\0\0\xff\xff\xff\xdb"), tolerance=JPEG_ROUNDING
    ),
    "jpeg-without-huffman-tables": Odd(standard_tables_left_out, tolerance=JPEG_ROUNDING),
    "jpeg-cmyk": Odd(cmyk, tolerance=JPEG_ROUNDING),
    "jpeg-cmyk-without-adobes-mark": Odd(
        lambda: cmyk().replace(b"Adobe", b"nobod"), tolerance=JPEG_ROUNDING
    ),
    "jpeg-ycck": Odd(lambda: cmyk(ycck=True), tolerance=JPEG_ROUNDING),
    # Colour profiles.
    "png-with-srgb": Odd(lambda: as_file(photograph(), icc_profile=srgb_profile())),
    "png-with-a-profile": Odd(
        lambda: as_file(swapped(), icc_profile=swapped_profile()), tolerance=2
    ),
    "webp-with-a-profile": Odd(lambda: webp(swapped(), icc_profile=swapped_profile()), tolerance=2),
    "jpeg-with-a-profile": Odd(
        lambda: profile_in_pieces(swapped_profile(), 1, 2, 3), tolerance=JPEG_ROUNDING
    ),
    "jpeg-with-a-profile-out-of-order": Odd(
        lambda: profile_in_pieces(swapped_profile(), 2, 3, 1), tolerance=JPEG_ROUNDING
    ),
    "jpeg-with-a-part-of-a-profile": Odd(
        lambda: profile_in_pieces(swapped_profile(), 2, 3), swapped, JPEG_ROUNDING
    ),
    "png-with-a-profile-of-elements": Odd(
        lambda: as_file(photograph(), icc_profile=profile_of_elements())
    ),
    "png-with-a-broken-profile": Odd(lambda: as_file(photograph(), icc_profile=b"none")),
    "palette-with-a-profile": Odd(
        lambda: as_file(swapped().quantize(8), icc_profile=swapped_profile()), tolerance=2
    ),
    "grey-with-a-profile-of-rgb": Odd(
        lambda: as_file(photograph().convert("L"), icc_profile=swapped_profile()),
        lambda: photograph().convert("L").convert("RGB"),
    ),
    # Other formats.
    "nothing": Odd(lambda: b"", "the image is empty"),
    "zeros": Odd(lambda: bytes(100), UNKNOWN),
    "text": Odd(lambda: b"a photograph of a cat", UNKNOWN),
    "iphone-png": Odd(
        lambda: PNG_SIGNATURE + png_chunk(b"CgBI", b"P\0 \6") + as_file(photograph())[8:],
        "the image is a PNG file in Apple's CgBI format; standard PNG files are read",
    ),
    **{
        f"format-{label}": Odd(
            lambda beginning=beginning: beginning + bytes(100),
            f"the image is {name}; PNG, JPEG and WebP are read",
        )
        for label, beginning, name in (
            ("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC file"),
            ("heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix", "a HEIC file"),
            ("avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "an AVIF file"),
            ("avif-of-mif1", b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "an AVIF file"),
            ("mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video"),
            ("webm", b"\x1a\x45\xdf\xa3", "a video"),
            ("jxl", b"\xff\x0a", "a JPEG XL file"),
            ("jxl-box", b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL file"),
            ("jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 file"),
            ("j2k", b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
            ("psd", b"8BPS\0\1", "a Photoshop file"),
            ("ps", b"%!PS-Adobe-3.0", "a PostScript file"),
            ("zip", b"PK\3\4", "a ZIP file"),
            ("svg", b'<?xml version="1.0"?>\n<svg width="9">', "an SVG file"),
            ("html", b"\xef\xbb\xbf\n<!DOCTYPE html><p>not found", "an HTML or XML page"),
            ("s3-error", b'<?xml version="1.0"?><Error><Code>', "an HTML or XML page"),
        )
    },
    **{
        f"format-{name.lower()}": Odd(
            lambda name=name: as_file(photograph(), name),
            f"the image is {article} {name} file; PNG, JPEG and WebP are read",
        )
        for name, article in (
            ("GIF", "a"),
            ("BMP", "a"),
            ("TIFF", "a"),
            ("PDF", "a"),
            ("ICO", "an"),
            ("AVIF", "an"),
        )
    },
    "format-ppm": Odd(lambda: as_file(photograph(), "PPM"), UNKNOWN),
    "jpeg-ls": Odd(
        lambda: (
            b"\xff\xd8\xff\xf7\0\x0b\x08\0\x08\0\x10\1\1\x11\0\xff\xda\0\x08\1\1\0\0\0\0\0\xff\xd9"
        ),
        "the image is a hierarchical or JPEG-LS file; baseline and progressive JPEG are read",
    ),
}
