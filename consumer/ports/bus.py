"""Port of the bus: requests and their deliveries, events, and the other workers."""

from collections.abc import Mapping
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
    """A request as a stream stores it, and how often it has been delivered."""

    @property
    def subject(self) -> str:
        """Where the request was published."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, empty where it has none."""

    @property
    def body(self) -> bytes:
        """The request's bytes."""

    @property
    def stream(self) -> str:
        """Name of the stream that stores the request."""

    @property
    def stream_sequence(self) -> int:
        """The request's sequence in its stream; the same for every delivery."""

    @property
    def stored_at(self) -> datetime:
        """When the stream stored the request, aware; the same for every delivery."""

    @property
    def attempt(self) -> int:
        """How often the request has been delivered, this time included; from 1."""

    @property
    def deliveries(self) -> int:
        """How often this very message has been delivered, this time included; from 1.

        A request that is queued again after a delay is another message.
        """

    @property
    def uncounted(self) -> int:
        """How many deliveries, before it was queued again after a delay, were no attempts."""


class Endable(Protocol):
    """Settles a request as ended. A request is settled once."""

    async def ack(self) -> None:
        """Settle as done; returns when the server has confirmed it."""

    async def term(self, reason: str) -> None:
        """Settle as never to be delivered again, with a reason for the advisory."""


class Marked(Protocol):
    """What workers have marked on a request for the worker that receives it next."""

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of this message were no attempts."""

    async def mark_cancelled(self) -> None:
        """Mark the request as cancelled, for the next worker if this one dies. Never raises."""

    async def was_cancelled(self) -> bool:
        """Return whether the request was cancelled while an earlier worker had it."""


class Requeueable(Protocol):
    """Returns a request to its queue, to be delivered again at once."""

    async def nak(self) -> None:
        """Return the request after a failed attempt."""

    async def requeue(self) -> None:
        """Return the request without an attempt: the delivery is not counted.

        Never raises: a process that is ending calls it.
        """


class Renewable(Protocol):
    """The lease on a delivery: while it lasts, no other worker receives the request."""

    async def extend(self) -> None:
        """Renew the lease for another `ack_wait`. Fire and forget: it never raises."""

    def stop_renewing(self) -> None:
        """Renew the lease no more, nor let the lease guard do it for this process."""


class Countable(Protocol):
    """Decides whether a delivery counts as an attempt."""

    async def mark_uncounted(self) -> None:
        """Mark this delivery as no attempt, unless `mark_counted` follows. Never raises."""

    async def mark_counted(self) -> None:
        """Mark this delivery as an attempt after all, unless it is requeued. Never raises."""


class QueuedRequest(Message, Endable, Marked, Protocol):
    """A request in its stream that this process may end, whether or not it has a lease on it."""


class Delivery(QueuedRequest, Requeueable, Renewable, Countable, Protocol):
    """One delivery of a request to this worker, with the lease on it."""


@dataclass(frozen=True)
class DeadLetter:
    """Why a request is dead-lettered, for the headers of its copy."""

    code: str
    reason: str
    request_id: str
    worker: str


class Events(Protocol):
    """The daemon's way of publishing. What must not be lost is retried until the bus has it."""

    async def find_result(self, task: Task, request_id: str) -> ResultEvent | None:
        """The stored terminal event of a request, or None."""

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        """Store the terminal event, unless the request has one.

        Returns:
            The event that is stored for the request: this one, or the one that was there before.

        Raises:
            MessageTooLarge: The event does not fit the server's `max_payload`.
            ResultUnreadable: An event of a later version of the contract is stored. Acknowledge the
                delivery without a reply: that version's worker answers and goes on with the chain.
        """

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        """Tell what happens: passing news, lost when the bus is away; it never raises."""

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Answer on the sender's subject: a courtesy, the stored event is the truth."""

    async def publish_request(
        self, task: Task, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        """Queue the next request of a chain; a second time is harmless.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """

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
        """Store a copy of a request that is queued again after a delay; then acknowledge it.

        Args:
            task: Of the request.
            delivery: Its bytes and headers are kept, and how often it has been delivered.
            request_id: The copy is queued under it, also where the request's subject has no id.
            attempts: How many of its deliveries were attempts.
            delay: Seconds.
            owner: Digest of what the request asks for, where the id belongs to it from now on.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """

    async def dead_letter(self, task: Task, delivery: Message, letter: DeadLetter) -> None:
        """Keep the original bytes and headers of a request that no worker can handle."""


@dataclass(frozen=True)
class StoredRequest:
    """A request as it is stored in its stream.

    Attributes:
        delivery: Settling it deletes it from the stream.
        untouched: Whether it has been delivered to no worker so far.
    """

    delivery: QueuedRequest
    untouched: bool


@dataclass(frozen=True)
class IdLookup:
    """What is stored under a request id, by task.

    Attributes:
        requests: Tasks whose request stream has a message with the id in its subject.
        results: Tasks with a message on the result subject, whatever that message is.
    """

    requests: frozenset[Task]
    results: frozenset[Task]


class Queue(Protocol):
    """The requests in their streams, found by the ids in their subjects."""

    async def find(self, request_id: str) -> IdLookup:
        """Look what is stored under an id, without loading any of it.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def find_results(self, request_id: str) -> frozenset[Task]:
        """Look for results alone: `IdLookup.results`.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        """Load the oldest request with this id; None when there is none.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def older(self, task: Task, request_id: str, than: Message) -> Message | None:
        """Load the oldest request with this id in its subject, if it is older than a delivery.

        Waits for the bus. Loads nothing where the delivery's own message is the only one.

        Raises:
            Unavailable: The client has given up; the process has to end.
        """

    async def owner(self, task: Task, request_id: str) -> str | None:
        """Return the digest that an id belongs to since its request was stored for a retry.

        Waits for the bus.

        Raises:
            Unavailable: The client has given up; the process has to end.
        """

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        """Mark a request as cancelled for the worker that gets its next attempt. Never raises."""


class StopAck(Enum):
    """A worker's answer to a request to stop: the worker has the request."""

    STOPPING = "stopping"  # it stops at its next step, even if this worker should die
    ENDING = "ending"  # too late: its end is being published


class Workers(Protocol):
    """All workers of the installation. No method raises."""

    async def request_stop(self, request_id: str) -> "asyncio.Future[StopAck | None]":
        """Ask all workers to stop a request; each of them remembers the id.

        Returns:
            Once the message has been sent: the answer to wait for. None: no worker has answered.
        """

    async def notify_stop(self, request_id: str) -> None:
        """Ask all workers to stop a request, without an answer."""

    async def is_in_progress(self, request_id: str) -> bool:
        """Whether another worker has a job with this id. The job goes on.

        No answer within a moment counts as no.
        """

    async def others_idle(self) -> bool:
        """Whether another worker waits for requests; ask while the own pull does not stand.

        False when the bus cannot tell.
        """


class ResultUnreadable(Exception):  # noqa: N818 - a state of the request
    """The request has a terminal event, of a version of the contract that is not known here."""


class QueueFull(Exception):  # noqa: N818 - a state of the queue
    """The request stream takes no more."""


class MessageTooLarge(Exception):  # noqa: N818 - a state of the message
    """Body and headers together exceed the server's `max_payload`."""
