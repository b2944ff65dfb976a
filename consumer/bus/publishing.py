"""Publishes terminal events, requests and dead letters with retries, transient events without."""

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
MAX_PAUSE = 2.0  # seconds; the longest delay of a result after the bus is available again
MAX_REASON = 1_000  # characters
RACE_TASKS, RACE_LENGTH = 4, 8  # concurrent tasks and publishes of each: a few milliseconds
_NOT_IN_HEADER_NAMES = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")


class _SubjectOccupied(Exception):  # noqa: N818 - a state of the subject
    """The subject has a message already, and the stream stores one for each subject."""


class JetStreamEvents:
    """Implements `consumer.ports.bus.Events` on JetStream.

    Args:
        bus: The connection.
        subjects: Subjects of the installation.
        ensure: Creates missing streams again.
        observer: Notified of whether the streams store what is published.
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

    async def find_result(self, queue: str, request_id: str) -> ResultEvent | None:
        """Return the stored terminal event of a request, or None; waits for the bus.

        Reads from the leader of the stream. Deletes a message under the subject that is not an
        event of the request. For an event of an unknown contract version, returns None: the job
        continues, and `publish_result` raises.
        """
        found = await self._read(
            self._subjects.results_stream, subject=self._subjects.result(queue, request_id)
        )
        if found is None:
            return None
        try:
            event = event_of(found, queue, request_id)
        except ResultUnreadable:
            log.error("result_not_readable")  # noqa: TRY400 - the body must not be logged
            return None
        if event is None:
            await self._remove(found)
        return event

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        """Store the terminal event of a request; waits for the bus.

        The stream stores one message for each subject and refuses the second, and the publish
        expects an empty subject. After a refusal or a lost reply, the stored message is read from
        the leader. A stored message that is not an event of this request is replaced.

        Returns:
            The event that is stored for the request: this event, or one that was stored before.

        Raises:
            MessageTooLarge: The event exceeds the server's limit.
            ResultUnreadable: An event of an unknown contract version is stored.
        """
        stream = self._subjects.results_stream
        subject = self._subjects.result(event.queue_name, event.request_id)
        headers = event_headers(event, trace_parent=trace_parent)
        headers[EXPECTED_LAST_SUBJECT_SEQUENCE] = "0"
        pause = FIRST_PAUSE
        publish = partial(self._publish_first, stream, subject, encode(event), headers)
        while not await publish():
            log.info("result_subject_occupied")
            found = await self._read(stream, subject=subject)
            if found is None:
                pause = await _back_off(pause)  # a cluster may be storing another event
                continue
            stored = event_of(found, event.queue_name, event.request_id)
            if stored is not None:
                return stored
            # Publish during the deletion: a sender may occupy the subject repeatedly, and the first
            # message after the deletion is stored.
            stored_now, _ = await asyncio.gather(_race(publish), self._remove(found))
            if stored_now:
                break
        return event

    async def _publish_first(
        self, stream: str, subject: str, body: bytes, headers: Mapping[str, str]
    ) -> bool:
        """Store a message on an empty subject; return False if the subject has a message."""
        try:
            # No message id: a sender could store another message under it, and the server would
            # then report this one as a duplicate.
            return not (await self._persist(stream, subject, body, headers)).duplicate
        except _SubjectOccupied:
            return False

    async def _remove(self, invalid: StoredMessage) -> bool:
        log.warning(
            "invalid_message_in_results", subject=invalid.subject, sequence=invalid.sequence
        )
        try:
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.delete_msg(
                    self._subjects.results_stream, invalid.sequence
                )
        except (Error, OSError) as error:
            # If the message was deleted already, the next read does not find it.
            log.warning("invalid_message_not_removed", error=type(error).__name__)
            return False
        return True

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        """Publish a transient event; drop it without a connection, so that nothing is buffered."""
        if not self._bus.connected:
            return
        headers = event_headers(event, trace_parent=trace_parent)
        subject = self._subjects.progress(event.queue_name, event.request_id)
        await self._publish_once(subject, encode(event), headers, "progress_not_published")

    async def publish_request(
        self, queue: str, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        """Queue the next request of a chain; waits for the bus, but not for a full stream.

        The message id is random, so that no sender can use it first. It protects the attempts of
        this publish. After a crash the request may be queued twice; a worker runs only one copy and
        replies to both.

        Raises:
            MessageTooLarge: The request exceeds the limit of the server or of the stream.
            QueueFull: The stream is full. Waiting could be a deadlock: the workers of another queue
                must make room, and they may wait for room in the stream of this queue.
        """
        headers = {MESSAGE_ID: _random_id()}
        if reply_to is not None:
            headers[REPLY_TO] = reply_to
        if trace_parent is not None:
            headers[TRACE_PARENT] = trace_parent
        await self._persist(
            self._subjects.requests_stream(queue),
            self._subjects.request(queue, request.request_id),
            encode(request),
            headers,
            final=frozenset({STREAM_FULL}),
        )

    async def publish_again(self, queue: str, retry: Message, *, request_id: str) -> None:
        """Publish a request that was stored by `retry_later` to its subject; waits for the bus.

        The caller acknowledges the retry afterwards. After a crash in between there are two copies;
        a worker runs only one and replies to both.

        Raises:
            MessageTooLarge: The request exceeds the limit of the server or of the stream.
            QueueFull: The stream is full.
        """
        await self._persist(
            self._subjects.requests_stream(queue),
            self._subjects.request(queue, request_id),
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
        queue: str,
        delivery: Message,
        *,
        request_id: str,
        attempts: int,
        delay: float,
        owner: str | None,
    ) -> None:
        """Store a request until its next attempt is due; waits for the bus.

        When it is due, a worker of the queue publishes it to its request subject. The caller
        acknowledges the delivery afterwards. After a crash in between there are two copies; a
        worker runs only one and replies to both.

        Args:
            queue: Queue of the request.
            delivery: The delivery with its body and headers.
            request_id: Id of the request.
            attempts: Number of its attempts, including this one.
            delay: Seconds, from the time at which the stream stores the request.
            owner: Digest that the id is reserved for.

        Raises:
            MessageTooLarge: The request exceeds the limit of the server or of the stream.
            QueueFull: The stream is full.
        """
        headers = _headers_again(delivery, attempts=attempts, deliveries=delivery.attempt)
        headers[RETRY_DELAY] = str(round(delay * 1000))
        await self._persist(
            self._subjects.retries_stream,
            self._subjects.retry(queue, request_id),
            delivery.body,
            headers,
            final=frozenset({STREAM_FULL}),
        )
        if owner is not None:
            # Before the delivery is acknowledged: until then its message protects the id.
            await AttemptMarks(self._bus, self._subjects, queue).mark_owner(request_id, owner)

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Publish the event to the sender's reply subject, once."""
        headers = event_headers(event, trace_parent=trace_parent)
        await self._publish_once(subject, encode(event), headers, "reply_not_published")

    async def dead_letter(self, queue: str, delivery: Message, letter: DeadLetter) -> None:
        """Store a request's body and headers with the reason; waits for the bus.

        The message id is derived from the request's message, so that several deliveries of the
        message produce one dead letter. If the stream reports a duplicate, the stored message is
        compared. If it differs, the dead letter is stored under another message id.
        """
        stream, subject = self._subjects.dead_letters_stream, self._subjects.dead_letter(queue)
        message_id = f"{delivery.stream}-{message_key(delivery)}.dead"
        body, headers = self._letter(delivery, letter, message_id)
        try:
            ack = await self._persist(stream, subject, body, headers)
            while ack.duplicate and not await self._is_stored(ack, subject, body):
                log.warning("dead_letter_id_occupied")
                body, headers = self._letter(delivery, letter, f"{message_id}-{_random_id()}")
                ack = await self._persist(stream, subject, body, headers)
        except MessageTooLarge:
            # The stream's limit is below the server's. A redelivery would not help.
            log.exception("dead_letter_too_large")

    def _letter(
        self, delivery: Message, letter: DeadLetter, message_id: str
    ) -> tuple[bytes, dict[str, str]]:
        headers = _dead_letter_headers(delivery, letter, message_id)
        # Other clients can publish header names that nats-py refuses.
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
            pause = await _back_off(pause)

    async def _persist(
        self,
        stream: str,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        final: frozenset[int] = frozenset(),
    ) -> PubAck:
        # If a reply is lost, the message may have been stored. The message id, or the expectation
        # of an empty subject, makes the next attempt harmless.
        self._check_size(body, headers)
        pause = FIRST_PAUSE
        while True:
            await self._bus.wait_connected()
            try:
                async with self._bus.api_call(API_TIMEOUT):
                    # Copy the headers, because js.publish changes its argument.
                    ack = await self._bus.jetstream.publish(
                        subject, body, timeout=API_TIMEOUT, headers=dict(headers)
                    )
                if ack.stream == stream:
                    self._mark_writable(stream)
                    return ack
                log.warning("publish_failed", error="WrongStream")
                await self._restore()
            except NoStreamResponseError:
                await self._restore()
            except APIError as error:
                if error.err_code in WRONG_LAST_SEQUENCE:
                    self._mark_writable(stream)
                    raise _SubjectOccupied from None
                if error.err_code == TOO_LARGE_FOR_STREAM:
                    self._mark_writable(stream)
                    raise MessageTooLarge from None
                if error.err_code in final:
                    self._mark_writable(stream)
                    raise QueueFull from None
                log.warning("publish_refused", code=error.err_code, reason=error.description)
                self._mark_refusing(stream, error.description or "refused")
            except (Error, OSError, *NO_PUB_ACK) as error:
                log.warning("publish_failed", error=type(error).__name__)
                if self._bus.connected:
                    self._mark_refusing(stream, "no acknowledgement")
                    # If another client subscribes to the subject, the server does not report a
                    # missing stream.
                    await self._restore()
            pause = await _back_off(pause)

    def _mark_refusing(self, stream: str, reason: str) -> None:
        self._refusing[stream] = reason
        self._report_writable()

    def _mark_writable(self, stream: str) -> None:
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

    async def _publish_once(
        self, subject: str, body: bytes, headers: Mapping[str, str], log_event: str
    ) -> None:
        """Publish without a confirmation and without a retry; log a failure as `log_event`."""
        try:
            self._check_size(body, headers)
            await self._bus.client.publish(subject, body, headers=dict(headers))
        except MessageTooLarge:
            log.warning(log_event, error="MessageTooLarge")
        except (Error, OSError) as error:
            log.warning(log_event, error=type(error).__name__)

    def _check_size(self, body: bytes, headers: Mapping[str, str]) -> None:
        # nats-py checks the size of the body alone. Above the limit, the server closes the
        # connection and the client does not reconnect.
        if wire_size(body, headers) > self._bus.client.max_payload:
            raise MessageTooLarge


async def _race(publish: Callable[[], Awaitable[bool]]) -> bool:
    """Publish repeatedly in several tasks for a moment; return whether one message was stored."""
    stored = asyncio.Event()

    async def run() -> None:
        for _ in range(RACE_LENGTH):
            if stored.is_set():
                return
            if await publish():
                stored.set()

    await asyncio.gather(*(run() for _ in range(RACE_TASKS)))
    return stored.is_set()


def _random_id() -> str:
    return secrets.token_hex(16)


def _headers_again(delivery: Message, *, attempts: int, deliveries: int) -> dict[str, str]:
    """Return the headers for a request that is published again, without headers that control NATS.

    nats-py strips white space from header names. The server ignores a control header with a space
    before its colon, but it would obey the stripped copy. Such headers are left out as well.
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
    # nats-py replaces line breaks by spaces, so the text cannot begin another header.
    return text.encode("ascii", "replace").decode()


async def _back_off(pause: float) -> float:
    """Sleep for `pause` seconds with jitter; return the next pause."""
    await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter
    return min(pause * 2, MAX_PAUSE)
