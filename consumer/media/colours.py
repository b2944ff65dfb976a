"""Conversion of pixels of any mode to sRGB over white."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from consumer.media.parts import MAX_PROFILE, FileParts

_WHITE = (255, 255, 255)
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode
# Largest difference, in levels of 255, for which a profile is not applied. Profiles of sRGB differ
# by rounding; without conversion, the pixels of such files stay exact.
_INVISIBLE = 3
# A tag type that can repeat a step of the conversion any number of times, in 8 bytes each: a file
# of 402 bytes would take 7 s. Profiles for monitors and printers do not have it.
_ELEMENTS = b"mpet"
_SAMPLES = range(0, 256, 51)  # levels of each channel with which a profile is tested


def to_rgb(image: Image.Image, profile: bytes = b"") -> Image.Image:
    """Return a copy in RGB, with transparency over white.

    Args:
        image: Any mode.
        profile: An ICC profile of the colours. It is applied if that changes colours visibly; a
            profile that is broken or for another mode is ignored.
    """
    colours, alpha = _planes(image)
    rgb = _to_srgb(colours, profile)
    if alpha is not None:
        over = Image.new("RGB", rgb.size, _WHITE)
        over.paste(rgb, mask=alpha)
        return over
    return rgb.copy() if rgb is image else rgb


def paint_transparent_colour(rgb: Image.Image, decoded: Image.Image, parts: FileParts) -> None:
    """Paint the pixels of a PNG's transparent colour white, in place.

    Args:
        rgb: The image in RGB, of the same size as the decoded one.
        decoded: As Pillow decodes the file without its tRNS chunk: mode 1, L, I;16 or RGB.
        parts: The file; all bits of a sample are compared, also those that Pillow drops.
    """
    if not parts.transparent:
        return
    key = np.array(parts.transparent, "u2")
    if decoded.mode == "RGB":
        wide = parts.depth > 8  # noqa: PLR2004 - bits of a sample in memory
        same = _equals(decoded, key >> 8 if wide else key)
        if wide:
            same &= _equals(_low_bytes(parts), key & 0xFF)
    elif decoded.mode.startswith("I"):
        same = np.asarray(decoded) == key
    else:
        grey = decoded.convert("L") if decoded.mode == "1" else decoded
        same = np.asarray(grey) == (key * (255 // (2**parts.depth - 1))).astype("u1")
    rgb.paste(_WHITE, mask=Image.fromarray(same))


def _planes(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours, in a mode that profiles support, and the alpha channel."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips at 255 and gives a white image.
        return image.point(lambda value: value * (1 / 257)).convert("L"), None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return image if image.mode in _MODES.values() else image.convert("RGB"), None


def _to_srgb(colours: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours to sRGB; without a usable profile, as Pillow converts modes."""
    if profile and len(profile) <= MAX_PROFILE:
        try:
            converting = _conversion(profile, colours.mode)
            if converting is not None:
                return ImageCms.applyTransform(colours, converting) or colours
        except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile, but intact pixels
            pass
    return colours.convert("RGB")


def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion to sRGB; None if it has no visible effect or could take minutes."""
    if _ELEMENTS in profile:
        return None
    source = ImageCms.getOpenProfile(BytesIO(profile))
    if _MODES.get(source.profile.xcolor_space.strip()) != mode:
        return None
    conversion = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
    )
    bands = Image.getmodebands(mode)
    samples = np.stack(np.meshgrid(*[np.array(_SAMPLES, "u1")] * bands), axis=-1)
    tested = Image.frombytes(mode, (samples.size // bands, 1), samples.tobytes())
    converted = ImageCms.applyTransform(tested, conversion)
    plain = np.asarray(tested.convert("RGB"), "i2")
    return conversion if np.abs(plain - np.asarray(converted)).max() > _INVISIBLE else None


def _equals(image: Image.Image, colour: NDArray[Any]) -> NDArray[np.bool_]:
    """Compare each pixel with a colour of 8-bit samples; shape (height, width)."""
    same: NDArray[np.bool_] = np.ones((image.height, image.width), np.bool_)
    for band, sample in enumerate(colour.astype("u1")):
        same &= np.asarray(image.getchannel(band)) == sample
    return same


def _low_bytes(parts: FileParts) -> Image.Image:
    """Decode the lower byte of each sample of a 16-bit RGB file.

    Pillow decodes the upper byte only. Its reader for the opposite byte order gives the lower byte.
    """
    with Image.open(BytesIO(parts.file), formats=(parts.format,)) as opened:
        opened.tile = [tile._replace(args="RGB;16L") for tile in opened.tile]
        opened.load()
        return opened
