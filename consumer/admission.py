"""What a delivery asks for, and who is to be told: pure, from bytes and headers.

Reading goes in two passes. The envelope (id, reply subject, trace) is read leniently from whatever
came, so that even an invalid request gets its answer; the request itself is read strictly.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json

from consumer.job import State, advance
from consumer.ports.bus import Delivery, Message, QueuedRequest, ResultEvent
from consumer.ports.telemetry import Stage
from consumer.run import Interrupt
from consumer.turns import Place, Turns
from generation_contracts import (
    ImageArtifact,
    InvalidRequest,
    Request,
    Subjects,
    Task,
    TextOutput,
    UnsafeReplySubject,
    check_slip,
    decode_request,
)
from generation_contracts.events import ParameterValue
from generation_contracts.headers import MESSAGE_ID, REPLY_TO, TRACE_PARENT
from generation_contracts.requests import digest_of_bytes
from generation_contracts.subjects import is_request_id

# W3C trace context, level 1.
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")

NANOSECONDS = 1_000_000_000  # in a second
SEED_BYTES = 4  # the contract's seeds are below 2**32


@dataclass(frozen=True)
class Envelope:
    """Who asks, read as far as it can be.

    Attributes:
        request_id: Always there: the sender's, or one derived from the delivery.
        reply_to: Only where it is a subject that this worker may publish to.
        trace_parent: Only where it is well formed.
    """

    request_id: str
    reply_to: str | None
    trace_parent: str | None


@dataclass(eq=False)
class Job:
    """One request being handled: its delivery, and what has come of it so far.

    Attributes:
        leased: The delivery, where this process has a lease on it. None: the request was read from
            its stream, and stays there unless it is ended.
        digest: What the request asks for; of the raw bytes until it is decoded.
        place: Among the jobs in hand.
        uncounted: How many of the deliveries were no attempts.
        was_cancelled: Whether it was cancelled while an earlier worker had it.
        began: Whether the model has been started for it.
        is_copy: Whether its request id belongs to another delivery, which came before.
        decided: Set when `is_copy` is known.
        over: Set when it has come to its end in this worker.
        existing: The terminal event that was stored before, if there is one.
        stored: The outputs that are in the store so far, whether an event tells of them or not.
        parameters: What the outputs were made with.
        sequence: Number of the next event of this attempt.
        queued: Seconds from stored to the device.
        stages: Where the time went, in the order in which they ended; for traces.
        inference: Seconds of the model's runs.
        encode: Seconds of encoding.
        upload: Seconds of storing.
    """

    delivery: QueuedRequest
    leased: Delivery | None
    envelope: Envelope
    digest: str
    queued: float
    place: Place
    uncounted: int = 0
    was_cancelled: bool = False
    began: bool = False
    is_copy: bool = False
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    interrupt: Interrupt = field(default_factory=Interrupt)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = State.RECEIVED
    request: Request | None = None
    existing: ResultEvent | None = None
    stored: list[ImageArtifact] = field(default_factory=list)
    outputs: tuple[ImageArtifact, ...] | tuple[TextOutput, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    sequence: int = 0
    stages: list[Stage] = field(default_factory=list)
    inference: float = 0.0
    encode: float = 0.0
    upload: float = 0.0

    @property
    def request_id(self) -> str:
        """The sender's id, or the derived one."""
        return self.envelope.request_id

    @property
    def seeded_request(self) -> Request:
        """The decoded request with a seed: its own, else one that its id decides.

        A request may be run twice, by two workers at the same time when a lease was lost, and both
        write the same keys: with the same seed they write the same bytes.
        """
        if self.request is None:
            raise AssertionError("nothing has been decoded")
        if self.request.seed is not None:
            return self.request
        drawn = hashlib.sha256(self.request_id.encode()).digest()[:SEED_BYTES]
        return self.request.model_copy(update={"seed": int.from_bytes(drawn)})

    @property
    def attempts_so_far(self) -> int:
        """How many deliveries of the request were attempts, this one included."""
        return self.delivery.attempt - self.uncounted

    @property
    def attempt(self) -> int:
        """How often the request has been attempted, this time included; from 1."""
        return max(1, self.attempts_so_far)

    @property
    def may_be_cancelled_as(self) -> frozenset[str]:
        """The ids by which it can be cancelled: its own, and that of its chain."""
        link = None if self.request is None else self.request.chain
        return frozenset({self.request_id} if link is None else {self.request_id, link.id})

    async def nak(self) -> None:
        """Return the request to its queue after a failed attempt. Without a lease it is there."""
        if self.leased is not None:
            await self.leased.nak()

    async def requeue(self) -> None:
        """Return the request to its queue without an attempt. Without a lease it is there."""
        if self.leased is not None:
            await self.leased.requeue()

    def spent(self, name: str, seconds: float, *, ago: float = 0.0) -> None:
        """Note that a stage has ended so many seconds ago, after so many seconds."""
        ended = time.time_ns() - round(ago * NANOSECONDS)
        self.stages.append(Stage(name, ended - round(seconds * NANOSECONDS), ended))

    def advance(self, to: State) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: It cannot follow.
        """
        self.state = advance(self.state, to)
        self.began = self.began or to is State.RUNNING


@dataclass(frozen=True)
class Admission:
    """The rules by which deliveries are read: one worker's task, subjects and reply prefixes."""

    task: Task
    subjects: Subjects
    reply_prefixes: tuple[str, ...]

    def open(
        self,
        delivery: QueuedRequest,
        place: Place | None = None,
        *,
        leased: Delivery | None = None,
    ) -> Job:
        """Begin a job with what can be read of any request. Never raises.

        Args:
            delivery: The request.
            place: Among the jobs in flight; None: it is none of them.
            leased: The same request, where this process has a lease on it.
        """
        queued = (datetime.now(UTC) - delivery.stored_at).total_seconds()
        return Job(
            delivery=delivery,
            leased=leased,
            uncounted=delivery.uncounted,
            place=place or Turns().join(),
            envelope=self._envelope(delivery),
            digest=digest_of_bytes(delivery.body),
            queued=max(0.0, queued),  # the server's clock may be ahead of this one
        )

    def request(self, delivery: Message) -> Request:
        """What is asked for.

        Raises:
            InvalidRequest: Not JSON, not the contract, or contradicting its subject.
        """
        request = decode_request(self.task, delivery.body)
        check_slip(request)
        in_subject = self.subjects.id_in(delivery.subject, self.task)
        if in_subject is not None and not is_request_id(in_subject):
            raise InvalidRequest("the subject's last token is no request id: 1-64 of A-Za-z0-9_-")
        if in_subject is not None and request.request_id not in {None, in_subject}:
            raise InvalidRequest("request_id: differs from the last token of the subject")
        for reply_to in (request.reply_to, delivery.headers.get(REPLY_TO)):
            if reply_to is not None:
                self._check_reply(reply_to)
        return request

    def _envelope(self, delivery: Message) -> Envelope:
        fields = _fields(delivery.body)
        trace_parent = delivery.headers.get(TRACE_PARENT, "")
        return Envelope(
            request_id=self._request_id(delivery, fields),
            reply_to=self._reply_to(delivery, fields),
            trace_parent=trace_parent if _TRACE_PARENT.match(trace_parent) else None,
        )

    def _check_reply(self, reply_to: str) -> None:
        try:
            self.subjects.check_reply(reply_to, self.reply_prefixes)
        except UnsafeReplySubject as error:
            raise InvalidRequest(
                str(error), ({"field": "reply_to", "problem": str(error)},)
            ) from None

    def _request_id(self, delivery: Message, fields: Mapping[str, Any]) -> str:
        # The subject first: the two differ only in a request that is refused for it, and such a
        # request must not end the id that its body names.
        candidates = (
            self.subjects.id_in(delivery.subject, self.task),
            fields.get("request_id"),
            delivery.headers.get(MESSAGE_ID),
        )
        for candidate in candidates:
            if isinstance(candidate, str) and is_request_id(candidate):
                return candidate
        return _derived_id(delivery)

    def _reply_to(self, delivery: Message, fields: Mapping[str, Any]) -> str | None:
        for candidate in (fields.get("reply_to"), delivery.headers.get(REPLY_TO)):
            if isinstance(candidate, str):
                try:
                    self.subjects.check_reply(candidate, self.reply_prefixes)
                except UnsafeReplySubject:
                    continue
                return candidate
        return None


def _derived_id(delivery: Message) -> str:
    # The sequence alone would repeat when the stream is deleted and made again, and the new request
    # would be taken for a copy of the old one, whose result is kept for days.
    stored_at = int(delivery.stored_at.timestamp())
    return f"{delivery.stream}-{delivery.stream_sequence}-{stored_at:x}"[-64:]


def _fields(body: bytes) -> dict[str, Any]:
    try:
        value = from_json(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
