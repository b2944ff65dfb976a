"""Message headers: the NATS binding of CloudEvents in binary mode, and the daemon's own headers.

In binary mode the attributes are `ce-` headers and the body is plain JSON, readable with `nats sub`
and `jq`. Source: the CloudEvents specification, NATS protocol binding, working draft 1.0.3. Version
1.0.2 has the structured mode only.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from generation_contracts.events import EventBase, SucceededEvent, TerminalEvent

REPLY_TO: Final = "Reply-To"
MESSAGE_ID: Final = (
    "Nats-Msg-Id"  # case-sensitive; JetStream drops a second message with the same value
)
TRACE_PARENT: Final = "traceparent"  # W3C trace context, passed from a request to its events
AI_GENERATED: Final = "Generation-AI-Generated"  # `true` on results, and on HTTP responses
EXPECTED_LAST_SUBJECT_SEQUENCE: Final = "Nats-Expected-Last-Subject-Sequence"

# Written by workers. A sender that sets `Generation-Attempts` gets fewer attempts.
EARLIER_ATTEMPTS: Final = "Generation-Attempts"  # attempts before the message was stored
EARLIER_DELIVERIES: Final = "Generation-Deliveries"  # deliveries before it, attempts or not
RETRY_DELAY: Final = "Generation-Retry-Delay"  # milliseconds after the message was stored
# No reply of the server has this header, so no reply subject can forge a mark.
MARK: Final = "Generation-Mark"
MAX_EARLIER_ATTEMPTS: Final = 99  # the largest CONSUMER_MAX_ATTEMPTS is 100

# On dead letters. The original headers have a prefix, so that none of them takes effect again.
DEAD_LETTER_REASON: Final = "Dead-Letter-Reason"
DEAD_LETTER_CODE: Final = "Dead-Letter-Code"
DEAD_LETTER_REQUEST_ID: Final = "Dead-Letter-Request-Id"
DEAD_LETTER_ATTEMPTS: Final = "Dead-Letter-Attempts"
DEAD_LETTER_WORKER: Final = "Dead-Letter-Worker"
DEAD_LETTER_SUBJECT: Final = "Dead-Letter-Subject"
DEAD_LETTER_TIME: Final = "Dead-Letter-Time"
DEAD_LETTER_TRUNCATED: Final = "Dead-Letter-Truncated"
ORIGINAL_PREFIX: Final = "Original-"


def event_type(event: EventBase) -> str:
    """Return the versioned type of an event, for example `generation.v1.succeeded`."""
    value: str = getattr(event, "type")  # noqa: B009 - every concrete event has `type`, the base class has not
    return value


def event_id(event: EventBase) -> str:
    """Return the unique id of an event. All attempts share the id of the terminal event."""
    if isinstance(event, TerminalEvent):
        return f"{event.request_id}.done"
    return f"{event.request_id}.{event.attempt}.{event.sequence}"


def event_headers(event: EventBase, *, trace_parent: str | None = None) -> dict[str, str]:
    """Return the headers of an event, all ASCII.

    Args:
        event: Any event.
        trace_parent: The `traceparent` of the request, unchanged.
    """
    headers = {
        "ce-specversion": "1.0",
        "ce-id": event_id(event),
        "ce-type": event_type(event),
        "ce-source": f"urn:generation:worker:{quote(event.worker, safe='')}",
        "ce-subject": event.request_id,
        "ce-time": event.time.isoformat().replace("+00:00", "Z"),
        "ce-datacontenttype": "application/json",
    }
    if isinstance(event, SucceededEvent) and event.ai_generated:
        headers[AI_GENERATED] = "true"
    if trace_parent is not None:
        headers[TRACE_PARENT] = trace_parent
    return headers


def earlier_attempts(headers: Mapping[str, str]) -> int:
    """Return the number of attempts before the message was stored.

    0 without the header, or with a value that workers do not write.
    """
    return min(_number(headers.get(EARLIER_ATTEMPTS)), MAX_EARLIER_ATTEMPTS)


def earlier_deliveries(headers: Mapping[str, str]) -> int:
    """Return the number of deliveries before the message was stored, attempts or not."""
    return max(_number(headers.get(EARLIER_DELIVERIES)), earlier_attempts(headers))


def _number(value: object) -> int:
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) else 0


def wire_size(body: bytes, headers: Mapping[str, str]) -> int:
    """Return the size of a message in bytes as the server compares it with `max_payload`.

    nats-py counts the body without the headers. The server closes the connection for a message over
    the limit, and nats-py does not reconnect then.
    """
    if not headers:
        return len(body)
    lines = sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    return len(body) + len(b"NATS/1.0\r\n") + lines + len(b"\r\n")
