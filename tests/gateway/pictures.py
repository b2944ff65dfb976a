"""Images that tests send, and what they look at in the images they get."""

import base64
import io

from PIL import Image, ImageDraw


def decoded(text: str | None) -> Image.Image:
    """The image in a base64 text; it is read completely."""
    assert text is not None
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    image.load()
    return image


def red_circle() -> bytes:
    """A PNG that the demonstration model of image_to_text knows how to describe."""
    image = Image.new("RGB", (64, 64), (40, 80, 220))
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=(220, 40, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """A `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
