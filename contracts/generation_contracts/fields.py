"""The types and limits of the fields that requests are made of."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)

from generation_contracts.artifacts import ImageSource
from generation_contracts.base import pattern_message

MAX_PROMPT = 8_000  # characters; text encoders read far fewer, language models more
MAX_IMAGES = 16  # images in one image-to-text request
MAX_OUTPUTS = 8  # images from one text-to-image request
MAX_SIDE = 4_096  # pixels; a model's own maximum is checked by its worker
MAX_SEED = 2**32 - 1  # every random generator in use accepts it, and JSON represents it exactly
MAX_STEPS = 200
MAX_NEW_TOKENS = 8_192
MAX_CHAIN = 8  # requests in a routing slip, so nine steps with the first
MAX_MODEL_NAME = 200  # characters; a hub id or the name of a folder
MAX_BRANCH = 24  # characters
MAX_METADATA = 16  # entries
MAX_ADAPTERS = 4  # in one request


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must contain more than white space")
    return value


# pydantic would also accept a number, and "1767323045", and guess seconds or milliseconds.
_RFC_3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]", re.ASCII)


def _rfc_3339(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if _RFC_3339.match(value):
            return datetime.fromisoformat(value)
    except ValueError:
        pass  # the text of this error contains the value
    raise ValueError("must be a time like 2030-01-02T03:04:05Z")


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is out of range") from None


def _outputs_or_list(value: Any) -> str:
    return "outputs" if isinstance(value, str) else "list"


Deadline = Annotated[AwareDatetime, BeforeValidator(_rfc_3339), AfterValidator(_in_utc)]
Images = Annotated[
    tuple[ImageSource, ...],
    Field(
        min_length=1,
        max_length=MAX_IMAGES,
        fail_fast=True,
        description=(
            "PNG, JPEG or WebP files in the object store, inside the request (which must fit "
            "the server's `max_payload`), or at an `https://` host that the worker's settings list"
        ),
    ),
]
Prompt = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_PROMPT), AfterValidator(_not_blank)
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_NAME)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(ge=16, le=MAX_SIDE, description="pixels")]
AdapterName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"),
    pattern_message("must be 1-64 characters of A-Z a-z 0-9 _ -, the first a letter or digit"),
]
AdapterWeight = Annotated[float, Field(ge=-4, le=4, description="1 is the strength of training")]
# The input images of a later step of a chain.
StepImages = Annotated[
    Annotated[Literal["$outputs"], Tag("outputs")] | Annotated[Images, Tag("list")],
    Discriminator(_outputs_or_list),
]
Branch = Annotated[
    str,
    StringConstraints(pattern=r"^([0-9]+(-[0-9]+)*)?$", max_length=MAX_BRANCH),
    pattern_message("must be numbers with - between them"),
]
