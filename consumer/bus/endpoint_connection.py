"""The connection of the request-reply endpoints: calls, cancellations, stop requests and `$SRV`.

The sender of a message chooses the reply subject, and the endpoint publishes the reply there with
its own permissions. Therefore the endpoints do not share the connection that stores results. Their
connection has a separate user (`GENERATION_ENDPOINTS_NKEY` in users.conf), and its client publishes
only replies to inboxes and the requests of calls. On a server without users, the check in the
client is the only one.
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
from generation_contracts import FailureCode, Subjects, UnsafeReplySubject
from generation_contracts.headers import wire_size
from generation_contracts.subjects import MAX_SUBJECT

log = structlog.get_logger()

SERVICE = "generation"
LOG_EVERY = 10.0  # seconds between two log lines about refused reply subjects


class RefusedReplies:
    """Counts messages without a reply, because their reply subject is not allowed.

    A sender can cause any number of them, so only one in `LOG_EVERY` seconds is logged.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._log_from = 0.0  # time.monotonic()
        self._unlogged = 0

    def add(self, reply: str, *, kind: str) -> None:
        """Count one message.

        Args:
            reply: The reply subject that is not allowed.
            kind: Kind of the message.
        """
        self._observer.call_refused(FailureCode.INVALID_REQUEST)
        now = time.monotonic()
        if now < self._log_from:
            self._unlogged += 1
            return
        log.warning(
            "reply_subject_refused", kind=kind, reply=reply[:MAX_SUBJECT], unlogged=self._unlogged
        )
        self._log_from, self._unlogged = now + LOG_EVERY, 0


def is_reply_subject(subject: str, prefixes: tuple[str, ...], subjects: Subjects) -> bool:
    """Return whether a reply may be published to a subject; see `Subjects.check_reply`."""
    try:
        subjects.check_reply(subject, prefixes)
    except UnsafeReplySubject:
        return False
    return True


class EndpointClient(RobustClient):
    """A client that publishes replies to inboxes and requests, and drops the rest.

    nats-py itself replies to `$SRV.PING`, `INFO` and `STATS`, on any reply subject and with all
    headers of the message.

    Args:
        subjects: Subjects of the installation.
        inboxes: Prefixes of the allowed reply subjects.
        refused: Counts the dropped messages.
    """

    def __init__(
        self, subjects: Subjects, inboxes: tuple[str, ...], refused: RefusedReplies
    ) -> None:
        super().__init__()
        self._subjects = subjects
        self._own_requests = (f"{subjects.root}.request.", f"$SRV.PING.{SERVICE}.")
        self._inboxes = inboxes
        self._refused = refused

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Publish the message; drop it if its subject is not allowed, as the server would.

        Raises:
            MaxPayloadError: The message with its headers exceeds the server's limit. nats-py checks
                the payload alone, and the server would close the connection.
        """
        if not self._may_publish(subject, reply):
            self._refused.add(subject, kind="publish")
            return
        if wire_size(payload, headers or {}) > self.max_payload:
            raise MaxPayloadError
        await super().publish(subject, payload, reply, headers)

    def _may_publish(self, subject: str, reply: str) -> bool:
        # Only the worker's own requests have a reply subject: the publish of a request to its
        # stream, and the readiness check of the service. Replies have none.
        if reply:
            return subject.startswith(self._own_requests)
        return is_reply_subject(subject, self._inboxes, self._subjects)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Callable[[Msg], Awaitable[None]] | None = None,
        *limits: Any,
        **more_limits: Any,
    ) -> Subscription:
        """Subscribe; for `$SRV` subjects, pass on only messages that have a reply subject."""
        if cb is not None and subject.startswith("$SRV."):
            cb = _without_headers(cb)
        return await super().subscribe(subject, queue, cb, *limits, **more_limits)


async def connect_endpoints(settings: Settings, observer: Observer, *, within: float) -> Bus:
    """Connect to NATS for the endpoints, with the credentials of their user if they are set.

    Args:
        settings: NATS_* and CONSUMER_* settings.
        observer: Notified of each message whose reply subject is not allowed.
        within: Seconds.

    Raises:
        BusUnavailable: Not connected within so many seconds.
    """
    own = tuple(f"{each.nats_inbox_prefix}." for each in (settings, settings.endpoints))
    client = EndpointClient(
        settings.subjects,
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


def _without_headers(handler: Callable[[Msg], Awaitable[None]]) -> Callable[[Msg], Awaitable[None]]:
    async def handle(message: Msg) -> None:
        # The handler of nats-py copies the headers of the request to the reply. The server would
        # obey some of them, and very long headers would exceed the size limit.
        if message.reply:
            await handler(replace(message, headers=None))

    return handle
