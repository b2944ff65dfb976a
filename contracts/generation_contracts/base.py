"""The bases of all messages: frozen, and strict on the way in, tolerant on the way out."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Task(StrEnum):
    """What a worker's model does; a worker serves exactly one task."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_TEXT = "image_to_text"


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
