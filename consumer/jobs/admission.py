"""Reads a delivery: the request, the reply subject, the trace context. No input or output.

Reading has two passes. The envelope (id, reply subject, trace context) is read leniently from any
bytes, so that an invalid request gets a reply too. The request itself is validated strictly.
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

from consumer.inference.cancel_token import CancelToken
from consumer.jobs.in_flight import Slot, unqueued_slot
from consumer.jobs.states import State, advance
from consumer.ports.bus import Delivery, Message, QueuedRequest, ResultEvent
from consumer.ports.telemetry import Stage
from generation_contracts import (
    FileArtifact,
    ImageArtifact,
    InvalidRequest,
    Request,
    Subjects,
    Task,
    UnsafeReplySubject,
    check_routing_slip,
    decode_request,
)
from generation_contracts.artifacts import Output
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
    """The sender's addresses, as far as they can be read.

    Attributes:
        request_id: The sender's id, or an id derived from the delivery.
        reply_to: Reply subject; None unless this worker may publish to it.
        trace_parent: W3C trace context; None unless it is well formed.
    """

    request_id: str
    reply_to: str | None
    trace_parent: str | None


@dataclass(eq=False)
class Job:
    """One request in progress: its delivery, and the results of its stages so far.

    Attributes:
        delivery: The request.
        leased: The same request, if this process has a lease on it. None: the request was read from
            its stream, and stays there until the finalizer ends it.
        digest: Digest of the request's content; of the raw bytes until the request is decoded.
        slot: Slot of the job among the requests in flight.
        uncounted: Number of deliveries that do not count as attempts.
        cancelled_before: Whether the request was cancelled in an earlier delivery.
        began: Whether the run of the request has begun.
        is_copy: Whether another delivery owns the request id.
        ownership_known: Set when `is_copy` is known.
        ended: Set when the job has ended in this worker.
        existing: The terminal event that was stored before, if there is one.
        stored: The outputs in the store so far, with or without an event that mentions them.
        parameters: The parameters that the outputs were made with.
        sequence: Number of the next event of this attempt.
        queued: Seconds from storage in the stream to the start on the device.
        stages: The stages that have ended, in this order; for traces.
        inference: Seconds of model runs.
        encode: Seconds of encoding.
        upload: Seconds of storing.
        unsigned: Number of images that could not be signed.
    """

    delivery: QueuedRequest
    leased: Delivery | None
    envelope: Envelope
    digest: str
    queued: float
    slot: Slot
    uncounted: int = 0
    cancelled_before: bool = False
    began: bool = False
    is_copy: bool = False
    ownership_known: asyncio.Event = field(default_factory=asyncio.Event)
    cancel_token: CancelToken = field(default_factory=CancelToken)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = State.RECEIVED
    request: Request | None = None
    existing: ResultEvent | None = None
    stored: list[ImageArtifact | FileArtifact] = field(default_factory=list)
    outputs: tuple[Output, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    sequence: int = 0
    stages: list[Stage] = field(default_factory=list)
    inference: float = 0.0
    encode: float = 0.0
    upload: float = 0.0
    unsigned: int = 0

    @property
    def request_id(self) -> str:
        """The sender's id, or the derived id."""
        return self.envelope.request_id

    @property
    def seeded_request(self) -> Request:
        """The decoded request with its own seed, else with a seed derived from the request id.

        After a lost lease two workers may run the same request and write the same keys. With the
        same seed they write the same bytes.
        """
        if self.request is None:
            raise AssertionError("the request has not been decoded")
        if self.request.seed is not None:
            return self.request
        drawn = hashlib.sha256(self.request_id.encode()).digest()[:SEED_BYTES]
        return self.request.model_copy(update={"seed": int.from_bytes(drawn)})

    @property
    def attempts_so_far(self) -> int:
        """Number of deliveries that were attempts, including this delivery."""
        return self.delivery.attempt - self.uncounted

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return max(1, self.attempts_so_far)

    @property
    def cancellation_ids(self) -> frozenset[str]:
        """The ids that cancel the job: the request id and the id of its chain."""
        link = None if self.request is None else self.request.chain
        return frozenset({self.request_id} if link is None else {self.request_id, link.id})

    async def nak(self) -> None:
        """Return the request to its queue after a failed attempt. No effect without a lease."""
        if self.leased is not None:
            await self.leased.nak()

    async def requeue(self) -> None:
        """Return the request to its queue; not an attempt. No effect without a lease."""
        if self.leased is not None:
            await self.leased.requeue()

    def spent(self, name: str, seconds: float, *, ago: float = 0.0) -> None:
        """Record a stage that took some seconds and ended some seconds ago."""
        ended = time.time_ns() - round(ago * NANOSECONDS)
        self.stages.append(Stage(name, ended - round(seconds * NANOSECONDS), ended))

    def advance(self, to: State) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: The state cannot follow the current state.
        """
        self.state = advance(self.state, to)
        self.began = self.began or to is State.RUNNING


@dataclass(frozen=True)
class Admission:
    """Reads the deliveries of one queue.

    Attributes:
        task: The task of the requests.
        subjects: The subjects of the installation.
        reply_prefixes: Prefixes of allowed reply subjects.
        queue: The queue of the requests; empty: the default queue of the task.
    """

    task: Task
    subjects: Subjects
    reply_prefixes: tuple[str, ...]
    queue: str = ""

    @property
    def queue_name(self) -> str:
        """Name of the queue of the requests."""
        return self.queue or str(self.task)

    def open(
        self,
        delivery: QueuedRequest,
        slot: Slot | None = None,
        *,
        leased: Delivery | None = None,
    ) -> Job:
        """Make a job of any request, valid or not. Never raises.

        Args:
            delivery: The request.
            slot: Slot of the job among the requests in flight; None: the job is not run.
            leased: The same request, if this process has a lease on it.
        """
        queued = (datetime.now(UTC) - delivery.stored_at).total_seconds()
        return Job(
            delivery=delivery,
            leased=leased,
            uncounted=delivery.uncounted,
            slot=slot or unqueued_slot(),
            envelope=self._envelope(delivery),
            digest=digest_of_bytes(delivery.body),
            queued=max(0.0, queued),  # the server's clock may be ahead of this one
        )

    def request(self, delivery: Message) -> Request:
        """Decode and validate the request.

        Raises:
            InvalidRequest: Not JSON, against the contract, or its id differs from the subject.
        """
        request = decode_request(self.task, delivery.body)
        check_routing_slip(request)
        in_subject = self.subjects.id_in(delivery.subject, self.queue_name)
        if in_subject is not None and not is_request_id(in_subject):
            raise InvalidRequest(
                "the subject's last token is not a request id: 1-64 of A-Za-z0-9_-"
            )
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
        # The subject has priority. A request with another id in its body is refused, and its failed
        # event must not be stored under the id in the body.
        candidates = (
            self.subjects.id_in(delivery.subject, self.queue_name),
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
    # The sequence alone repeats after the stream is deleted and created again. The new request
    # would then look like a copy of the old request, whose result is stored for days.
    stored_at = int(delivery.stored_at.timestamp())
    return f"{delivery.stream}-{delivery.stream_sequence}-{stored_at:x}"[-64:]


def _fields(body: bytes) -> dict[str, Any]:
    try:
        value = from_json(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
