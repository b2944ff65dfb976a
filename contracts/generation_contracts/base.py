"""The bases of all messages: frozen, and strict on the way in, tolerant on the way out."""

from enum import StrEnum
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError


class Task(StrEnum):
    """What a worker's model does; a worker serves exactly one task."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_TEXT = "image_to_text"


def says(words: str) -> WrapValidator:
    """Report a value that does not match its pattern in words, not as a regular expression.

    Stands behind the constraint in an `Annotated` type. The JSON Schema keeps the pattern.

    Args:
        words: What the value must be, for example "must be a bucket name: 3-63 characters".
    """

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["type"] != "string_pattern_mismatch":
                raise
        raise PydanticCustomError("string_pattern_mismatch", words)

    return WrapValidator(validate)


class RequestPart(BaseModel):
    """Base of whatever a sender writes: a field that is not in the contract is an error.

    A misspelt optional parameter would otherwise be dropped without a word.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


class EventPart(BaseModel):
    """Base of whatever the daemon writes: readers ignore fields that a newer daemon added."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
