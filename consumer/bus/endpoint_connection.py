"""The connection of the request-reply endpoints: calls, cancellations, interrupts and `$SRV`.

The sender of a message chooses the reply subject, and the endpoint publishes its answer there with
its own permissions. So the endpoints do not share the connection that stores results: theirs has a
user of its own (`GENERATION_ENDPOINTS_NKEY` in users.conf), and a client that publishes nothing but
answers to inboxes and the requests of calls. Where the server knows no users, the client's check is
the only one.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import MaxPayloadError

from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.nats_internals import RobustClient
from consumer.ports.telemetry import Observer
from consumer.settings import Settings
from generation_contracts import FailureCode, Subjects, Task, UnsafeReplySubject
from generation_contracts.headers import wire_size
from generation_contracts.subjects import MAX_SUBJECT

log = structlog.get_logger()

SERVICE = "generation"
LOG_EVERY = 10.0  # seconds between two log lines about reply subjects that are not allowed


class RefusedReplies:
    """Counts the messages that get no answer because of their reply subject.

    A sender can cause any number of them, so only one in `LOG_EVERY` seconds is logged.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._log_from = 0.0  # time.monotonic()
        self._unlogged = 0

    def add(self, reply: str, *, asked: str) -> None:
        """Count one message.

        Args:
            reply: The reply subject that is not allowed.
            asked: The kind of message.
        """
        self._observer.call_refused(FailureCode.INVALID_REQUEST)
        now = time.monotonic()
        if now < self._log_from:
            self._unlogged += 1
            return
        log.warning(
            "reply_subject_refused", asked=asked, reply=reply[:MAX_SUBJECT], unlogged=self._unlogged
        )
        self._log_from, self._unlogged = now + LOG_EVERY, 0


def is_reply_subject(subject: str, prefixes: tuple[str, ...], subjects: Subjects) -> bool:
    """Whether a message may be answered to a subject; see `Subjects.check_reply`."""
    try:
        subjects.check_reply(subject, prefixes)
    except UnsafeReplySubject:
        return False
    return True


class EndpointClient(RobustClient):
    """A client that publishes answers to inboxes and requests of one task, and drops all else.

    nats-py answers `$SRV.PING`, `INFO` and `STATS` by itself, to whatever subject the message names
    and with all of its headers.

    Args:
        subjects: Of the installation.
        task: Whose requests it may publish.
        inboxes: Prefixes of the reply subjects that it may answer to.
        refused: Counts what it drops.
    """

    def __init__(
        self, subjects: Subjects, task: Task, inboxes: tuple[str, ...], refused: RefusedReplies
    ) -> None:
        super().__init__()
        self._subjects = subjects
        self._questions = (f"{subjects.request(task)}.", f"$SRV.PING.{SERVICE}.")
        self._inboxes = inboxes
        self._refused = refused

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Publish, or drop the message if its subject is not allowed, as the server would.

        Raises:
            MaxPayloadError: It does not fit the server's limit, headers included. nats-py checks
                the payload alone, and the server closes the connection.
        """
        if not self._may_publish(subject, reply):
            self._refused.add(subject, asked="publish")
            return
        if wire_size(payload, headers or {}) > self.max_payload:
            raise MaxPayloadError
        await super().publish(subject, payload, reply, headers)

    def _may_publish(self, subject: str, reply: str) -> bool:
        # Only what this worker asks for itself has a reply subject: that a request is stored, and
        # the service's check that it answers. Answers have none.
        if reply:
            return subject.startswith(self._questions)
        return is_reply_subject(subject, self._inboxes, self._subjects)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Callable[[Msg], Awaitable[None]] | None = None,
        *limits: Any,
        **more_limits: Any,
    ) -> Subscription:
        """Subscribe; nats-py's own handlers get only messages that have a reply subject."""
        if cb is not None and subject.startswith("$SRV."):
            cb = _without_headers(cb)
        return await super().subscribe(subject, queue, cb, *limits, **more_limits)


async def connect_endpoints(settings: Settings, observer: Observer, *, within: float) -> Bus:
    """Connect to NATS for the endpoints, with their user's credentials if there are any.

    Args:
        settings: NATS_* and CONSUMER_* settings.
        observer: Notified of each message whose reply subject is not allowed.
        within: Seconds to try.

    Raises:
        BusUnavailable: Not within so many seconds.
    """
    own = tuple(f"{each.nats_inbox_prefix}." for each in (settings, settings.endpoints))
    client = EndpointClient(
        settings.subjects,
        settings.task,
        (*settings.reply_prefixes, *own),
        RefusedReplies(observer),
    )
    bus = Bus(client)
    name = f"generation {settings.consumer_worker} endpoints"
    try:
        await bus.open(settings.endpoints, name=name, within=within)
    except BusUnavailable as error:
        raise BusUnavailable(f"{error} (the connection of the endpoints)") from None
    return bus


def _without_headers(answer: Callable[[Msg], Awaitable[None]]) -> Callable[[Msg], Awaitable[None]]:
    async def answer_if_asked(message: Msg) -> None:
        # The answer repeats the headers of the question: the server would obey some of them, and
        # very long ones make the answer larger than the server takes.
        if message.reply:
            await answer(replace(message, headers=None))

    return answer_if_asked
