"""The outputs of a runner."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import JsonValue

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


@dataclass(frozen=True)
class Image:
    """An image of Pillow. The worker encodes it, marks it as generated and stores it.

    Attributes:
        image: RGB, or any other mode of Pillow.
        output_format: Format of the file; only PNG is lossless.
    """

    image: "PillowImage"
    output_format: Literal["png", "webp", "jpeg"] = "png"


@dataclass(frozen=True)
class File:
    """Bytes that the worker stores unchanged.

    Attributes:
        data: The content of the file.
        media_type: For example `audio/wav`.
        extension: Of the object's key, without a dot; 1-8 characters of a-z and 0-9.
    """

    data: bytes = field(repr=False)
    media_type: str
    extension: str


@dataclass(frozen=True)
class Json:
    """A value that is part of the result event. The event must fit NATS' `max_payload`."""

    value: JsonValue


@dataclass(frozen=True)
class Text:
    """A text that is part of the result event."""

    text: str


Output: TypeAlias = Image | File | Json | Text
