"""Headers: CloudEvents' NATS binding in binary mode, and the few of our own.

In binary mode the attributes travel as `ce-` headers and the body stays plain JSON, so `nats sub`
and `jq` read it at once. Source: the CloudEvents specification, NATS protocol binding, working
draft 1.0.3: 1.0.2 has the structured mode only.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from generation_contracts.events import EventBase, TerminalEvent

REPLY_TO: Final = "Reply-To"
MESSAGE_ID: Final = "Nats-Msg-Id"  # case-sensitive: JetStream drops a second message with the same
TRACE_PARENT: Final = "traceparent"  # W3C trace context, passed from a request to its events
EXPECTED_LAST_SUBJECT_SEQUENCE: Final = "Nats-Expected-Last-Subject-Sequence"

# Written by workers. A sender can write the first into a request of its own: it then has fewer
# attempts.
EARLIER_ATTEMPTS: Final = "Generation-Attempts"  # attempts before the message was stored
EARLIER_DELIVERIES: Final = "Generation-Deliveries"  # deliveries before it, attempts or not
RETRY_DELAY: Final = "Generation-Retry-Delay"  # milliseconds after the message was stored
# No answer of the server carries it, so no reply subject can forge a mark.
MARK: Final = "Generation-Mark"
MAX_EARLIER_ATTEMPTS: Final = 99  # the largest CONSUMER_MAX_ATTEMPTS is 100

# On dead letters; the original headers follow with the prefix, so that none of them acts again.
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
    """The versioned type of an event, for example `generation.v1.succeeded`."""
    value: str = getattr(event, "type")  # noqa: B009 - every concrete event has it, the base has not
    return value


def event_id(event: EventBase) -> str:
    """What makes an event unique: a request has one terminal event, whichever attempt wrote it."""
    if isinstance(event, TerminalEvent):
        return f"{event.request_id}.done"
    return f"{event.request_id}.{event.attempt}.{event.sequence}"


def event_headers(event: EventBase, *, trace_parent: str | None = None) -> dict[str, str]:
    """The headers of an event, all ASCII.

    Args:
        event: Any event.
        trace_parent: The request's `traceparent`, passed on as it came.
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
    if trace_parent is not None:
        headers[TRACE_PARENT] = trace_parent
    return headers


def earlier_attempts(headers: Mapping[str, str]) -> int:
    """Return the attempts of a request before its message was stored; 0 where it names none.

    A value that no worker writes counts as 0.
    """
    return min(_number(headers.get(EARLIER_ATTEMPTS)), MAX_EARLIER_ATTEMPTS)


def earlier_deliveries(headers: Mapping[str, str]) -> int:
    """Return the deliveries of a request before its message was stored, attempts or not."""
    return max(_number(headers.get(EARLIER_DELIVERIES)), earlier_attempts(headers))


def _number(value: object) -> int:
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) else 0


def wire_size(body: bytes, headers: Mapping[str, str]) -> int:
    """Bytes that a message takes of the server's `max_payload`: the body and the encoded headers.

    The client's own check counts the body alone; a message over the limit makes the server drop
    the connection, and nats-py stays closed for good.
    """
    if not headers:
        return len(body)
    lines = sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    return len(body) + len(b"NATS/1.0\r\n") + lines + len(b"\r\n")
