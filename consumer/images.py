"""Images: input files to RGB pictures within limits, and pictures to files with their hash.

Inputs come from whoever may publish, so each limit is checked before the work that it limits: bytes
before parsing, pixels from the header before decoding. Nothing of Pillow's global state is changed:
other parts of the process use Pillow too.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from typing import Any, Literal, NamedTuple

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from consumer.png import COLOUR_TYPES, write_png
from consumer.ports import EncodedImage, InputUnavailable, OutputFormat

_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows some 40 more, far less trodden
_MAX_ASPECT_RATIO = 200  # the processor of Qwen2.5-VL raises above it
_MIN_SIDE = 4  # pixels; some processors take a side of 1 or 3 for the number of channels
# What one JPEG file may repeat; cameras write some 10 scans and 20 segments. One scan of 53 bytes
# costs 11 ms at 16 million pixels (1 MB of them: minutes), Pillow joins EXIF segments in quadratic
# time (7 MB of small ones: 41 s) and keeps some 150 bytes for each segment.
_MAX_JPEG_SCANS = 100
_MAX_JPEG_EXIF_SEGMENTS = 500
_MAX_JPEG_MARKERS = 5_000  # chance alone finds 1,000 in 1 MB of a colour profile
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # all but restarts, which pictures repeat
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = 12  # bytes, without its data
_MAX_PNG_CHUNKS = 20_000  # 20 MB in chunks of 1 KB
_PNG_INFLATED = (b"iCCP", b"zTXt", b"iTXt")
_MAX_PNG_INFLATED = 64  # chance finds one of their names once in a gigabyte
_WHITE = (255, 255, 255, 255)
# Of one value in a file's metadata. A JPEG segment has room for 65,533 bytes, and a character needs
# up to 12 in JSON: so two prompts and a few short values fit, whatever they are written in.
MAX_SAID = 2_500  # characters
_CUT_SHORT = "…"
# What a value must not have: NUL ends it for many readers, an escape steers terminals, and half of
# a surrogate pair is no text. Tabs and ends of lines are left.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

MediaType = Literal["image/png", "image/webp", "image/jpeg"]


class _FileFormat(NamedTuple):
    media_type: MediaType
    extension: str


_FILE_FORMATS: dict[OutputFormat, _FileFormat] = {
    "png": _FileFormat("image/png", "png"),
    "webp": _FileFormat("image/webp", "webp"),
    "jpeg": _FileFormat("image/jpeg", "jpg"),
}
# Times and sizes are of one 1024x1024 picture with a little grain.
_WEBP = {"quality": 90, "method": 2}  # 44 ms, 178 KB, 35.6 dB; method 4: twice as long for 0.2 dB
_JPEG = {"quality": 95, "subsampling": 0}  # 6 ms, 655 KB; 4:4:4 keeps edges of saturated colours


class ImageCodec:
    """The pictures' codec (`ports.Images`). It keeps nothing but threads: any thread may call it.

    Args:
        max_bytes: The largest input file.
        max_pixels: Width times height of the largest input; decoding takes up to 11 bytes each.
        max_side: The longest side of an input, in pixels.
    """

    def __init__(
        self,
        max_bytes: int = 20 * 2**20,
        *,
        max_pixels: int = 16_000_000,
        max_side: int = 16_384,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._max_side = max_side
        # For one large picture at a time; what is encoded beside it has to share.
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encoding")

    @property
    def max_bytes(self) -> int:
        """The largest input file."""
        return self._max_bytes

    def decode(self, data: bytes) -> Image.Image:
        """An input file to an RGB picture: upright by its EXIF, transparency over white.

        The picture carries no metadata. Colour profiles are not applied.

        Raises:
            InputUnavailable: Not a PNG, JPEG or WebP file, broken, animated, or over the limits.
        """
        if not data:
            raise InputUnavailable("the image is empty")
        if len(data) > self._max_bytes:
            raise InputUnavailable(f"the image has more than {self._max_bytes} bytes")
        _check_jpeg(data)
        _check_png(data)
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as opened:
                self._check(opened)
                opened.load()
                return _upright(_to_rgb(opened), _orientation(opened))
        except (InputUnavailable, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            # Pillow's own check, of 89 and 179 million pixels, comes first; it is a warning or an
            # error depending on the process's filters.
            raise self._too_many_pixels() from None
        except UnidentifiedImageError:
            raise InputUnavailable("the image is not a readable PNG, JPEG or WebP file") from None
        except Exception:  # noqa: BLE001 - what Pillow's decoders raise on hostile bytes is not documented: OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and others
            raise InputUnavailable("the image is broken or incomplete") from None

    def encode(
        self,
        image: Image.Image,
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        """A picture to a file with its hash; PNG is lossless, WebP and JPEG are not.

        The file holds the pixels and the provenance: nothing of what the picture carries. The same
        of both give the same bytes with the same libraries, and the provenance changes no pixel.

        Args:
            image: RGB, or any other mode. A PNG keeps grey and alpha; of the other formats, and
                of any mode that has more bits or a palette, the pixels become RGB over white.
            output_format: Of the file.
            seed: Goes into what is returned.
            provenance: In a PNG each name is a text chunk of its own; WebP and JPEG have all of
                them in the EXIF's ImageDescription, as a JSON object in ASCII. A value is cut to
                `MAX_SAID` characters, and control characters are left out of it.
        """
        said = {name: _fit_to_be_said(value) for name, value in (provenance or {}).items()}
        data = self._written(image, output_format, said)
        file_format = _FILE_FORMATS[output_format]
        return EncodedImage(
            data=data,
            media_type=file_format.media_type,
            extension=file_format.extension,
            width=image.width,
            height=image.height,
            seed=seed,
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def _written(
        self, image: Image.Image, output_format: OutputFormat, said: dict[str, str]
    ) -> bytes:
        if output_format == "png":
            as_it_is = image.mode in COLOUR_TYPES and "transparency" not in image.info
            return write_png(image if as_it_is else _to_rgb(image), said, each=self._threads.map)
        pixels = _to_rgb(image)
        pixels.info = {}  # Pillow writes a comment or a colour profile that it finds here
        options: dict[str, Any] = dict(_WEBP if output_format == "webp" else _JPEG)
        if said:
            options["exif"] = exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = json.dumps(said)  # by EXIF 2, it is ASCII
        file = BytesIO()
        pixels.save(file, output_format.upper(), **options)
        return file.getvalue()

    def _check(self, image: ImageFile.ImageFile) -> None:
        """What the header says must be within the limits before a pixel is decoded."""
        short, long = sorted(image.size)
        if image.width * image.height > self._max_pixels:
            raise self._too_many_pixels()
        if long > self._max_side:
            raise InputUnavailable(f"the image has a side of more than {self._max_side} pixels")
        if short < _MIN_SIDE:
            raise InputUnavailable(f"the image has a side of less than {_MIN_SIDE} pixels")
        if long > _MAX_ASPECT_RATIO * short:
            raise InputUnavailable(f"the image has sides of more than 1 to {_MAX_ASPECT_RATIO}")
        # A JPEG with more than one picture is what many telephones write: the first one counts.
        if image.format in {"PNG", "WEBP"} and getattr(image, "n_frames", 1) > 1:
            raise InputUnavailable("the image is animated")

    def _too_many_pixels(self) -> InputUnavailable:
        return InputUnavailable(f"the image has more than {self._max_pixels} pixels")


def _fit_to_be_said(value: str) -> str:
    value = _UNPRINTABLE.sub("", value)
    return value if len(value) <= MAX_SAID else value[: MAX_SAID - 1] + _CUT_SHORT


def _check_png(data: bytes) -> None:
    """Refuse a PNG that costs out of all proportion to its size.

    Pillow inflates each colour profile or text to a megabyte, out of a thousandth of that, and does
    not count profiles, nor texts that turn out to be broken.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return
    at = len(_PNG_SIGNATURE)
    for _ in range(_MAX_PNG_CHUNKS):
        if at >= len(data) or data[at + 4 : at + 8] == b"IEND":
            break
        at += _PNG_CHUNK + int.from_bytes(data[at : at + 4])
    else:
        raise InputUnavailable("the image has too many PNG chunks")
    if sum(data.count(name) for name in _PNG_INFLATED) > _MAX_PNG_INFLATED:
        raise InputUnavailable("the image has too many PNG chunks")


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG that costs out of all proportion to its size; Pillow has no limit for that.

    Counts the markers instead of walking the segments: a walk that differs from the decoder's in
    one detail could be led past them.
    """
    if not data.startswith(b"\xff\xd8"):
        return
    markers = sum(1 for _ in islice(_JPEG_MARKER.finditer(data), _MAX_JPEG_MARKERS + 1))
    if (
        markers > _MAX_JPEG_MARKERS
        or data.count(b"\xff\xda") > _MAX_JPEG_SCANS
        or data.count(b"\xff\xe1") > _MAX_JPEG_EXIF_SEGMENTS
    ):
        raise InputUnavailable("the image has too many JPEG segments")


def _to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB, transparency over white."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips at 255 and gives a white picture.
        return image.point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, _WHITE), over).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF is broken: the pixels are good."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - Pillow's EXIF parser raises anything on hostile bytes, and a picture without a usable orientation is shown as it is
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    # The orientation alone is handed over: rewriting the whole of a broken EXIF can raise.
    image.info = {}
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image
