"""Reading of events, from messages and from the results stream."""

import base64
import json
import re
from typing import Any

from nats.aio.client import Client
from nats.errors import Error
from pydantic import ValidationError

from generation_client.codes import (
    JETSTREAM_NOT_ENABLED,
    JETSTREAM_NOT_ENABLED_FOR_ACCOUNT,
    MESSAGE_NOT_FOUND,
    STREAM_NOT_FOUND,
)
from generation_client.errors import ServiceUnavailable, UnsupportedMessage
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    ProgressEvent,
    StartedEvent,
    Subjects,
    SucceededEvent,
    TerminalEvent,
    decode_event,
)

LOOKUP_TIMEOUT = 5.0  # seconds

AnyEvent = StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent
ResultEvent = SucceededEvent | FailedEvent | CancelledEvent

_TRANSIENT = {"generation.v1.started", "generation.v1.progress"}  # not needed for a result
# The server reports a missing permission as text only, without a code.
_REFUSED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')


class ResultsUnreadable(Exception):  # noqa: N818 - a state of the server
    """The stream cannot be read now; a later lookup may succeed."""


def read_event(body: bytes, queue: str, request_id: str) -> AnyEvent | None:
    """Decode an event of one request.

    Returns:
        The event, or None if the message is not an event of this request.

    Raises:
        UnsupportedMessage: The message is an event of this request in a form that this version
            cannot decode.
    """
    try:
        event = decode_event(body)
    except ValidationError as error:
        _raise_if_newer(body, queue, request_id, error)
        return None
    return event if (event.queue_name, event.request_id) == (queue, request_id) else None


async def stored_result(
    client: Client, subjects: Subjects, queue: str, request_id: str
) -> ResultEvent | None:
    """Read the terminal event of a request from the results stream.

    The leader of the stream replies. A direct get may come from a replica that lags behind.

    Returns:
        The event, or None if no event of this request is stored.

    Raises:
        UnsupportedMessage: This version cannot decode the event.
        ServiceUnavailable: The stream is missing, or this user may not read it.
        ResultsUnreadable: The stream cannot be read now.
    """
    subject = f"$JS.API.STREAM.MSG.GET.{subjects.results_stream}"
    body = json.dumps({"last_by_subj": subjects.result(queue, request_id)}).encode()
    try:
        message = await client.request(subject, body, timeout=LOOKUP_TIMEOUT)
        reply: Any = json.loads(message.data)
        stored = _stored_body(reply, subjects)
    except (Error, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The last four: the reply is not from the server; another client subscribes to the subject.
        if reason := refusal(client, subject):
            raise ServiceUnavailable(reason) from None
        raise ResultsUnreadable(
            f"no answer from the results stream: {type(error).__name__}"
        ) from None
    event = None if stored is None else read_event(stored, queue, request_id)
    return event if isinstance(event, TerminalEvent) else None


def refusal(client: Client, *subjects: str) -> str | None:
    """Return a line about a refused permission, or None if the last error is another one.

    Args:
        client: Connected; `last_error` is set on every connection, also on one of the caller.
        subjects: The subjects of the permission, in addition to the inbox of the connection.
    """
    refused = _REFUSED.search(str(client.last_error))
    if refused is None:
        return None
    action = "publish" if refused[1] == "publish" else "subscribe"
    inbox = client.new_inbox().rpartition(".")[0]
    if refused[2].startswith(f"{inbox.lower()}."):
        return (
            f"NATS: permissions violation: this user may not {action} to {inbox}.>; "
            "set NATS_INBOX_PREFIX (`inbox_prefix` of nats.connect) to the user's own prefix"
        )
    for subject in subjects:
        if refused[2] == subject.lower():  # nats-py reports it in lower case
            return f"NATS: permissions violation: this user may not {action} to {subject}"
    return None


def _stored_body(reply: Any, subjects: Subjects) -> bytes | None:
    """Return the body in a reply to `STREAM.MSG.GET`, or None if there is no such message."""
    error = reply.get("error")
    if error is None:
        return base64.b64decode(reply["message"].get("data", ""))
    match error.get("err_code"):
        case code if code == MESSAGE_NOT_FOUND:
            return None
        case code if code == STREAM_NOT_FOUND:
            raise ServiceUnavailable(
                f"NATS: there is no stream {subjects.results_stream}; run `consumer apply`"
            )
        case code if code in {JETSTREAM_NOT_ENABLED, JETSTREAM_NOT_ENABLED_FOR_ACCOUNT}:
            raise ServiceUnavailable(f"NATS: {error['description']}")
    raise ResultsUnreadable(f"the results stream cannot be read: {error['description']}")


def _raise_if_newer(body: bytes, queue: str, request_id: str, error: ValidationError) -> None:
    try:
        value = json.loads(body)
    except ValueError:
        return
    kind = str(value.get("type")) if isinstance(value, dict) else ""
    if not kind.startswith("generation.") or kind in _TRANSIENT:
        return
    named = value.get("queue", value.get("task", queue)), value.get("request_id", request_id)
    if named != (queue, request_id):
        return
    # The first name is the type, with which pydantic selects the class.
    where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"][1:])
    raise UnsupportedMessage(kind, body, where)
