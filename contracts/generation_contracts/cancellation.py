"""The answer to a cancellation: what there was to cancel, and what has become of it."""

from typing import Literal

from pydantic import Field

from generation_contracts.base import EventPart
from generation_contracts.subjects import RequestId


class CancelReply(EventPart):
    """What the one who cancels is told at once."""

    request_id: RequestId
    status: Literal["cancelled", "stopping", "finished", "unknown"] = Field(
        description=(
            "`cancelled`: it waited, or had been cancelled before, and its terminal event is "
            "stored; `stopping`: a worker has it and stops at its next step, and the terminal "
            "event follows when the device is free; `finished`: too late, it has ended otherwise; "
            "`unknown`: no request with this id waits or has ended"
        )
    )
    result: str | None = Field(
        default=None, description="type of the terminal event; absent where none is stored"
    )


def decode_cancel_reply(body: bytes) -> CancelReply:
    """Bytes to the answer.

    Raises:
        pydantic.ValidationError: They are none.
    """
    return CancelReply.model_validate_json(body)
