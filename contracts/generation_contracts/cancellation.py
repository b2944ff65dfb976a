"""The reply to a cancellation: where the request was found, and what becomes of it."""

from typing import Literal

from pydantic import Field

from generation_contracts.base import EventPart
from generation_contracts.subjects import RequestId


class CancelReply(EventPart):
    """The reply to a cancellation, sent at once to the caller's inbox."""

    request_id: RequestId
    status: Literal["cancelled", "stopping", "finished", "unknown"] = Field(
        description=(
            "`cancelled`: the cancelled event is stored; the request waited in the queue, or had "
            "been cancelled before. `stopping`: a worker has received the request; the terminal "
            "event follows when the device is free, or from the next worker if that one has died. "
            "`finished`: too late, the request has ended otherwise. `unknown`: no request with "
            "this id waits, runs or has ended; if one is delivered to a worker within 10 minutes, "
            "it is cancelled. The id of a chain's first request stands for the whole chain."
        )
    )
    result: str | None = Field(
        default=None, description="type of the stored terminal event; absent where none is stored"
    )


def decode_cancel_reply(body: bytes) -> CancelReply:
    """Decode the bytes of a reply.

    Raises:
        pydantic.ValidationError: The bytes are not a reply.
    """
    return CancelReply.model_validate_json(body)
