"""Port of the bus: requests, deliveries, events, and the other workers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    ProgressEvent,
    Request,
    StartedEvent,
    SucceededEvent,
    Task,
)

if TYPE_CHECKING:
    import asyncio


ResultEvent = SucceededEvent | FailedEvent | CancelledEvent


class Message(Protocol):
    """A request as its stream stores it, with the number of its deliveries."""

    @property
    def subject(self) -> str:
        """Subject that the request was published to."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the request; empty if it has none."""

    @property
    def body(self) -> bytes:
        """Body of the request."""

    @property
    def stream(self) -> str:
        """Name of the stream that stores the request."""

    @property
    def stream_sequence(self) -> int:
        """Sequence of the message in its stream; all deliveries of the message have this one."""

    @property
    def stored_at(self) -> datetime:
        """Time at which the stream stored the message, aware; equal for all its deliveries."""

    @property
    def attempt(self) -> int:
        """Number of deliveries of the request, including this one; from 1."""

    @property
    def deliveries(self) -> int:
        """Number of deliveries of this message, including this one; from 1.

        A request that is queued again after a delay is a new message.
        """

    @property
    def uncounted(self) -> int:
        """Number of deliveries of the request's earlier messages that were not attempts."""


class Settleable(Protocol):
    """Removes a request from its stream. A request is settled once."""

    async def ack(self) -> None:
        """Acknowledge the request; return when the server has confirmed it."""

    async def term(self, reason: str) -> None:
        """Terminate the request: it is never delivered again. The advisory has the reason."""


class Markable(Protocol):
    """Attempt marks: facts about a request, stored for the worker that receives it next."""

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of this message were not attempts."""

    async def mark_cancelled(self) -> None:
        """Mark the request as cancelled, for the next worker if this one dies. Never raises."""

    async def was_cancelled(self) -> bool:
        """Return whether the request was cancelled during an earlier delivery."""


class Requeueable(Protocol):
    """Returns a request to its queue for immediate redelivery."""

    async def nak(self) -> None:
        """Return the request after a failed attempt."""

    async def requeue(self) -> None:
        """Return the request; the delivery does not count as an attempt.

        Never raises, because a process that shuts down calls it.
        """


class Renewable(Protocol):
    """The lease on a delivery: while it lasts, no other worker receives the request."""

    async def extend(self) -> None:
        """Renew the lease for another `ack_wait`, without a confirmation. Never raises."""

    def stop_renewing(self) -> None:
        """Stop the renewals, by this process and by its lease guard."""


class Countable(Protocol):
    """Marks whether a delivery counts as an attempt."""

    async def mark_uncounted(self) -> None:
        """Mark that this delivery is not an attempt, until `mark_counted`. Never raises."""

    async def mark_counted(self) -> None:
        """Mark that this delivery is an attempt, unless it is requeued. Never raises."""


class QueuedRequest(Message, Settleable, Markable, Protocol):
    """A request in its stream that this process may settle, with or without a lease on it."""


class Delivery(QueuedRequest, Requeueable, Renewable, Countable, Protocol):
    """One delivery of a request to this worker, with its lease."""


@dataclass(frozen=True)
class DeadLetter:
    """The reason why a request is dead-lettered, for the headers of the dead letter."""

    code: str
    reason: str
    request_id: str
    worker: str


class Events(Protocol):
    """Publishes what the daemon reports.

    Terminal events, requests and dead letters are retried until a stream has stored them.
    """

    async def find_result(self, queue: str, request_id: str) -> ResultEvent | None:
        """Return the stored terminal event of a request, or None."""

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        """Store the terminal event, unless the request has one.

        Returns:
            The event that is stored for the request: this event, or one that was stored before.

        Raises:
            MessageTooLarge: The event does not fit the server's `max_payload`.
            ResultUnreadable: An event of a later version of the contract is stored. Acknowledge the
                delivery without a reply: a worker of that version replies and continues the chain.
        """

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        """Publish a transient event: it is lost when the bus is unavailable. Never raises."""

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Publish a terminal event to the sender's subject, without a guarantee. Never raises."""

    async def publish_request(
        self, queue: str, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        """Queue the next request of a chain; a repetition is harmless.

        Raises:
            MessageTooLarge: The request exceeds the limit of the server or of the stream.
            QueueFull: The stream is full.
        """

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
        """Store a copy of a request that is queued again after a delay.

        The caller acknowledges the delivery afterwards.

        Args:
            queue: Queue of the request.
            delivery: The copy has its body, its headers and its number of deliveries.
            request_id: Id that the copy is queued under; the request's own subject may lack an id.
            attempts: Number of its deliveries that were attempts.
            delay: Seconds.
            owner: Digest of the request's content, which reserves the id; None reserves nothing.

        Raises:
            MessageTooLarge: The copy exceeds the limit of the server or of the stream.
            QueueFull: The stream is full.
        """

    async def dead_letter(self, queue: str, delivery: Message, letter: DeadLetter) -> None:
        """Store the original body and headers of a request that no worker can handle."""


@dataclass(frozen=True)
class StoredRequest:
    """A request in its stream.

    Attributes:
        delivery: The request; settling it deletes it from the stream.
        never_delivered: Whether no worker has received it so far.
    """

    delivery: QueuedRequest
    never_delivered: bool


@dataclass(frozen=True)
class IdLookup:
    """The queues with messages under one request id.

    Attributes:
        requests: Queues whose request stream has a message with the id in its subject.
        results: Queues with a message on the result subject, valid or not.
    """

    requests: frozenset[str]
    results: frozenset[str]


class Queue(Protocol):
    """Finds requests in their streams by the ids in their subjects."""

    async def names(self) -> Collection[str]:
        """Return the names of all queues of the installation."""

    async def queue_for(self, task: Task, model: str | None) -> str | None:
        """Return the name of the queue for the requests of a task that ask for a model.

        Waits for the bus. None if no queue serves the model.

        Raises:
            Unavailable: The client has closed the connection; the process must end.
        """

    async def find(self, request_id: str) -> IdLookup:
        """Return which queues have messages under an id, without loading the messages.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def find_results(self, request_id: str) -> frozenset[str]:
        """Return `IdLookup.results` alone.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def oldest(self, queue: str, request_id: str) -> StoredRequest | None:
        """Load the oldest request with this id, or return None.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def older(self, queue: str, request_id: str, than: Message) -> Message | None:
        """Load the oldest request with this id in its subject, if it is older than `than`.

        Waits for the bus. Loads nothing if the message of `than` is the only one.

        Raises:
            Unavailable: The client has closed the connection; the process must end.
        """

    async def owner(self, queue: str, request_id: str) -> str | None:
        """Return the digest that an id is reserved for since a retry of its request was stored.

        Waits for the bus.

        Raises:
            Unavailable: The client has closed the connection; the process must end.
        """

    async def cancel_retry(self, queue: str, request_id: str) -> None:
        """Mark a request as cancelled for the worker of its next attempt. Never raises."""


class StopAck(Enum):
    """Reply to a stop request from the worker that has the request in progress."""

    STOPPING = "stopping"  # it stops at its next step, even if this worker dies
    ENDING = "ending"  # too late: the worker is publishing the terminal event


class Workers(Protocol):
    """All workers of the installation. No method raises."""

    async def request_stop(self, request_id: str) -> "asyncio.Future[StopAck | None]":
        """Request all workers to stop a request; each worker stores the id.

        Returns:
            After the message was sent: a future of the reply, or of None if no worker replies.
        """

    async def notify_stop(self, request_id: str) -> None:
        """Request all workers to stop a request, without a reply."""

    async def is_in_progress(self, request_id: str) -> bool:
        """Return whether a worker in another process has a job with this id.

        The job continues. No reply within a short time counts as no.
        """

    async def others_idle(self) -> bool:
        """Return whether another worker waits for requests; False if the bus does not answer.

        Call it while this worker has no pull request at the server.
        """


class ResultUnreadable(Exception):  # noqa: N818 - a state of the request
    """The request has a terminal event in a version of the contract that is unknown here."""


class QueueFull(Exception):  # noqa: N818 - a state of the queue
    """The request stream is full."""


class MessageTooLarge(Exception):  # noqa: N818 - a state of the message
    """Body and headers together exceed the server's `max_payload`."""
