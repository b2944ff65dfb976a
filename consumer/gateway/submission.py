"""Submission of requests: give each an id, check the caller's bounds, and store it once."""

import asyncio
import secrets
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from consumer.bus.connection import Bus
from consumer.bus.queue_view import QueueView
from consumer.gateway.errors import invalid
from consumer.gateway.job_list import JobList
from consumer.gateway.job_view import Job
from consumer.gateway.results import Results, as_api_errors
from consumer.gateway.tenants import Caller, Tenant
from generation_client import (
    QueueFull,
    RequestIdTaken,
    ServiceUnavailable,
    submit,
    task_of,
)
from generation_client.submitting import message_id
from generation_contracts import (
    InvalidRequest,
    Request,
    Subjects,
    Task,
    check_routing_slip,
    decode_request,
    encode,
    request_digest,
)
from generation_contracts.headers import MESSAGE_ID
from generation_contracts.requests import digest_of_bytes

log = structlog.get_logger()

SUBMIT_WITHIN = 15.0  # seconds; a broker restarts in less time
PAUSE = 0.25  # seconds between two attempts
MAX_KEY = 255  # characters of an idempotency key


class Limits(Protocol):
    """Checks the bounds of the keys."""

    async def admit(self, caller: Caller, request: Request) -> None:
        """Count a request, or refuse it.

        Raises:
            ApiError: 400, 403 or 429.
        """

    def ended(self, request_id: str) -> None:
        """Stop counting a request."""


class Submission:
    """Queues requests.

    Args:
        bus: The gateway's connection.
        subjects: The subjects of requests.
        view: Finds queued and running requests.
        ids: Records the queued requests.
        results: Finds requests that have ended.
        limits: Admits requests.
        wait: The longest time that a caller may wait for a result.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        view: QueueView,
        ids: JobList,
        results: Results,
        limits: Limits,
        wait: timedelta,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._view = view
        self._ids = ids
        self._results = results
        self._limits = limits
        self._wait = wait
        self._secret = secrets.token_bytes(32)

    async def submit(
        self, caller: Caller, request: Request, *, queue: str, key: str | None, wait: bool
    ) -> Job:
        """Queue a request, or find the request that was queued with the same key.

        Args:
            caller: The sender of the request.
            request: The request, without an id.
            queue: The queue for the request.
            key: The caller's idempotency key.
            wait: Whether the caller waits for the result: the request then gets a deadline.

        Raises:
            InvalidRequest: A step of the chain cannot follow the step before it.
            ApiError: 400, 403, 413, 422 (the key was used for another request), 429 or 503.
        """
        check_routing_slip(request)
        request_id = _id(caller.tenant, key)
        request = request.model_copy(
            update={"request_id": request_id, "deadline": self._deadline(request, wait=wait)}
        )
        digests = request_digest(request), digest_of_bytes(encode(request))
        job = Job(request_id, task_of(request), queue, *digests)
        if key is not None and await self._exists(job):
            return job
        with as_api_errors():
            await self._limits.admit(caller, request)
        self._ids.add_submitted(job.id, job.queue)
        try:
            with as_api_errors():
                message = self._message_id(caller.tenant, job, request, key)
                await self._publish(queue, request, message)
        except BaseException:
            self._limits.ended(request_id)
            self._ids.remove(request_id)
            raise
        return replace(job, is_new=key is None)

    def _deadline(self, request: Request, *, wait: bool) -> datetime | None:
        if not wait:
            return request.deadline
        latest = datetime.now(UTC) + self._wait
        return latest if request.deadline is None else min(request.deadline, latest)

    def _message_id(self, tenant: Tenant, job: Job, request: Request, key: str | None) -> str:
        """Return the `Nats-Msg-Id`, by which the stream stores each request once.

        Two gateways that get the same idempotency key at the same time publish the same message
        id, although their deadlines differ.
        """
        if key is None:
            return message_id(self._secret, job.queue, request)
        without_deadline = request.model_copy(update={"deadline": None})
        return message_id(tenant.secret, job.queue, without_deadline)

    async def _exists(self, job: Job) -> bool:
        """Return whether a request with this id is queued, is running or has ended.

        Raises:
            ApiError: 422: the request differs; 503.
        """
        with as_api_errors():
            digest = await self._known_digest(job.id)
            # The request may have ended between the two reads.
            digest = digest or await self._digest_of_result(job.id)
            if digest is not None and digest != job.digest:
                raise RequestIdTaken
        return digest is not None

    async def _known_digest(self, request_id: str) -> str | None:
        digest = await self._digest_of_result(request_id)
        for queue in (await self._view.queues()).values():
            if digest is None:
                body = await self._view.body(queue.name, request_id)
                digest = None if body is None else _digest(queue.task, body)
        return digest

    async def _digest_of_result(self, request_id: str) -> str | None:
        event = await self._results.find(request_id, *await self._view.queues())
        return None if event is None else event.request_digest

    async def _publish(self, queue: str, request: Request, message: str) -> None:
        """Store a request; repeat a publish without an acknowledgement under the same message id.

        Raises:
            QueueFull, RequestTooLarge: The request is not stored.
            ServiceUnavailable: No acknowledgement was received.
            BusUnavailable: The connection is closed.
        """
        until = time.monotonic() + SUBMIT_WITHIN
        while True:
            try:
                async with self._bus.api_call(SUBMIT_WITHIN):
                    return await submit(
                        self._bus.client,
                        self._subjects,
                        queue,
                        request,
                        headers={MESSAGE_ID: message},
                    )
            except QueueFull:
                raise
            except (ServiceUnavailable, TimeoutError) as error:
                reason = str(error) or "the connection was lost"
                log.warning("request_publish_failed", reason=reason)
            await self._reconnected(until)

    async def _reconnected(self, until: float) -> None:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await asyncio.sleep(PAUSE)
                await self._bus.wait_connected()
        except TimeoutError:
            raise ServiceUnavailable("the queue cannot be reached") from None


def _id(tenant: Tenant, key: str | None) -> str:
    if key is None:
        return tenant.new_id(time.time_ns() // 1_000_000)
    if not 1 <= len(key) <= MAX_KEY:
        raise invalid(f"Idempotency-Key: must have 1 to {MAX_KEY} characters")
    return tenant.id_of(key)


def _digest(task: Task, body: bytes) -> str:
    try:
        return request_digest(decode_request(task, body))
    except InvalidRequest:
        return digest_of_bytes(body)
