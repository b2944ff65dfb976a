"""Calls that wait: for a result, within the time that a caller gets, while the caller is there."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse

from consumer.background_tasks import cancel_and_wait
from consumer.gateway.context import Gateway, GatewayPart, note_job
from consumer.gateway.error_handlers import ClientGone
from consumer.gateway.errors import ApiError, of_error, of_failure
from consumer.gateway.job_document import job_document
from consumer.gateway.jobs import Job, JobView
from consumer.gateway.keys import Authenticated
from consumer.gateway.sse import disconnected
from consumer.gateway.tenants import Caller
from generation_client import AnyEvent, RequestCancelled, RequestTooLarge
from generation_contracts import CancelledEvent, FailedEvent, SucceededEvent
from generation_contracts import Request as GenerationRequest

MAX_KEY = 255  # characters of an idempotency key
MARGIN = 5.0  # seconds after the deadline, in which the worker's own answer may arrive


@dataclass(frozen=True)
class Preferences:
    """How a caller wants to wait.

    Attributes:
        idempotency_key: The job has the same id each time; it is not cancelled when the client
            disconnects.
        respond_async: Whether the answer is the job and not its result.
    """

    idempotency_key: str | None = None
    respond_async: bool = False


async def _preferences(
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=MAX_KEY)] = None,
    prefer: Annotated[str | None, Header(description="`respond-async`: answer 202 at once")] = None,
) -> Preferences:
    wishes = {wish.partition(";")[0].strip().lower() for wish in (prefer or "").split(",")}
    return Preferences(idempotency_key, "respond-async" in wishes)


@dataclass(frozen=True)
class Sender:
    """The client of one HTTP request.

    Attributes:
        http: Its request.
    """

    gateway: Gateway
    http: Request
    caller: Caller
    preferences: Preferences

    def require_room(self, size: int) -> None:
        """Check early whether images can fit into the queue: to encode large ones takes long.

        Args:
            size: Characters of all images.

        Raises:
            ApiError: 413.
        """
        if size > self.gateway.bus.client.max_payload:
            raise of_error(RequestTooLarge())

    async def submit(self, wanted: GenerationRequest, *, waits: bool = True) -> "Call":
        """Queue a request.

        Args:
            wanted: What to queue.
            waits: False where the endpoint never waits for the result.

        Raises:
            ApiError: It is not queued.
        """
        job = await self.gateway.jobs.submit(
            self.caller,
            wanted,
            idempotency_key=self.preferences.idempotency_key,
            wait=waits and not self.preferences.respond_async,
        )
        note_job(self.http, job)
        return Call(self, job)


async def _sender(
    http: Request,
    gateway: GatewayPart,
    caller: Authenticated,
    preferences: Annotated[Preferences, Depends(_preferences)],
) -> Sender:
    return Sender(gateway, http, caller, preferences)


SenderPart = Annotated[Sender, Depends(_sender)]


@dataclass(frozen=True)
class Call:
    """A job and the client that waits for it.

    The job is queued. A client that sends its request again without an idempotency key queues a
    second job, so each error tells such a client not to retry. The client can fetch the job by its
    id, which the header `X-Request-Id` of the answer has.
    """

    sender: Sender
    job: Job

    async def result(self) -> SucceededEvent:
        """Wait for the result while the client is connected.

        Raises:
            ApiError: The job has not succeeded, or not in time.
            ClientGone: The client has disconnected; the job is abandoned.
        """
        waiting = asyncio.create_task(self._gateway.jobs.result(self.job), name="wait")
        leaving = asyncio.create_task(disconnected(self.sender.http.receive), name="disconnect")
        try:
            await asyncio.wait(
                {waiting, leaving}, timeout=self._patience, return_when=asyncio.FIRST_COMPLETED
            )
            ended, gone = waiting.done(), leaving.done()
        finally:
            await cancel_and_wait(waiting, leaving)
        if ended:
            with self._without_retry():
                return waiting.result()
        await self.abandon()
        if gone:
            raise ClientGone
        raise self._too_late()

    async def events(self) -> AsyncGenerator[AnyEvent, None]:
        """Yield the events of the job; the last one is the success.

        Raises:
            ApiError: The job has not succeeded, or not in time.
        """
        until = asyncio.get_running_loop().time() + self._patience
        async with aclosing(self._gateway.jobs.events(self.job)) as entries:
            while True:
                try:
                    with self._without_retry():
                        async with asyncio.timeout_at(until):
                            entry = await anext(entries, None)
                        if entry is None:
                            return
                        require_success(entry.event)
                except TimeoutError:
                    await self.abandon()
                    raise self._too_late() from None
                yield entry.event

    async def content(self, event: SucceededEvent, number: int) -> bytes:
        """Read the file of one output.

        Raises:
            ApiError: See `Jobs.content`.
        """
        with self._without_retry():
            return await self._gateway.jobs.content(event, number)

    async def view(self) -> JobView:
        """Look at the job.

        Raises:
            ApiError: See `Jobs.view`.
        """
        with self._without_retry():
            return await self._gateway.jobs.view(self.job)

    async def accepted(self) -> JSONResponse:
        """Answer with the job instead of its result: what `Prefer: respond-async` asks for."""
        document = job_document(await self.view())
        headers = {
            "location": document.status_url,
            "preference-applied": "respond-async",
        }
        return JSONResponse(document.model_dump(mode="json"), HTTPStatus.ACCEPTED, headers)

    async def abandon(self) -> None:
        """Cancel the job, unless the client can come back for it. Never raises."""
        if not self._can_be_repeated:
            await self._gateway.jobs.abandon(self.job)

    @contextmanager
    def _without_retry(self) -> Iterator[None]:
        """Remove the advice to retry from errors, unless a retry finds the same job."""
        try:
            yield
        except ApiError as error:
            if self._can_be_repeated:
                raise
            raise replace(error, retry_after=None) from None

    @property
    def _can_be_repeated(self) -> bool:
        return self.sender.preferences.idempotency_key is not None

    @property
    def _gateway(self) -> Gateway:
        return self.sender.gateway

    @property
    def _patience(self) -> float:
        return self._gateway.settings.gateway_wait + MARGIN

    def _too_late(self) -> ApiError:
        return ApiError(
            HTTPStatus.GATEWAY_TIMEOUT,
            "the request has not ended in time",
            "deadline_exceeded",
            request_id=self.job.id,
        )


def require_success(event: AnyEvent) -> None:
    """Check that an event does not end its job without a result.

    Raises:
        ApiError: The job has failed or was cancelled.
    """
    match event:
        case FailedEvent():
            raise of_failure(event.failure, event.request_id)
        case CancelledEvent():
            raise of_error(RequestCancelled(event))
