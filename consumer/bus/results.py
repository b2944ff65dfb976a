"""What stands under a result subject: an event of this request, or something else.

A sender names the reply subject of what it publishes, and the server answers there without looking
at permissions: a publish acknowledgement, a stored message as JSON, a trace event or an empty
answer can lie under any result subject. None of them is an event of the request that the subject
names, so what a worker reads there is checked.
"""

from pydantic import ValidationError
from pydantic_core import from_json

from consumer.bus.reading import StoredMessage
from consumer.ports.bus import ResultEvent, ResultUnreadable
from generation_contracts import Task, decode_result

_EVENT_TYPES = "generation."  # what the type of every event begins with, in every version


def event_of(message: StoredMessage, task: Task, request_id: str) -> ResultEvent | None:
    """Return the terminal event of a request, or None where the message is not its event.

    Raises:
        ResultUnreadable: It is an event of the request in a version of the contract that this
            process does not know.
    """
    try:
        event = decode_result(message.body)
    except ValidationError:
        if _is_of_another_version(message.body, task, request_id):
            raise ResultUnreadable from None
        return None
    return event if (event.request_id, event.task) == (request_id, task) else None


def _is_of_another_version(body: bytes, task: Task, request_id: str) -> bool:
    # No answer of the server has these three fields, and a sender cannot publish results.
    try:
        value = from_json(body)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.get("request_id") == request_id
        and value.get("task") == task
        and str(value.get("type")).startswith(_EVENT_TYPES)
    )
