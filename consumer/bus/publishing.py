"""Publishing: terminal events and dead letters until the stream has them, the rest as it goes."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping

import structlog
from nats.errors import Error, NoRespondersError
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError
from pydantic import ValidationError

from consumer.bus.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM, WRONG_LAST_SEQUENCE
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.delivery import place_of
from consumer.bus.topology import TopologyError
from consumer.ports import DeadLetter, Delivery, MessageTooLarge, QueueFull, ResultEvent
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import (
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    Task,
    decode_result,
    encode,
)
from generation_contracts.headers import (
    DEAD_LETTER_ATTEMPTS,
    DEAD_LETTER_CODE,
    DEAD_LETTER_REASON,
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_SUBJECT,
    DEAD_LETTER_TIME,
    DEAD_LETTER_TRUNCATED,
    DEAD_LETTER_WORKER,
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    MESSAGE_ID,
    ORIGINAL_PREFIX,
    REPLY_TO,
    TRACE_PARENT,
    event_headers,
    wire_size,
)

log = structlog.get_logger()

PAUSE_FIRST = 0.1  # seconds
PAUSE_MOST = 2.0  # seconds; a stored result waits at most so long once the bus is back
MAX_REASON = 1_000  # characters
_NOT_IN_HEADER_NAMES = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")


class _AlreadyThere(Exception):  # noqa: N818 - not an error
    """The fence has held: another terminal event stands on the subject."""


class JetStreamEvents:
    """Implements `consumer.ports.Events` on JetStream.

    Args:
        bus: The connection.
        subjects: Where things go.
        ensure: Makes the streams again when they are gone.
    """

    def __init__(
        self, bus: Bus, subjects: Subjects, *, ensure: Callable[[], Awaitable[object]]
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._ensure = ensure

    async def find_result(self, task: Task, request_id: str) -> ResultEvent | None:
        """The stored terminal event of a request, or None; waits for the bus."""
        subject = self._subjects.result(task, request_id)
        pause = PAUSE_FIRST
        while True:
            await self._bus.reachable()
            try:
                async with self._bus.question(API_TIMEOUT):
                    found = await self._bus.jetstream.get_last_msg(
                        self._subjects.results_stream, subject, direct=True
                    )
            except NotFoundError:
                return None
            except NoRespondersError:
                await self._restore()
            except (Error, OSError) as error:
                log.warning("result_not_read", error=type(error).__name__)
            else:
                return _read(found.data or b"")
            pause = await _rest(pause)

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> bool:
        """Store the terminal event behind two fences; waits for the bus.

        `Nats-Msg-Id` drops a second copy within the duplicate window, and the expectation of an
        empty subject drops it for as long as the stream keeps the first.

        Raises:
            MessageTooLarge: It does not fit the server's limit.
        """
        headers = event_headers(event, trace_parent=trace_parent)
        headers[EXPECTED_LAST_SUBJECT_SEQUENCE] = "0"
        if await self._fenced(event, headers):
            return True
        # Stored before: by another worker, or by this one in a try whose answer was lost.
        found = await self.find_result(event.task, event.request_id)
        if found is None:
            # Removed from the stream since, but the duplicate window knows its id.
            del headers[MESSAGE_ID]
            if await self._fenced(event, headers):
                return True
            found = await self.find_result(event.task, event.request_id)
        # All of it: a second copy of a request may be in this worker's hands at the same time.
        return found == event

    async def _fenced(self, event: ResultEvent, headers: Mapping[str, str]) -> bool:
        subject = self._subjects.result(event.task, event.request_id)
        try:
            return not (await self._persist(subject, encode(event), headers)).duplicate
        except _AlreadyThere:
            return False

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        """Tell what happens, when someone can be told; nothing is buffered for later."""
        if not self._bus.connected:
            return
        headers = event_headers(event, trace_parent=trace_parent)
        subject = self._subjects.progress(event.task, event.request_id)
        await self._tell(subject, encode(event), headers, "progress_not_published")

    async def publish_request(
        self, task: Task, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        """Queue the next request of a chain; waits for the bus, but not for a place in the queue.

        It is stored once for each reply subject: a second copy is not run, only answered.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more. It may be the workers of another task that have to
                make room, and they may be waiting for room in this one's.
        """
        headers = {MESSAGE_ID: f"{task}.{request.request_id}.{reply_to or ''}"}
        if reply_to is not None:
            headers[REPLY_TO] = reply_to
        if trace_parent is not None:
            headers[TRACE_PARENT] = trace_parent
        subject = self._subjects.request(task, request.request_id)
        await self._persist(subject, encode(request), headers, final=frozenset({STREAM_FULL}))

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Answer the sender, who may be gone."""
        headers = event_headers(event, trace_parent=trace_parent)
        # A reply subject under a stream would take the message id of the stored event.
        del headers[MESSAGE_ID]
        await self._tell(subject, encode(event), headers, "reply_not_published")

    async def dead_letter(self, task: Task, delivery: Delivery, letter: DeadLetter) -> None:
        """Keep a request's bytes and headers with the reason; waits for the bus."""
        headers = _dead_letter_headers(delivery, letter)
        # Other clients publish header names that nats-py refuses to write.
        originals = {
            f"{ORIGINAL_PREFIX}{_NOT_IN_HEADER_NAMES.sub('_', name)}": text
            for name, text in delivery.headers.items()
        }
        limit = self._bus.client.max_payload
        if wire_size(delivery.body, {**headers, **originals}) <= limit:
            headers |= originals
        body = delivery.body
        if wire_size(body, headers) > limit:
            headers[DEAD_LETTER_TRUNCATED] = str(len(body))
            body = body[: limit - wire_size(b"", headers)]
        try:
            await self._persist(self._subjects.dead_letter(task), body, headers)
        except MessageTooLarge:
            # The stream's own limit is below the server's. The request must not come back for it.
            log.exception("dead_letter_too_large")

    async def _persist(
        self,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        final: frozenset[int] = frozenset(),
    ) -> PubAck:
        # A try whose answer is lost may have been stored: every message has an id, so the next try
        # is dropped as its copy.
        self._check_size(body, headers)
        pause = PAUSE_FIRST
        while True:
            await self._bus.reachable()
            try:
                async with self._bus.question(API_TIMEOUT):
                    # A copy of the headers: js.publish writes into what it is given.
                    return await self._bus.jetstream.publish(
                        subject, body, timeout=API_TIMEOUT, headers=dict(headers)
                    )
            except NoStreamResponseError:
                await self._restore()
            except APIError as error:
                if error.err_code == WRONG_LAST_SEQUENCE:
                    raise _AlreadyThere from None
                if error.err_code == TOO_LARGE_FOR_STREAM:
                    raise MessageTooLarge from None
                if error.err_code in final:
                    raise QueueFull from None
                log.warning("publish_refused", code=error.err_code, reason=error.description)
            except (Error, OSError, *NO_PUB_ACK) as error:
                log.warning("publish_failed", error=type(error).__name__)
                if self._bus.connected:
                    # Where somebody listens to the subject without storing it, a missing stream is
                    # not answered with an error.
                    await self._restore()
            pause = await _rest(pause)

    async def _restore(self) -> None:
        try:
            await self._ensure()
        except (BusUnavailable, TopologyError) as error:
            log.warning("streams_not_restored", reason=str(error))

    async def _tell(
        self, subject: str, body: bytes, headers: Mapping[str, str], unheard: str
    ) -> None:
        try:
            self._check_size(body, headers)
            await self._bus.client.publish(subject, body, headers=dict(headers))
        except MessageTooLarge:
            log.warning(unheard, error="MessageTooLarge")
        except (Error, OSError) as error:
            log.warning(unheard, error=type(error).__name__)

    def _check_size(self, body: bytes, headers: Mapping[str, str]) -> None:
        # nats-py checks the body alone; over the limit the server drops the connection, and the
        # client stays closed for good.
        if wire_size(body, headers) > self._bus.client.max_payload:
            raise MessageTooLarge


def _read(body: bytes) -> ResultEvent | None:
    try:
        return decode_result(body)
    except ValidationError:
        # Of a later version, or not ours. The job goes on, and the fence decides in the end; to
        # fail here would give the request back for ever.
        log.error("result_not_readable")  # noqa: TRY400 - the body may hold what is not for logs
        return None


def _dead_letter_headers(delivery: Delivery, letter: DeadLetter) -> dict[str, str]:
    return {
        MESSAGE_ID: f"{delivery.stream}-{place_of(delivery)}.dead",
        DEAD_LETTER_CODE: letter.code,
        DEAD_LETTER_REASON: _ascii(letter.reason)[:MAX_REASON],
        DEAD_LETTER_REQUEST_ID: letter.request_id,
        DEAD_LETTER_ATTEMPTS: str(delivery.attempt),
        DEAD_LETTER_WORKER: letter.worker,
        DEAD_LETTER_SUBJECT: _ascii(delivery.subject),
        DEAD_LETTER_TIME: delivery.stored_at.isoformat().replace("+00:00", "Z"),
    }


def _ascii(text: str) -> str:
    # nats-py makes spaces of line breaks, so that none can begin another header.
    return text.encode("ascii", "replace").decode()


async def _rest(pause: float) -> float:
    await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter
    return min(pause * 2, PAUSE_MOST)
