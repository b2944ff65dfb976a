"""Encodes and decodes the images of tests."""

import base64
import io

from PIL import Image, ImageDraw

PIXEL = (  # a PNG of one pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)


def decoded(text: str | None) -> Image.Image:
    """Decode a base64 text into an image, and load all its pixels."""
    assert text is not None
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    image.load()
    return image


def red_circle() -> bytes:
    """Return a PNG that the demonstration model of image_to_text can describe."""
    image = Image.new("RGB", (64, 64), (40, 80, 220))
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=(220, 40, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """Return a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
