"""Replaying dead letters: a new attempt of the same request id.

The request's failed event would stop the attempt, because a worker that finds a terminal event
answers with it and runs nothing. So the event is taken out of the stream, then the request is
published again, and the letter goes last. Doing it again finishes what was interrupted:

- The request is published under its id. While a copy waits or runs it is found by its subject, and
  nothing is touched.
- Only a failed event of this very request is deleted, by its sequence: never what is stored later.
- Every attempt has the same message id, so that the stream drops a copy whose answer was lost. What
  the stream calls a duplicate is compared with what it has stored: a sender may have used the id
  for something else. Where that is another message, where an event is deleted now, or where the
  first copy is done with, the request is stored under another message id, which is random.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

import structlog
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError

from consumer.bus.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.dead_letters.listing import StoredDeadLetter, describe_errors
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
from generation_contracts.subjects import is_request_id

log = structlog.get_logger()

_TOO_LARGE = "it is too large to be published again"


class NotReplayed(Exception):  # noqa: N818 - a state of the letter
    """The letter is kept; the text says why, in a few words."""


class Replay(Enum):
    """What has become of a letter; either way it is deleted."""

    PUBLISHED = "replayed"
    NOTHING_LEFT = "has succeeded since; the letter is deleted"


@dataclass(frozen=True)
class _Attempt:
    """What is published for a letter.

    Attributes:
        stream: Where requests of its task are.
        subject: Ends in the request's id, whatever the request's own subject was.
        headers: Those of the request, but for what NATS acts upon.
        message_id: Of the first copy; those of later ones begin with it.
        digests: What the terminal event of this very request may say that it has asked for.
    """

    task: Task
    request_id: str
    stream: str
    subject: str
    headers: dict[str, str]
    message_id: str
    digests: frozenset[str]
    body: bytes = field(repr=False)

    @classmethod
    def of(cls, letter: StoredDeadLetter, subjects: Subjects) -> Self:
        """Read a letter.

        Raises:
            NotReplayed: It is not whole.
        """
        if letter.body is None:
            raise ValueError("a letter that is replayed has been read, not listed")
        if letter.truncated:
            raise NotReplayed("it is truncated: the rest of the request is lost")
        if letter.task is None or not is_request_id(letter.request_id):
            raise NotReplayed("it does not say which request it is")
        # The subject in the header is not taken as it is: who may write letters may write anything
        # there, and this process may publish anywhere.
        token = subjects.id_in(letter.subject, letter.task)
        known = token if token is not None and is_request_id(token) else letter.request_id
        # The stream's name and a sequence would repeat when the stream is made again.
        place = f"{subjects.dead_letters_stream}-{letter.sequence}"
        return cls(
            task=letter.task,
            request_id=letter.request_id,
            stream=subjects.requests_stream(letter.task),
            subject=subjects.request(letter.task, known),
            headers=_without_orders(letter.originals),
            message_id=f"{place}-{int(letter.stored_at.timestamp() * 1e6):x}.replay",
            digests=_digests(letter.task, letter.body),
            body=letter.body,
        )


@dataclass(frozen=True)
class _Standing:
    """The event on a request's result subject, and its sequence in the stream of results."""

    sequence: int
    event: ResultEvent


class Replayer:
    """Asks again for the requests of dead letters.

    Args:
        bus: A connection.
        subjects: The root decides the streams and subjects.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._results = subjects.results_stream

    async def replay(self, letter: StoredDeadLetter) -> Replay:
        """Ask again for the request of a letter that was read, and delete the letter.

        Returns:
            Whether the request was published, by this call or by an earlier one that did not come
            to its end, or had succeeded already.

        Raises:
            NotReplayed: With the reason.
            QueueFull: The request stream takes no more; the letter is kept.
            BusUnavailable: The server does not answer, refuses, or lacks a stream. Try again: what
                was begun is finished then.
        """
        attempt = _Attempt.of(letter, self._subjects)
        outcome = await self._ask_again(letter, attempt)
        await self._delete(self._subjects.dead_letters_stream, letter.sequence)
        log.info(
            "dead_letter_deleted",
            outcome=outcome.name,
            sequence=letter.sequence,
            request_id=letter.request_id,
        )
        return outcome

    async def _ask_again(self, letter: StoredDeadLetter, attempt: _Attempt) -> Replay:
        if await self._is_in_hand(letter, attempt.stream):
            raise NotReplayed("a worker still has it: try again later")
        # Before the event is read: what is not here any more has its event there.
        waiting = await self._read(attempt.stream, subject=attempt.subject)
        if waiting is not None:
            said = waiting.headers.get(MESSAGE_ID, "")
            if said.startswith(attempt.message_id) and waiting.body == attempt.body:
                return Replay.PUBLISHED  # by a call that did not come to deleting the letter
            raise NotReplayed("a request with its id is in the queue already")
        await self._check_room(attempt)
        standing = await self._standing(attempt)
        if standing is not None:
            if isinstance(standing.event, SucceededEvent):
                return _of_this_request(standing.event, attempt)
            _check_may_go(standing.event, attempt)
            await self._delete(self._results, standing.sequence)
        await self._publish(attempt, removed=standing is not None)
        return Replay.PUBLISHED

    async def _publish(self, attempt: _Attempt, *, removed: bool) -> None:
        stored = await self._store(attempt, attempt.message_id)
        while stored.duplicate and (removed or not await self._is_queued(attempt, stored.seq)):
            stored = await self._store(attempt, f"{attempt.message_id}-{secrets.token_hex(16)}")

    # -- what the streams have --------------------------------------------------------------------

    async def _is_in_hand(self, letter: StoredDeadLetter, stream: str) -> bool:
        # The letter is written before the failed event, and that before the request is settled. A
        # copy that is published in between would be answered with that event, and never run.
        place = re.fullmatch(
            rf"{stream}-([1-9][0-9]{{,18}})-([0-9a-f]+)\.dead(-[0-9a-f]+)?",
            letter.headers.get(MESSAGE_ID, ""),
        )
        if place is None:
            return False
        request = await self._read(stream, sequence=int(place[1]))
        # A stream that was made again counts from 1 again.
        return request is not None and int(request.stored_at.timestamp()) == int(place[2], 16)

    async def _is_queued(self, attempt: _Attempt, sequence: int) -> bool:
        stored = await self._read(attempt.stream, sequence=sequence)
        mine = (attempt.subject, attempt.body)
        return stored is not None and (stored.subject, stored.body) == mine

    async def _standing(self, attempt: _Attempt) -> _Standing | None:
        subject = self._subjects.result(attempt.task, attempt.request_id)
        stored = await self._read(self._results, subject=subject)
        if stored is None:
            return None
        try:
            event = event_of(stored, attempt.task, attempt.request_id)
        except ResultUnreadable:
            raise NotReplayed("the event under its id cannot be read") from None
        # What is no event of the request is left to the worker, which deletes it.
        return None if event is None else _Standing(stored.sequence, event)

    async def _check_room(self, attempt: _Attempt) -> None:
        # Before the event goes; what fills the stream in between is still refused by it.
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

    # -- what is changed --------------------------------------------------------------------------

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
                # The server has no error of its own for a message that is not there any more.
                if await self._read(stream, sequence=sequence) is not None:
                    raise


def _of_this_request(event: SucceededEvent, attempt: _Attempt) -> Replay:
    if event.request_digest not in attempt.digests:
        raise NotReplayed("another request with its id has succeeded since")
    return Replay.NOTHING_LEFT


def _check_may_go(event: ResultEvent, attempt: _Attempt) -> None:
    if isinstance(event, CancelledEvent):
        raise NotReplayed("has been cancelled since")
    if event.request_digest not in attempt.digests:
        raise NotReplayed("the failed event under its id is another request's")


def _digests(task: Task, body: bytes) -> frozenset[str]:
    # A worker that could not read the request has said what its bytes are.
    raw = f"sha256:{hashlib.sha256(body).hexdigest()}"
    try:
        return frozenset({raw, request_digest(decode_request(task, body))})
    except InvalidRequest:
        return frozenset({raw})


def _without_orders(originals: dict[str, str]) -> dict[str, str]:
    # What begins with Nats- is an order to the server, and would be carried out again. It knows
    # them by their exact spelling; others are left out with them. The attempts begin anew.
    return {
        name: text
        for name, text in originals.items()
        if not name.strip().lower().startswith(("nats-", "generation-"))
    }
