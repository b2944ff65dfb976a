"""Reads of single messages, answered by the leader of their stream.

`$JS.API.STREAM.MSG.GET` is answered by the leader alone. A direct get is answered by any replica,
which may be behind, and its answer to a missing message has an empty body, which the server carries
out as a command where the reply subject is one of its API. So no stream allows direct gets.
"""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nats.js.errors import APIError
from pydantic_core import from_json, to_json

from consumer.bus.codes import NO_MESSAGE
from consumer.bus.connection import API_TIMEOUT, Bus


@dataclass(frozen=True)
class StoredMessage:
    """A message as its stream keeps it.

    Attributes:
        stored_at: The server's time, aware.
    """

    subject: str
    sequence: int
    stored_at: datetime
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)


async def read_message(
    bus: Bus,
    stream: str,
    *,
    subject: str | None = None,
    sequence: int | None = None,
    timeout: float = API_TIMEOUT,  # noqa: ASYNC109 - also ends when the connection is lost
) -> StoredMessage | None:
    """Read one message of a stream from its leader.

    Args:
        bus: A connection.
        stream: Its name.
        subject: The last message of this subject; with `sequence`, the first from there on.
        sequence: The message with this sequence.
        timeout: Seconds.

    Returns:
        None where there is no such message.

    Raises:
        nats.js.errors.APIError: The server refuses, or there is no such stream.
        nats.errors.Error, OSError: The server does not answer.
    """
    query: dict[str, Any] = {"last_by_subj": subject}
    if sequence is not None:
        query = {"seq": sequence}
        if subject is not None:
            query["next_by_subj"] = subject
    subject = f"$JS.API.STREAM.MSG.GET.{stream}"
    value: Any = from_json(await bus.ask(subject, to_json(query), within=timeout))
    if "error" in value:
        if value["error"].get("err_code") == NO_MESSAGE:
            return None
        APIError.from_error(value["error"])  # it raises
    message = value["message"]
    return StoredMessage(
        subject=message["subject"],
        sequence=message["seq"],
        stored_at=datetime.fromisoformat(message["time"]).astimezone(UTC),
        headers=_headers(base64.b64decode(message.get("hdrs", ""))),
        body=base64.b64decode(message.get("data", "")),
    )


def _headers(data: bytes) -> dict[str, str]:
    # nats-py's own reader of these mutilates values that are not ASCII.
    lines = data.decode(errors="replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name: text.strip() for name, _, text in pairs}
