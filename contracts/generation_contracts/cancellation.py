"""The reply to a cancellation."""

from typing import Literal

from pydantic import Field

from generation_contracts.base import EventPart
from generation_contracts.subjects import RequestId


class CancelReply(EventPart):
    """Reply to a cancellation, sent to the inbox of the caller."""

    request_id: RequestId
    status: Literal["cancelled", "stopping", "finished", "unknown"] = Field(
        description=(
            "`cancelled`: the cancelled event is stored; the request was queued, or was cancelled "
            "before. `stopping`: a worker has received the request; the terminal event follows "
            "when the device is free, or from the next worker if this worker has died. "
            "`finished`: too late, the request has ended in another way. `unknown`: no request "
            "with this id is queued, in progress or finished; a request that is delivered to a "
            "worker within 10 minutes is cancelled. The id of a chain's first request cancels the "
            "whole chain."
        )
    )
    result: str | None = Field(
        default=None, description="type of the stored terminal event; absent if none is stored"
    )


def decode_cancel_reply(body: bytes) -> CancelReply:
    """Decode the bytes of a reply.

    Raises:
        pydantic.ValidationError: The bytes are not a reply of this version.
    """
    return CancelReply.model_validate_json(body)
