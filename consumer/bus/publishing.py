"""Publishing: terminal events and dead letters until the stream has them, the rest as it goes."""

import asyncio
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog
from nats.errors import Error
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM, WRONG_LAST_SEQUENCE
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.delivery import message_key
from consumer.bus.reading import StoredMessage, read_message
from consumer.bus.results import event_of
from consumer.bus.topology import TopologyError
from consumer.ports.bus import (
    DeadLetter,
    Message,
    MessageTooLarge,
    QueueFull,
    ResultEvent,
    ResultUnreadable,
)
from consumer.ports.telemetry import Observer
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import (
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    Task,
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
    EARLIER_ATTEMPTS,
    EARLIER_DELIVERIES,
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    MESSAGE_ID,
    ORIGINAL_PREFIX,
    REPLY_TO,
    RETRY_DELAY,
    TRACE_PARENT,
    earlier_attempts,
    earlier_deliveries,
    event_headers,
    wire_size,
)

log = structlog.get_logger()

FIRST_PAUSE = 0.1  # seconds
MAX_PAUSE = 2.0  # seconds; a stored result waits at most so long once the bus is back
MAX_REASON = 1_000  # characters
RACERS, RACE_LENGTH = 4, 8  # publishes at a time and one after another: a few milliseconds
_NOT_IN_HEADER_NAMES = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")


class _Occupied(Exception):  # noqa: N818 - a state of the subject
    """The subject has a message already, and the stream keeps one for each subject."""


class JetStreamEvents:
    """Implements `consumer.ports.bus.Events` on JetStream.

    Args:
        bus: The connection.
        subjects: Where things go.
        ensure: Makes the streams again when they are gone.
        observer: Called with whether the streams take what is published.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        ensure: Callable[[], Awaitable[object]],
        observer: Observer | None = None,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._ensure = ensure
        self._observer = observer
        self._refusing: dict[str, str] = {}  # reasons, by stream

    async def find_result(self, task: Task, request_id: str) -> ResultEvent | None:
        """Return the stored terminal event of a request, or None; waits for the bus.

        The leader of the stream is asked. A message under the subject that is not an event of the
        request is deleted. An event of a version that this process cannot read stays, and None is
        returned: the job goes on, and `publish_result` ends it.
        """
        found = await self._read(
            self._subjects.results_stream, subject=self._subjects.result(task, request_id)
        )
        if found is None:
            return None
        try:
            event = event_of(found, task, request_id)
        except ResultUnreadable:
            log.error("result_not_readable")  # noqa: TRY400 - the body may hold what is not for logs
            return None
        if event is None:
            await self._remove(found)
        return event

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        """Store the terminal event of a request; waits for the bus.

        The stream keeps one message for each subject and refuses the second, and the event expects
        an empty subject. After a refusal or a lost answer the leader says what is stored. What is
        not an event of this request is deleted, and the event is stored in its place.

        Returns:
            The event that is stored for the request: this one, or one that was stored before.

        Raises:
            MessageTooLarge: The event does not fit the server's limit.
            ResultUnreadable: An event of a version that this process cannot read is stored.
        """
        stream = self._subjects.results_stream
        subject = self._subjects.result(event.task, event.request_id)
        headers = event_headers(event, trace_parent=trace_parent)
        headers[EXPECTED_LAST_SUBJECT_SEQUENCE] = "0"
        pause = FIRST_PAUSE
        publish = partial(self._publish_first, stream, subject, encode(event), headers)
        while not await publish():
            log.info("result_subject_occupied")
            found = await self._read(stream, subject=subject)
            if found is None:
                pause = await _rest(pause)  # a cluster may be about to store another event
                continue
            stored = event_of(found, event.task, event.request_id)
            if stored is not None:
                return stored
            # At the same time: a sender may be filling the subject again and again. The first
            # message after the deletion has the subject.
            took, _ = await asyncio.gather(_race(publish), self._remove(found))
            if took:
                break
        return event

    async def _publish_first(
        self, stream: str, subject: str, body: bytes, headers: Mapping[str, str]
    ) -> bool:
        """Store a message on an empty subject; False: the subject has a message."""
        try:
            # Without a message id nothing is a duplicate: only a stored message is trusted.
            return not (await self._persist(stream, subject, body, headers)).duplicate
        except _Occupied:
            return False

    async def _remove(self, junk: StoredMessage) -> bool:
        log.warning("invalid_message_in_results", subject=junk.subject, sequence=junk.sequence)
        try:
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.delete_msg(self._subjects.results_stream, junk.sequence)
        except (Error, OSError) as error:
            # Where it is gone already, the next look says so.
            log.warning("invalid_message_not_removed", error=type(error).__name__)
            return False
        return True

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

        The message id is random, so that no sender can occupy it: it protects the attempts of this
        one publish. A copy that is queued after a crash is not run, only answered.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more. It may be the workers of another task that have to
                make room, and they may be waiting for room in this one's.
        """
        headers = {MESSAGE_ID: _random_id()}
        if reply_to is not None:
            headers[REPLY_TO] = reply_to
        if trace_parent is not None:
            headers[TRACE_PARENT] = trace_parent
        await self._persist(
            self._subjects.requests_stream(task),
            self._subjects.request(task, request.request_id),
            encode(request),
            headers,
            final=frozenset({STREAM_FULL}),
        )

    async def publish_again(self, task: Task, retry: Message, *, request_id: str) -> None:
        """Publish a request that was stored by `retry_later` to its subject; waits for the bus.

        Acknowledge the retry afterwards: a copy that is left after a crash is not run, only
        answered.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """
        await self._persist(
            self._subjects.requests_stream(task),
            self._subjects.request(task, request_id),
            retry.body,
            _headers_again(
                retry,
                attempts=earlier_attempts(retry.headers),
                deliveries=earlier_deliveries(retry.headers),
            ),
            final=frozenset({STREAM_FULL}),
        )

    async def retry_later(
        self,
        task: Task,
        delivery: Message,
        *,
        request_id: str,
        attempts: int,
        delay: float,
        owner: str | None,
    ) -> None:
        """Store a request until its next attempt is due; waits for the bus.

        Any worker of the task publishes it to its request subject then. Acknowledge the delivery
        afterwards: a copy that is left after a crash is not run, only answered.

        Args:
            task: Whose request it is.
            delivery: Its bytes and headers.
            request_id: Its id.
            attempts: How many it has had, this one included.
            delay: Seconds from when the stream has stored it.
            owner: Digest that the id is marked with.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """
        headers = _headers_again(delivery, attempts=attempts, deliveries=delivery.attempt)
        headers[RETRY_DELAY] = str(round(delay * 1000))
        await self._persist(
            self._subjects.retries_stream,
            self._subjects.retry(task, request_id),
            delivery.body,
            headers,
            final=frozenset({STREAM_FULL}),
        )
        if owner is not None:
            # Before the delivery is acknowledged: until then its message protects the id.
            await AttemptMarks(self._bus, self._subjects, task).mark_owner(request_id, owner)

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Answer the sender, who may be gone."""
        headers = event_headers(event, trace_parent=trace_parent)
        await self._tell(subject, encode(event), headers, "reply_not_published")

    async def dead_letter(self, task: Task, delivery: Message, letter: DeadLetter) -> None:
        """Keep a request's bytes and headers with the reason; waits for the bus.

        Its message id is that of the request's message, so that all deliveries together make one
        dead letter. Where the stream calls it a duplicate, what it has stored is compared; if that
        is something else, the dead letter is stored under another id.
        """
        stream, subject = self._subjects.dead_letters_stream, self._subjects.dead_letter(task)
        message_id = f"{delivery.stream}-{message_key(delivery)}.dead"
        body, headers = self._letter(delivery, letter, message_id)
        try:
            ack = await self._persist(stream, subject, body, headers)
            while ack.duplicate and not await self._is_stored(ack, subject, body):
                log.warning("dead_letter_id_occupied")
                body, headers = self._letter(delivery, letter, f"{message_id}-{_random_id()}")
                ack = await self._persist(stream, subject, body, headers)
        except MessageTooLarge:
            # The stream's own limit is below the server's. The request must not come back for it.
            log.exception("dead_letter_too_large")

    def _letter(
        self, delivery: Message, letter: DeadLetter, message_id: str
    ) -> tuple[bytes, dict[str, str]]:
        headers = _dead_letter_headers(delivery, letter, message_id)
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
        return body, headers

    async def _is_stored(self, ack: PubAck, subject: str, body: bytes) -> bool:
        found = await self._read(ack.stream, sequence=ack.seq)
        return found is not None and (found.subject, found.body) == (subject, body)

    async def _read(
        self, stream: str, *, subject: str | None = None, sequence: int | None = None
    ) -> StoredMessage | None:
        """Read a message from the leader of its stream; waits for the bus."""
        pause = FIRST_PAUSE
        while True:
            await self._bus.wait_connected()
            try:
                return await read_message(
                    self._bus, stream, subject=subject, sequence=sequence, timeout=API_TIMEOUT
                )
            except NotFoundError:
                await self._restore()
            except (Error, OSError) as error:
                log.warning("message_not_read", stream=stream, error=type(error).__name__)
            pause = await _rest(pause)

    async def _persist(
        self,
        stream: str,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        final: frozenset[int] = frozenset(),
    ) -> PubAck:
        # An attempt whose answer is lost may have been stored. The message's id, or the subject
        # that is expected to be empty, makes the next attempt harmless.
        self._check_size(body, headers)
        pause = FIRST_PAUSE
        while True:
            await self._bus.wait_connected()
            try:
                async with self._bus.api_call(API_TIMEOUT):
                    # A copy of the headers: js.publish writes into what it is given.
                    ack = await self._bus.jetstream.publish(
                        subject, body, timeout=API_TIMEOUT, headers=dict(headers)
                    )
                if ack.stream == stream:
                    self._takes(stream)
                    return ack
                log.warning("publish_failed", error="WrongStream")
                await self._restore()
            except NoStreamResponseError:
                await self._restore()
            except APIError as error:
                if error.err_code in WRONG_LAST_SEQUENCE:
                    self._takes(stream)
                    raise _Occupied from None
                if error.err_code == TOO_LARGE_FOR_STREAM:
                    self._takes(stream)
                    raise MessageTooLarge from None
                if error.err_code in final:
                    self._takes(stream)
                    raise QueueFull from None
                log.warning("publish_refused", code=error.err_code, reason=error.description)
                self._refuses(stream, error.description or "refused")
            except (Error, OSError, *NO_PUB_ACK) as error:
                log.warning("publish_failed", error=type(error).__name__)
                if self._bus.connected:
                    self._refuses(stream, "no acknowledgement")
                    # Where somebody listens to the subject without storing it, a missing stream is
                    # not answered with an error.
                    await self._restore()
            pause = await _rest(pause)

    def _refuses(self, stream: str, reason: str) -> None:
        self._refusing[stream] = reason
        self._report_writable()

    def _takes(self, stream: str) -> None:
        if self._refusing.pop(stream, None) is not None:
            self._report_writable()

    def _report_writable(self) -> None:
        if self._observer is not None:
            reasons = "; ".join(f"{stream}: {why}" for stream, why in self._refusing.items())
            self._observer.bus_writable(not reasons, reasons)

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


async def _race(publish: Callable[[], Awaitable[bool]]) -> bool:
    """Publish again and again for a moment, several times at once; whether one was taken."""
    taken = asyncio.Event()

    async def run() -> None:
        for _ in range(RACE_LENGTH):
            if taken.is_set():
                return
            if await publish():
                taken.set()

    await asyncio.gather(*(run() for _ in range(RACERS)))
    return taken.is_set()


def _random_id() -> str:
    return secrets.token_hex(16)


def _headers_again(delivery: Message, *, attempts: int, deliveries: int) -> dict[str, str]:
    """The headers of a request that is published again: without those that NATS acts upon.

    nats-py strips white space from names. So a header that the server did not obey, because of a
    space before its colon, would be obeyed now: it is left out as well.
    """
    kept = {
        name: text
        for name, text in delivery.headers.items()
        if not name.strip().lower().startswith("nats-") and not _NOT_IN_HEADER_NAMES.search(name)
    }
    kept.pop(RETRY_DELAY, None)
    counts = {EARLIER_ATTEMPTS: str(attempts), EARLIER_DELIVERIES: str(deliveries)}
    return {**kept, **counts, MESSAGE_ID: _random_id()}


def _dead_letter_headers(delivery: Message, letter: DeadLetter, message_id: str) -> dict[str, str]:
    return {
        MESSAGE_ID: message_id,
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
    return min(pause * 2, MAX_PAUSE)
