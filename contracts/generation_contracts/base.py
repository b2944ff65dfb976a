"""Base classes of all messages. Requests forbid unknown fields, events ignore them."""

from enum import StrEnum
from typing import Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError


class Task(StrEnum):
    """What a model does. A worker serves exactly one task."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_TEXT = "image_to_text"
    CUSTOM = "custom"


# Every installation has the default queues of these tasks. The queues of later tasks are created
# when they are needed, because each reserves disk space.
DEFAULT_QUEUES: Final = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT)


def pattern_message(text: str) -> WrapValidator:
    """Replace pydantic's message for a value that does not match its pattern.

    Place it after the constraint in an `Annotated` type. The JSON Schema keeps the pattern.

    Args:
        text: The message, for example "must be a bucket name: 3-63 characters".
    """

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["type"] != "string_pattern_mismatch":
                raise
        raise PydanticCustomError("string_pattern_mismatch", text)

    return WrapValidator(validate)


class RequestPart(BaseModel):
    """Base of all objects that a sender writes. An unknown field is an error.

    Otherwise a misspelt optional parameter would be ignored silently.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


class EventPart(BaseModel):
    """Base of all objects that the daemon writes. Unknown fields of a newer daemon are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
