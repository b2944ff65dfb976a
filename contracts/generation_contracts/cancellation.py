"""The answer to a cancellation: what there was to cancel, and what has become of it."""

from typing import Annotated, Literal

from pydantic import Field

from generation_contracts.base import EventPart
from generation_contracts.subjects import RequestId


class CancelReply(EventPart):
    """What the one who cancels is told at once.

    Attributes:
        status: `cancelled`: it waited in the queue, or had been cancelled before, and its terminal
            event is stored. `stopping`: a worker has it and stops at its next step; the terminal
            event follows when the device is free. `finished`: too late, it has ended otherwise.
            `unknown`: there is no request with this id, neither waiting nor ended.
        result: Type of the terminal event, where one is stored.
    """

    request_id: RequestId
    status: Literal["cancelled", "stopping", "finished", "unknown"]
    result: Annotated[str, Field(description="type of the stored terminal event")] | None = None


def decode_cancel_reply(body: bytes) -> CancelReply:
    """Bytes to the answer.

    Raises:
        pydantic.ValidationError: They are none.
    """
    return CancelReply.model_validate_json(body)
