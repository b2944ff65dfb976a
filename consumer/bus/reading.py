"""Reads single messages from the leader of their stream.

Only the leader answers `$JS.API.STREAM.MSG.GET`. Any replica may answer a direct get, even one that
lags behind. The reply for a missing message then has an empty body, and if the reply subject is a
subject of the JetStream API, the server executes that reply as a command. Therefore no stream
allows direct gets.
"""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nats.js.errors import APIError
from pydantic_core import from_json, to_json

from consumer.bus.codes import MESSAGE_NOT_FOUND
from consumer.bus.connection import API_TIMEOUT, Bus


@dataclass(frozen=True)
class StoredMessage:
    """A message as its stream stores it.

    Attributes:
        stored_at: Time of the server, aware.
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
        stream: Name of the stream.
        subject: Read the last message of this subject; with `sequence`, the first one from there.
        sequence: Read the message with this sequence.
        timeout: Seconds.

    Returns:
        The message, or None if it does not exist.

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
    value: Any = from_json(await bus.request(subject, to_json(query), within=timeout))
    if "error" in value:
        if value["error"].get("err_code") == MESSAGE_NOT_FOUND:
            return None
        APIError.from_error(value["error"])  # always raises
    message = value["message"]
    return StoredMessage(
        subject=message["subject"],
        sequence=message["seq"],
        stored_at=datetime.fromisoformat(message["time"]).astimezone(UTC),
        headers=_headers(base64.b64decode(message.get("hdrs", ""))),
        body=base64.b64decode(message.get("data", "")),
    )


def _headers(data: bytes) -> dict[str, str]:
    # The parser of nats-py damages values that are not ASCII.
    lines = data.decode(errors="replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name: text.strip() for name, _, text in pairs}
