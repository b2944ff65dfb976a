"""Decoding of input files to images, and encoding of images to output files."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, Literal, NamedTuple

from PIL import ExifTags, Image, ImageFile

from consumer.media import jpeg_parts, png_parts, webp_parts
from consumer.media.ai_mark import IPTC, xmp_packet
from consumer.media.colours import paint_transparent_colour, to_rgb
from consumer.media.orientation import orientation, upright
from consumer.media.other_formats import format_name
from consumer.media.parts import FileParts, broken
from consumer.media.png_writer import COLOUR_TYPES, write_png
from consumer.ports.media import EncodedImage, InputUnavailable, OutputFormat

_MAX_ASPECT_RATIO = 200  # the processor of Qwen2.5-VL raises above it
_MIN_SIDE = 4  # pixels; some processors mistake a side of 1 or 3 for the number of channels
# Of one value in a file's metadata. A JPEG segment has room for 65,533 bytes, and a character needs
# up to 12 bytes in JSON. Two prompts and a few short values fit, in any script.
MAX_VALUE_LENGTH = 2_500  # characters
_ELLIPSIS = "…"
# Removed from values: many readers stop at NUL, escape sequences control terminals, and a lone
# surrogate cannot be encoded. Tabs and ends of lines are allowed.
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
# Times and sizes were measured with one 1024x1024 image with some noise.
_WEBP = {"quality": 90, "method": 2}  # 44 ms, 178 KB, 35.6 dB; method 4: twice as long for 0.2 dB
_JPEG = {"quality": 95, "subsampling": 0}  # 6 ms, 655 KB; 4:4:4 keeps edges of saturated colours


class ImageCodec:
    """Decodes and encodes images. It has no state but a thread pool: any thread may call it.

    Args:
        max_bytes: The largest input file.
        max_pixels: Width times height of the largest input; decoding takes up to 26 bytes each.
        max_side: The longest side of an input, in pixels.
        ai_mark: Whether the written files have the AI mark.
    """

    def __init__(
        self,
        max_bytes: int = 20 * 2**20,
        *,
        max_pixels: int = 16_000_000,
        max_side: int = 16_384,
        ai_mark: bool = True,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._max_side = max_side
        self._xmp = xmp_packet() if ai_mark else b""
        # Sized for one large image; images that are encoded in parallel share the threads.
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encoding")

    @property
    def max_bytes(self) -> int:
        """The largest input file."""
        return self._max_bytes

    def decode(self, data: bytes) -> Image.Image:
        """Decode an input file to an RGB image: upright, in sRGB, transparency over white.

        The image carries no metadata. docs/reference/inputs.md lists what is read and refused.

        Raises:
            InputUnavailable: Not a PNG, JPEG or WebP file, broken, animated, or over the limits.
        """
        if not data:
            raise InputUnavailable("the image is empty")
        if len(data) > self._max_bytes:
            raise InputUnavailable(f"the image has more than {self._max_bytes} bytes")
        try:
            return self._decoded(_parts(data))
        except (InputUnavailable, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            # Pillow's checks at 89 and 179 million pixels run first. They warn or raise, depending
            # on the warning filters of the process.
            raise self._too_many_pixels() from None
        except Exception:  # noqa: BLE001 - exceptions of Pillow's decoders on hostile bytes are not documented: OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and others
            raise broken() from None

    def _decoded(self, parts: FileParts) -> Image.Image:
        with Image.open(BytesIO(parts.file), formats=(parts.format,)) as opened:
            self._check(opened)
            opened.load()
            if parts.second_file is not None:
                with Image.open(BytesIO(parts.second_file), formats=(parts.format,)) as second:
                    if second.tobytes() != opened.tobytes():
                        raise broken()
            rgb = to_rgb(opened, parts.profile)
            paint_transparent_colour(rgb, opened, parts)
        return upright(rgb, orientation(parts.exif, parts.xmp))

    def encode(
        self,
        image: Image.Image,
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        """Encode an image as a file with its hash; PNG is lossless, WebP and JPEG are not.

        The file contains the pixels, the provenance and the AI mark, and no metadata of the image.
        Equal pixels and provenance give equal bytes with the same libraries. The provenance and the
        mark change no pixel.

        Args:
            image: RGB, or any other mode. PNG preserves 8-bit grey and alpha. Other modes, and all
                modes in WebP and JPEG, are converted to RGB over white.
            output_format: The format of the file.
            seed: Copied to the result.
            provenance: PNG has one text chunk for each name. WebP and JPEG have one ASCII JSON
                object in the EXIF field ImageDescription. Values are cut to `MAX_VALUE_LENGTH`
                characters, and control characters are removed.
        """
        metadata = {name: _metadata_value(value) for name, value in (provenance or {}).items()}
        data = self._file(image, output_format, metadata)
        file_format = _FILE_FORMATS[output_format]
        return EncodedImage(
            data=data,
            media_type=file_format.media_type,
            extension=file_format.extension,
            width=image.width,
            height=image.height,
            seed=seed,
            sha256=hashlib.sha256(data).hexdigest(),
            marks=(IPTC,) if self._xmp else (),
        )

    def _file(
        self, image: Image.Image, output_format: OutputFormat, metadata: dict[str, str]
    ) -> bytes:
        if output_format == "png":
            writable = image.mode in COLOUR_TYPES and "transparency" not in image.info
            pixels = image if writable else to_rgb(image)
            return write_png(pixels, metadata, xmp=self._xmp, each=self._threads.map)
        pixels = to_rgb(image)
        pixels.info = {}  # Pillow would write a comment or a colour profile from here
        options: dict[str, Any] = dict(_WEBP if output_format == "webp" else _JPEG)
        if self._xmp:
            options["xmp"] = self._xmp
        if metadata:
            options["exif"] = exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = json.dumps(metadata)  # EXIF 2 requires ASCII
        file = BytesIO()
        pixels.save(file, output_format.upper(), **options)
        return file.getvalue()

    def _check(self, image: ImageFile.ImageFile) -> None:
        """Check the size in the header against the limits, before a pixel is decoded."""
        short, long = sorted(image.size)
        if image.width * image.height > self._max_pixels:
            raise self._too_many_pixels()
        if long > self._max_side:
            raise InputUnavailable(f"the image has a side of more than {self._max_side} pixels")
        if short < _MIN_SIDE:
            raise InputUnavailable(f"the image has a side of less than {_MIN_SIDE} pixels")
        if long > _MAX_ASPECT_RATIO * short:
            raise InputUnavailable(f"the image has sides of more than 1 to {_MAX_ASPECT_RATIO}")

    def _too_many_pixels(self) -> InputUnavailable:
        return InputUnavailable(f"the image has more than {self._max_pixels} pixels")


def _metadata_value(value: str) -> str:
    value = _UNPRINTABLE.sub("", value)
    if len(value) <= MAX_VALUE_LENGTH:
        return value
    return value[: MAX_VALUE_LENGTH - 1] + _ELLIPSIS


def _parts(data: bytes) -> FileParts:
    """Split the file into its parts, by its format."""
    if data.startswith(png_parts.SIGNATURE):
        return png_parts.png_parts(data)
    if data.startswith(jpeg_parts.START):
        return jpeg_parts.jpeg_parts(data)
    if webp_parts.is_webp(data):
        return webp_parts.webp_parts(data)
    if name := format_name(data):
        raise InputUnavailable(f"the image is {name}; PNG, JPEG and WebP are read")
    raise InputUnavailable("the image is not a readable PNG, JPEG or WebP file")
