"""Replays dead letters: publishes the request again under its id.

A worker that finds a terminal event for a request replies with it and does not run the request.
Therefore a replay first deletes the failed event, then publishes the request, and finally deletes
the dead letter. A second replay completes an interrupted one:

- The request is published under its id. If a copy waits or runs, it is found by its subject, and
  nothing is changed.
- Only a failed event of this request is deleted, by its sequence, never a message stored later.
- Every replay uses the same message id, so that the stream drops a copy after a lost reply. If the
  stream reports a duplicate, the stored message is compared, because a sender may have used the id.
  The request is stored under another, random message id in three cases: the stored message differs,
  this replay has deleted an event, or the first copy does not exist any more.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

import structlog
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError

from consumer.bus.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.dead_letters.listing import StoredDeadLetter, describe_errors
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.reading import StoredMessage, read_message
from consumer.bus.results import event_of
from consumer.ports.bus import ResultEvent, ResultUnreadable
from generation_client import QueueFull
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import (
    CancelledEvent,
    InvalidRequest,
    Subjects,
    SucceededEvent,
    Task,
    decode_request,
    request_digest,
)
from generation_contracts.headers import MESSAGE_ID, wire_size
from generation_contracts.queues import QueueInfo
from generation_contracts.subjects import is_request_id

log = structlog.get_logger()

_TOO_LARGE = "the request is too large to be published again"


class NotReplayed(Exception):  # noqa: N818 - a state of the dead letter
    """The dead letter was not replayed and is kept; the text is the reason."""


class Replay(Enum):
    """Outcome of a replay; in both cases the dead letter is deleted."""

    PUBLISHED = "replayed"
    ALREADY_SUCCEEDED = "has succeeded since; the dead letter is deleted"


@dataclass(frozen=True)
class _Attempt:
    """The message that a replay publishes.

    Attributes:
        queue: Queue of the request.
        stream: Request stream of the queue.
        subject: Request subject with the request's id, also if the original subject had none.
        headers: Headers of the request, without those that control NATS.
        message_id: Message id of the first copy, and prefix of the ids of later copies.
        digests: Possible digests of this request in its terminal event.
    """

    queue: str
    request_id: str
    stream: str
    subject: str
    headers: dict[str, str]
    message_id: str
    digests: frozenset[str]
    body: bytes = field(repr=False)

    @classmethod
    def of(
        cls, letter: StoredDeadLetter, subjects: Subjects, queues: Mapping[str, QueueInfo]
    ) -> Self:
        """Create the message for a dead letter.

        Args:
            letter: A dead letter with its body.
            subjects: Subjects of the installation.
            queues: All queues, by name.

        Raises:
            NotReplayed: The dead letter is incomplete.
        """
        if letter.body is None:
            raise ValueError("a dead letter from a listing has no body; read it first")
        if letter.truncated:
            raise NotReplayed("it is truncated: the rest of the request is lost")
        queue = queues.get(letter.queue)
        if queue is None:
            raise NotReplayed("its queue does not exist; `consumer queues list` lists the queues")
        if not is_request_id(letter.request_id):
            raise NotReplayed("it does not name the id of the request")
        # Only the id is taken from the subject in the header. Every client with permission to write
        # dead letters can write any subject there, and this process may publish to any subject.
        token = subjects.id_in(letter.subject, queue.name)
        request_id = token if token is not None and is_request_id(token) else letter.request_id
        # With the time, because sequences repeat when the stream is created again.
        message = f"{subjects.dead_letters_stream}-{letter.sequence}"
        return cls(
            queue=queue.name,
            request_id=letter.request_id,
            stream=subjects.requests_stream(queue.name),
            subject=subjects.request(queue.name, request_id),
            headers=_without_control_headers(letter.originals),
            message_id=f"{message}-{int(letter.stored_at.timestamp() * 1e6):x}.replay",
            digests=_digests(queue.task, letter.body),
            body=letter.body,
        )


@dataclass(frozen=True)
class _StoredResult:
    """The terminal event of a request, and its sequence in the results stream."""

    sequence: int
    event: ResultEvent


class Replayer:
    """Publishes the requests of dead letters again.

    Args:
        bus: A connection.
        subjects: The root determines the streams and subjects.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._results = subjects.results_stream
        self._directory = QueueDirectory(bus, subjects)

    async def replay(self, letter: StoredDeadLetter) -> Replay:
        """Publish the request of a dead letter again, and delete the dead letter.

        Args:
            letter: From `DeadLetters.read`.

        Returns:
            Whether the request was published, by this call or by an earlier, interrupted one, or
            has already succeeded.

        Raises:
            NotReplayed: The dead letter cannot be replayed; it is kept.
            QueueFull: The request stream is full; the dead letter is kept.
            BusUnavailable: The server does not reply, refuses, or lacks a stream. Another call
                completes the replay.
        """
        attempt = _Attempt.of(letter, self._subjects, await self._directory.queues())
        outcome = await self._republish(letter, attempt)
        await self._delete(self._subjects.dead_letters_stream, letter.sequence)
        log.info(
            "dead_letter_deleted",
            outcome=outcome.name,
            sequence=letter.sequence,
            request_id=letter.request_id,
        )
        return outcome

    async def _republish(self, letter: StoredDeadLetter, attempt: _Attempt) -> Replay:
        if await self._is_in_progress(letter, attempt.stream):
            raise NotReplayed("a worker has not settled the request yet: try again later")
        # Before the event is read: a request that has left the stream has an event.
        waiting = await self._read(attempt.stream, subject=attempt.subject)
        if waiting is not None:
            message_id = waiting.headers.get(MESSAGE_ID, "")
            if message_id.startswith(attempt.message_id) and waiting.body == attempt.body:
                return Replay.PUBLISHED  # by a call that has not deleted the dead letter
            raise NotReplayed("a request with its id is in the queue already")
        await self._require_space(attempt)
        result = await self._read_result(attempt)
        if result is not None:
            if isinstance(result.event, SucceededEvent):
                return _already_succeeded(result.event, attempt)
            _require_deletable(result.event, attempt)
            await self._delete(self._results, result.sequence)
        await self._publish(attempt, event_deleted=result is not None)
        return Replay.PUBLISHED

    async def _publish(self, attempt: _Attempt, *, event_deleted: bool) -> None:
        stored = await self._store(attempt, attempt.message_id)
        while stored.duplicate and (
            event_deleted or not await self._is_queued(attempt, stored.seq)
        ):
            stored = await self._store(attempt, f"{attempt.message_id}-{secrets.token_hex(16)}")

    # -- reads ------------------------------------------------------------------------------------

    async def _is_in_progress(self, letter: StoredDeadLetter, stream: str) -> bool:
        # A worker stores the dead letter, then the failed event, then settles the request. For a
        # copy that is published in between, a worker would reply with that event and not run it.
        key = re.fullmatch(
            rf"{stream}-([1-9][0-9]{{,18}})-([0-9a-f]+)\.dead(-[0-9a-f]+)?",
            letter.headers.get(MESSAGE_ID, ""),
        )
        if key is None:
            return False
        request = await self._read(stream, sequence=int(key[1]))
        # Sequences repeat when a stream is created again, so the time is compared as well.
        return request is not None and int(request.stored_at.timestamp()) == int(key[2], 16)

    async def _is_queued(self, attempt: _Attempt, sequence: int) -> bool:
        stored = await self._read(attempt.stream, sequence=sequence)
        expected = (attempt.subject, attempt.body)
        return stored is not None and (stored.subject, stored.body) == expected

    async def _read_result(self, attempt: _Attempt) -> _StoredResult | None:
        subject = self._subjects.result(attempt.queue, attempt.request_id)
        stored = await self._read(self._results, subject=subject)
        if stored is None:
            return None
        try:
            event = event_of(stored, attempt.queue, attempt.request_id)
        except ResultUnreadable:
            raise NotReplayed("the event under its id cannot be read") from None
        # The worker deletes a message that is not an event of the request.
        return None if event is None else _StoredResult(stored.sequence, event)

    async def _require_space(self, attempt: _Attempt) -> None:
        # Checked before the event is deleted; the publish can still find the stream full.
        with describe_errors(self._bus, attempt.stream):
            async with self._bus.api_call(API_TIMEOUT):
                info = await self._bus.jetstream.stream_info(attempt.stream)
        size = wire_size(attempt.body, {**attempt.headers, MESSAGE_ID: attempt.message_id})
        if size > self._bus.client.max_payload or 0 < (info.config.max_msg_size or 0) < size:
            raise NotReplayed(_TOO_LARGE)
        if 0 < (info.config.max_msgs or 0) <= info.state.messages:
            raise QueueFull
        if 0 < (info.config.max_bytes or 0) < info.state.bytes + size:
            raise QueueFull

    async def _read(
        self, stream: str, *, subject: str | None = None, sequence: int | None = None
    ) -> StoredMessage | None:
        with describe_errors(self._bus, stream):
            return await read_message(self._bus, stream, subject=subject, sequence=sequence)

    # -- writes -----------------------------------------------------------------------------------

    async def _store(self, attempt: _Attempt, message_id: str) -> PubAck:
        headers = {**attempt.headers, MESSAGE_ID: message_id}
        with describe_errors(self._bus, attempt.stream):
            try:
                async with self._bus.api_call(API_TIMEOUT):
                    return await self._bus.jetstream.publish(
                        attempt.subject, attempt.body, timeout=API_TIMEOUT, headers=headers
                    )
            except NoStreamResponseError:
                raise BusUnavailable(
                    f"NATS: there is no stream {attempt.stream}; run `consumer apply`"
                ) from None
            except APIError as error:
                if error.err_code == STREAM_FULL:
                    raise QueueFull from None
                if error.err_code == TOO_LARGE_FOR_STREAM:
                    raise NotReplayed(_TOO_LARGE) from None
                raise
            except NO_PUB_ACK:
                raise BusUnavailable("NATS: the request is not confirmed") from None

    async def _delete(self, stream: str, sequence: int) -> None:
        with describe_errors(self._bus, stream):
            try:
                async with self._bus.api_call(API_TIMEOUT):
                    await self._bus.jetstream.delete_msg(stream, sequence)
            except APIError:
                # The server has no error code for a message that was deleted before.
                if await self._read(stream, sequence=sequence) is not None:
                    raise


def _already_succeeded(event: SucceededEvent, attempt: _Attempt) -> Replay:
    if event.request_digest not in attempt.digests:
        raise NotReplayed("another request with its id has succeeded since")
    return Replay.ALREADY_SUCCEEDED


def _require_deletable(event: ResultEvent, attempt: _Attempt) -> None:
    if isinstance(event, CancelledEvent):
        raise NotReplayed("the request has been cancelled since")
    if event.request_digest not in attempt.digests:
        raise NotReplayed("the failed event under its id belongs to another request")


def _digests(task: Task, body: bytes) -> frozenset[str]:
    # For a request that it cannot decode, a worker publishes the digest of the bytes.
    raw = f"sha256:{hashlib.sha256(body).hexdigest()}"
    try:
        return frozenset({raw, request_digest(decode_request(task, body))})
    except InvalidRequest:
        return frozenset({raw})


def _without_control_headers(originals: dict[str, str]) -> dict[str, str]:
    # The server would obey headers that begin with `Nats-` again; it compares the exact spelling,
    # and other spellings are left out as well. Without the `Generation-` headers, the count of
    # attempts restarts.
    return {
        name: text
        for name, text in originals.items()
        if not name.strip().lower().startswith(("nats-", "generation-"))
    }
