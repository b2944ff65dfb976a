"""Validates what is stored under a result subject.

A sender names the reply subject of its messages, and the server replies there without checking
permissions. Therefore any result subject can have a message that is not an event of its request:
a publish acknowledgement, a stored message as JSON, a trace event or an empty reply.
"""

from pydantic import ValidationError
from pydantic_core import from_json

from consumer.bus.reading import StoredMessage
from consumer.ports.bus import ResultEvent, ResultUnreadable
from generation_contracts import decode_result

_EVENT_TYPES = "generation."  # prefix of the event types in every version of the contract


def event_of(message: StoredMessage, queue: str, request_id: str) -> ResultEvent | None:
    """Return the terminal event of a request, or None if the message is not its event.

    Raises:
        ResultUnreadable: The message is an event of the request in a version of the contract that
            this process does not know.
    """
    try:
        event = decode_result(message.body)
    except ValidationError:
        if _is_of_another_version(message.body, queue, request_id):
            raise ResultUnreadable from None
        return None
    return event if (event.request_id, event.queue_name) == (request_id, queue) else None


def _is_of_another_version(body: bytes, queue: str, request_id: str) -> bool:
    # No reply of the server has these three fields, and a sender cannot publish results.
    try:
        value = from_json(body)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.get("request_id") == request_id
        and value.get("queue", value.get("task")) == queue
        and str(value.get("type")).startswith(_EVENT_TYPES)
    )
