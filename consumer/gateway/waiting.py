"""Endpoints that wait for a result, with a time limit, while the client is connected."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated, TypeVar

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
from generation_contracts import CancelledEvent, FailedEvent, SucceededEvent, Task
from generation_contracts import Request as GenerationRequest
from generation_contracts.base import DEFAULT_QUEUES

R = TypeVar("R", bound=GenerationRequest)

MAX_KEY = 255  # characters of an idempotency key
MARGIN = 5.0  # seconds after the deadline in which the worker's failed event may arrive


@dataclass(frozen=True)
class Preferences:
    """The headers `Idempotency-Key` and `Prefer` of a request.

    Attributes:
        idempotency_key: Gives the same job each time; the job is not cancelled when the client
            disconnects.
        respond_async: Whether the response is the job and not its result.
    """

    idempotency_key: str | None = None
    respond_async: bool = False


async def _preferences(
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=MAX_KEY)] = None,
    prefer: Annotated[str | None, Header(description="`respond-async`: answer 202 at once")] = None,
) -> Preferences:
    options = {option.partition(";")[0].strip().lower() for option in (prefer or "").split(",")}
    return Preferences(idempotency_key, "respond-async" in options)


@dataclass(frozen=True)
class Sender:
    """The client of one HTTP request.

    Attributes:
        http: The HTTP request.
    """

    gateway: Gateway
    http: Request
    caller: Caller
    preferences: Preferences

    def require_room(self, size: int) -> None:
        """Check early whether the images fit into a message: encoding large images takes long.

        Args:
            size: Characters of all images together.

        Raises:
            ApiError: 413.
        """
        if size > self.gateway.bus.client.max_payload:
            raise of_error(RequestTooLarge())

    async def submit(self, request: GenerationRequest, *, waits: bool = True) -> "Call":
        """Queue a request.

        Args:
            request: The request of the contract.
            waits: Whether the endpoint can wait for the result.

        Raises:
            ApiError: The request is not queued.
        """
        job = await self.gateway.jobs.submit(
            self.caller,
            request,
            queue=await self._queue_of(request),
            idempotency_key=self.preferences.idempotency_key,
            wait=waits and not self.preferences.respond_async,
        )
        note_job(self.http, job)
        return Call(self, job)

    async def with_model(self, request: R, name: str | None) -> R:
        """Return a request for the model that a caller has named.

        The default queue takes the request without a name: its workers may be of an earlier
        version, which does not know the field.

        Raises:
            ApiError: 404: no queue of the task serves this model.
        """
        model = await self.gateway.catalogue.find(name, request.task)
        if model.queue == request.task:
            return request
        return request.model_copy(update={"model": model.queue})

    async def _queue_of(self, request: GenerationRequest) -> str:
        """Return the queue of a request, and find the models of the later steps of its chain.

        Raises:
            ApiError: 404: no queue serves a model.
        """
        catalogue = self.gateway.catalogue
        for number, step in enumerate(request.then):
            if step.model is not None:
                try:
                    await catalogue.find(step.model, Task(step.task))
                except ApiError as error:
                    raise replace(error, param=error.param and f"then.{number}.model") from None
        if request.model is None and request.task in DEFAULT_QUEUES:
            return str(request.task)
        return (await catalogue.find(request.model, request.task)).queue


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

    The job is queued. A retry without an idempotency key would queue a second job, so errors
    advise such a client not to retry. The client can read the job by its id, which is in the
    response header `X-Request-Id`.
    """

    sender: Sender
    job: Job

    async def result(self) -> SucceededEvent:
        """Wait for the result while the client is connected.

        Raises:
            ApiError: The job has not succeeded, or not in time.
            ClientGone: The client has disconnected; the job is cancelled.
        """
        waiting = asyncio.create_task(self._gateway.jobs.result(self.job), name="wait")
        leaving = asyncio.create_task(disconnected(self.sender.http.receive), name="disconnect")
        try:
            await asyncio.wait(
                {waiting, leaving}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED
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
        """Yield the events of the job, up to and including its succeeded event.

        Raises:
            ApiError: The job has not succeeded, or not in time.
        """
        until = asyncio.get_running_loop().time() + self._timeout
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
        """Return the view of the job.

        Raises:
            ApiError: See `Jobs.view`.
        """
        with self._without_retry():
            return await self._gateway.jobs.view(self.job)

    async def accepted(self) -> JSONResponse:
        """Return the response for `Prefer: respond-async`: the job instead of its result."""
        document = job_document(await self.view())
        headers = {
            "location": document.status_url,
            "preference-applied": "respond-async",
        }
        return JSONResponse(document.model_dump(mode="json"), HTTPStatus.ACCEPTED, headers)

    async def abandon(self) -> None:
        """Cancel the job, unless the client can repeat its request. Never raises."""
        if not self._can_be_repeated:
            await self._gateway.jobs.abandon(self.job)

    @contextmanager
    def _without_retry(self) -> Iterator[None]:
        """Remove `retry_after` from errors, unless a retry finds the same job."""
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
    def _timeout(self) -> float:
        return self._gateway.settings.gateway_wait + MARGIN

    def _too_late(self) -> ApiError:
        return ApiError(
            HTTPStatus.GATEWAY_TIMEOUT,
            "the request has not ended in time",
            "deadline_exceeded",
            request_id=self.job.id,
        )


def require_success(event: AnyEvent) -> None:
    """Raise if an event ends its job without a result.

    Raises:
        ApiError: The job has failed or was cancelled.
    """
    match event:
        case FailedEvent():
            raise of_failure(event.failure, event.request_id)
        case CancelledEvent():
            raise of_error(RequestCancelled(event))
