"""Input images of a sender's machine: which forms they have, and how they are made to fit.

Pillow (the extra `images`) is needed only to scale an image, and is imported only then.
"""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation_client.errors import RequestInvalid
from generation_contracts import ArtifactReference, ImageArtifact, InlineImage, SucceededEvent
from generation_contracts.artifacts import ImageSource
from generation_contracts.uploads import MediaType

if TYPE_CHECKING:
    from PIL.Image import Image

# What a caller may pass as an image: a source of the contract, bytes of a file, the path of a file,
# an output, or a result with all of its images. `Any` is an image of Pillow.
ImageLike = (
    ImageSource | bytes | bytearray | memoryview | os.PathLike[str] | ImageArtifact | SucceededEvent
)
Images = ImageLike | Sequence[ImageLike]

MAX_PIXELS = 1_200_000  # workers scale larger images to this number; see MODEL_MAX_IMAGE_PIXELS
_QUALITY = 90  # of JPEG: a photo of MAX_PIXELS has about 400 kB
_SCALABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # the worker reads other modes better


def each_image(images: Any) -> Iterator[ImageSource | bytes]:
    """Yield one source of the contract, or the bytes of one file, for each image.

    Raises:
        RequestInvalid: A file cannot be read, or a result has no image.
    """
    alone = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike)
    if alone or not isinstance(images, Sequence):
        images = [images]
    for image in images:
        yield from _sources(image)


def _sources(image: Any) -> Iterator[ImageSource | bytes]:
    match image:
        case SucceededEvent():
            outputs = [output for output in image.outputs if isinstance(output, ImageArtifact)]
            if not outputs:
                raise RequestInvalid("images: the result has no image")
            yield from (_reference(output) for output in outputs)
        case ImageArtifact():
            yield _reference(image)
        case bytes() | bytearray() | memoryview():
            yield bytes(image)
        case os.PathLike():
            yield read_file(image)
        case _ if hasattr(image, "save") and hasattr(image, "mode"):
            yield _png(image)
        case _:
            yield image  # checked with the request


def read_file(path: os.PathLike[str]) -> bytes:
    """Return the bytes of a file.

    Raises:
        RequestInvalid: The file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RequestInvalid(f"images: {os.fspath(path)}: {error.strerror}") from None


def media_type(data: bytes) -> MediaType:
    """Return the media type of an image file, from its first bytes.

    Raises:
        RequestInvalid: The file is no PNG, JPEG or WebP file.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise RequestInvalid("images: not a PNG, JPEG or WebP file")


def inline(data: bytes) -> InlineImage:
    """Return an image inside the request; a base64 text of any length, which is checked later."""
    return InlineImage.model_construct(base64=base64.b64encode(data).decode())


def inline_size(data: bytes) -> int:
    """Return the bytes of an inline image in an encoded request."""
    return len('{"base64":""},') + (len(data) + 2) // 3 * 4


def fitted(files: Mapping[int, bytes], room: int) -> dict[int, bytes | None]:
    """Choose which files are sent inside a request, and scale the largest if that is needed.

    Args:
        files: Files by the number of their image.
        room: Bytes for all inline images in the encoded request; negative: no file.

    Returns:
        For each number the file, possibly scaled; None if it does not fit.
    """
    chosen: dict[int, bytes | None] = dict(files) if room >= 0 else dict.fromkeys(files)

    def size() -> int:
        return sum(inline_size(file) for file in chosen.values() if file is not None)

    for number in sorted(files, key=lambda number: -len(files[number])):
        if room >= 0 and size() > room and (smaller := scaled(files[number])) is not None:
            chosen[number] = smaller
    for number in sorted(files, key=lambda number: -len(chosen[number] or b"")):
        if size() > room:
            chosen[number] = None
    return chosen


def scaled(data: bytes) -> bytes | None:
    """Scale an image to the pixels that a worker uses, and encode it as JPEG.

    The image is turned by its EXIF orientation, and keeps its colour profile. Transparent parts
    become white, as in the worker.

    Returns:
        The JPEG file; None if Pillow is missing, cannot read the file, or does not shrink it.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - an extra that may not be there
    except ModuleNotFoundError:
        return None
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.mode not in _SCALABLE or getattr(image, "is_animated", False):
                return None
            profile = image.info.get("icc_profile")
            plain = image if image.mode in {"L", "RGB"} else _opaque(ImageOps.exif_transpose(image))
            factor = (MAX_PIXELS / (plain.width * plain.height)) ** 0.5
            if factor < 1:
                width, height = (max(1, int(side * factor)) for side in plain.size)
                plain.thumbnail((width, height), Image.Resampling.LANCZOS)
            result = _opaque(ImageOps.exif_transpose(plain))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # the worker reads more kinds of files, and says what is wrong
    file = BytesIO()
    result.save(file, "JPEG", quality=_QUALITY, icc_profile=profile, optimize=True)
    encoded = file.getvalue()
    return encoded if len(encoded) < len(data) else None


def _opaque(image: "Image") -> "Image":
    """Return an image as RGB or grey, over white."""
    from PIL import Image  # noqa: PLC0415 - an extra that may not be there

    if not image.has_transparency_data:
        return image.convert("L" if image.mode in {"1", "L"} else "RGB")
    over = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(over, image.convert("RGBA")).convert("RGB")


def _reference(artifact: ImageArtifact) -> ArtifactReference:
    return ArtifactReference(bucket=artifact.bucket, key=artifact.key)


def _png(image: "Image") -> bytes:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
