"""The NATS service of a worker: request-reply calls, cancellations and stop requests.

A request-reply client cannot use the subject of a stream: the server replies to it at once with a
publish acknowledgement, and the delivery does not contain the client's inbox. Therefore calls have
their own subjects. The service validates a call and stores its request with the inbox in a header.
The worker that finalizes the request replies to the inbox. The service itself replies only to an
invalid call, with a failed event.

The sender chooses the reply subject, so the service checks it first. A message with a reply subject
that is not allowed has no effect and gets no reply.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error
from nats.micro import add_service
from nats.micro.request import Request as Call
from nats.micro.service import Service, ServiceConfig
from pydantic_core import from_json

from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable, wait_until_available
from consumer.bus.endpoint_connection import SERVICE, RefusedReplies, is_reply_subject
from consumer.bus.nats_internals import drain_endpoints, reply_subject
from consumer.bus.queue import PROCESS
from consumer.bus.semantic_version import semantic_version
from consumer.endpoints.uploads import SignUpload, handle_upload, refuse
from consumer.jobs import outcomes
from consumer.jobs.served_model import ServedModel
from consumer.ports.bus import StopAck
from consumer.ports.model import UnsupportedParameter
from consumer.ports.telemetry import Observer
from consumer.ports.unavailable import Unavailable
from generation_client import QueueFull, RequestTooLarge, ServiceUnavailable, submit
from generation_contracts import (
    TASKS,
    CancelReply,
    FailedEvent,
    Failure,
    FailureCode,
    InvalidRequest,
    ModelInfo,
    Request,
    Subjects,
    Task,
    check_routing_slip,
    decode_request,
    encode,
    request_digest,
)
from generation_contracts.headers import (
    MESSAGE_ID,
    REPLY_TO,
    TRACE_PARENT,
    event_headers,
)
from generation_contracts.queues import why_no_queue
from generation_contracts.requests import digest_of_bytes
from generation_contracts.schema import json_schemas
from generation_contracts.subjects import HOLDER, is_request_id

log = structlog.get_logger()

START_TIMEOUT = 30.0  # seconds until the started service must reply to this worker's ping
DRAIN_TIMEOUT = 2.0  # seconds for received calls during the shutdown; a call takes a millisecond
MAX_CANCELLATIONS = 10_000  # concurrent ones; each takes a few kB while it waits for a reply


@dataclass(frozen=True)
class WorkerBackend:
    """The parts of a worker that its service uses.

    Attributes:
        task: Task of the calls.
        served: The queue and the model of the worker.
        queue_for: Returns the queue for a model of a task; None if there is none; raises
            BusUnavailable.
        worker: Name of this process in the events that it publishes.
        model: Shown by `nats micro info`.
        reply_prefixes: Allowed prefixes for the inbox of a call, a cancellation or an upload.
        check: Validates a request against the model; raises UnsupportedParameter.
        cancel: Cancels a request by its id.
        request_stop: Stops a request in progress at this worker; returns None if there is none.
        is_running: Returns whether this worker has a request in progress.
        sign_upload: Signs the form of one upload; raises UploadTooLarge.
        observer: Notified of each refused call, with the code.
        worker_inboxes: Prefix of the inbox of a stop request, which only workers send.
        request_schema: JSON Schema of the requests; None: the schema of the contract.
    """

    task: Task
    served: ServedModel
    queue_for: Callable[[Task, str | None], Awaitable[str | None]]
    worker: str
    model: ModelInfo
    reply_prefixes: tuple[str, ...]
    check: Callable[[Request], None]
    cancel: Callable[[str], Awaitable[CancelReply]]
    request_stop: Callable[[str], Awaitable[StopAck | None]]
    is_running: Callable[[str], bool]
    sign_upload: SignUpload
    observer: Observer
    worker_inboxes: str = "_INBOX."
    request_schema: Mapping[str, Any] | None = None


class WorkerService:
    """The service of one worker.

    The workers of a task share the calls of the task, also those of several queues: a call goes to
    the queue of its model. The workers of a queue share the calls of the queue. All workers share
    the cancellations and the upload requests.

    Args:
        bus: A connection that only the endpoints use; see `connect_endpoints`.
        subjects: Subjects of the installation.
        backend: The parts of the worker that the service uses.
    """

    def __init__(self, bus: Bus, subjects: Subjects, backend: WorkerBackend) -> None:
        self._bus = bus
        self._subjects = subjects
        self._backend = backend
        self._service: Service | None = None
        self._interrupts: Subscription | None = None
        self._cancelling: set[asyncio.Task[None]] = set()
        self._queue = backend.served.queue.name
        self._refused = RefusedReplies(backend.observer)

    async def start(self) -> None:
        """Start the service, and wait until the server routes messages to it.

        Raises:
            BusUnavailable: The connection is closed, or the service has not replied within
                `START_TIMEOUT`.
        """
        task, model = self._backend.task, self._backend.model
        try:
            # Before the endpoints: a cancellation may send a stop request to this worker as well.
            self._interrupts = await self._bus.client.subscribe(
                self._subjects.interrupts, cb=self._interrupt
            )
            self._service = await add_service(
                self._bus.client,
                ServiceConfig(
                    name=SERVICE,
                    version=semantic_version(version("generation-consumer")),
                    description="Images from texts, texts about images",
                    metadata={
                        "worker": self._backend.worker,
                        "task": str(task),
                        "queue": self._queue,
                        **model.labels(),
                    },
                ),
            )
            own = self._backend.request_schema
            schema = json.dumps(own or json_schemas()[TASKS[task].request.__name__])
            for name in dict.fromkeys((str(task), self._queue)):
                await self._service.add_endpoint(
                    name=name,
                    subject=self._subjects.call(name),
                    handler=self._call,
                    metadata={"request": schema},
                )
            await self._service.add_endpoint(
                name="cancel", subject=self._subjects.cancels, handler=self._cancel_if_allowed
            )
            await self._service.add_endpoint(
                name="upload",
                subject=self._subjects.upload,
                handler=self._upload,
                metadata={"request": json.dumps(json_schemas()["UploadRequest"])},
            )
        except (Error, OSError) as error:
            raise BusUnavailable(f"NATS: no service: {type(error).__name__}") from None
        ping = partial(self._ping, f"$SRV.PING.{SERVICE}.{self._service.id}")
        await wait_until_available(ping, deadline=time.monotonic() + START_TIMEOUT)

    async def _ping(self, subject: str) -> None:
        """Ping the service of this worker: a reply proves that the server has its subscriptions."""
        try:
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.client.request(subject, timeout=API_TIMEOUT)
        except (Error, OSError) as error:
            reason = f"NATS: the service of this worker does not reply: {type(error).__name__}"
            raise BusUnavailable(reason) from None

    async def close(self) -> None:
        """Stop the service after it has handled what it received. Never raises."""
        try:
            if self._service is not None:
                # A call that this worker has received is delivered to no other worker.
                if not await drain_endpoints(self._service, within=DRAIN_TIMEOUT):
                    log.warning("calls_not_drained")  # bus unavailable, or too many calls
                await self._service.stop()
            if self._interrupts is not None:
                await self._interrupts.unsubscribe()
        except (Error, OSError) as error:
            log.warning("worker_service_not_closed", error=type(error).__name__)
        if self._cancelling:
            await asyncio.wait(self._cancelling)

    def _may_reply(self, reply: str, prefixes: tuple[str, ...], *, kind: str) -> bool:
        if is_reply_subject(reply, prefixes, self._subjects):
            return True
        self._refused.add(reply, kind=kind)
        return False

    # -- calls ------------------------------------------------------------------------------------

    async def _call(self, call: Call) -> None:
        # Handlers run sequentially; this one only stores the request.
        inbox = reply_subject(call)
        if not inbox:
            return  # not a call: a request without an inbox belongs to the request subject
        if not self._may_reply(inbox, self._backend.reply_prefixes, kind="call"):
            return
        headers = call.headers or {}
        request_id = _id_of(call.data, headers)
        digest, queue = digest_of_bytes(call.data), call.subject.rpartition(".")[2]
        try:
            request = self._validate(call.data, request_id)
            digest = request_digest(request)
            queue = await self._queue_of(call.subject, request)
            await submit(
                self._bus.client,
                self._subjects,
                queue,
                request,
                headers=self._request_headers(request_id, inbox, headers),
            )
        except Exception as error:  # noqa: BLE001 - the caller gets a failed event for any error
            failure = _failure(error)
            log.info("call_refused", request_id=request_id, code=failure.code)
            self._backend.observer.call_refused(failure.code)
            event = FailedEvent(
                request_id=request_id,
                task=self._backend.task,
                queue=None if queue == self._backend.task else queue,
                sequence=0,
                time=datetime.now(UTC),
                worker=self._backend.worker,
                attempt=1,
                request_digest=digest,
                failure=failure,
            )
            await self._reply(inbox, event)

    def _validate(self, body: bytes, request_id: str) -> Request:
        request = decode_request(self._backend.task, body)
        check_routing_slip(request)
        if request.reply_to is not None:
            raise InvalidRequest(
                "reply_to: not allowed in a call, which gets its reply on its inbox"
            )
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise _Expired
        return request.model_copy(update={"request_id": request_id})

    async def _queue_of(self, subject: str, request: Request) -> str:
        """Return the queue of a call, and check the request if it is the queue of this worker.

        Raises:
            UnsupportedParameter: No queue serves the model, or this model cannot serve the request.
        """
        task = self._backend.task
        queue: str | None = self._queue
        if subject == self._subjects.call(task):
            queue = await self._backend.queue_for(task, request.model)
        if queue is None:
            raise UnsupportedParameter(
                "model",
                f"model: {why_no_queue(request.model, task)}; `consumer queues list` lists them",
            )
        if queue == self._queue:
            self._backend.served.check(request)
            self._backend.check(request)
        return queue

    def _request_headers(
        self, request_id: str, inbox: str, headers: Mapping[str, str]
    ) -> dict[str, str]:
        # The message id is random. Two callers with the same request both need a reply, so both
        # requests are stored, and a worker runs only one of them. With a predictable id, another
        # sender could store a message under it first, and the server would drop the call.
        sent = {MESSAGE_ID: f"{request_id}.{uuid4().hex}", REPLY_TO: inbox}
        if TRACE_PARENT in headers:
            sent[TRACE_PARENT] = headers[TRACE_PARENT]
        return sent

    async def _reply(self, inbox: str, event: FailedEvent) -> None:
        headers = event_headers(event)
        try:
            await self._bus.client.publish(inbox, encode(event), headers=headers)
        except (Error, OSError) as error:
            log.warning("call_not_answered", error=type(error).__name__)

    # -- uploads ----------------------------------------------------------------------------------

    async def _upload(self, call: Call) -> None:
        inbox = reply_subject(call)
        if inbox and self._may_reply(inbox, self._backend.reply_prefixes, kind="upload"):
            await handle_upload(call, self._backend.sign_upload)

    # -- cancellation -----------------------------------------------------------------------------

    async def _cancel_if_allowed(self, call: Call) -> None:
        inbox = reply_subject(call)
        if not inbox or self._may_reply(inbox, self._backend.reply_prefixes, kind="cancel"):
            await self._start_cancellation(call)

    async def _start_cancellation(self, call: Call) -> None:
        # One task each: handlers run sequentially, and a cancellation may wait for a worker.
        # `Cancellation` limits the concurrent API calls and loaded requests of all of them.
        if len(self._cancelling) >= MAX_CANCELLATIONS:
            await _refuse(call, reply_subject(call), "503", "too many cancellations")
            return
        cancelling = asyncio.create_task(self._cancel(call), name="cancel")
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancel(self, call: Call) -> None:
        request_id = call.subject.rpartition(".")[2]
        inbox = reply_subject(call)
        try:
            if not is_request_id(request_id):
                await _refuse(call, inbox, "400", "the subject's last token is not a request id")
                return
            reply = await self._backend.cancel(request_id)
            if inbox:
                await call.respond(encode(reply))
        except Unavailable as error:
            await _refuse(call, inbox, "503", str(error))
        except Exception:
            log.exception("cancellation_failed", request_id=request_id)
            await _refuse(call, inbox, "500", "the worker failed on this cancellation")

    async def _interrupt(self, message: Msg) -> None:
        prefixes = (self._backend.worker_inboxes,)
        if message.reply and not self._may_reply(message.reply, prefixes, kind="interrupt"):
            return
        token = message.subject.rpartition(".")[2]
        if token.startswith(HOLDER):
            if message.data == PROCESS or not self._backend.is_running(token.removeprefix(HOLDER)):
                return
            reply = b""
        elif message.data:
            # Workers send no body. A sender can name this subject as a reply subject, and the
            # server then publishes a body to it.
            log.warning("invalid_stop_request")
            return
        else:
            stop_ack = await self._backend.request_stop(token)
            if stop_ack is None:
                return
            reply = stop_ack.value.encode()
        if message.reply:
            try:
                await self._bus.client.publish(message.reply, reply)
            except (Error, OSError) as error:
                log.warning("interrupt_not_answered", error=type(error).__name__)


class _Expired(Exception):  # noqa: N818 - a state of the request
    """The deadline has passed before the call was received."""


def _failure(error: Exception) -> Failure:  # noqa: PLR0911 - one for each
    match error:
        case InvalidRequest():
            return outcomes.MalformedRequest(str(error), error.problems).failure
        case RequestTooLarge():
            return outcomes.MalformedRequest("the request is too large for the bus").failure
        case UnsupportedParameter():
            return outcomes.ParameterRefused(str(error), error.parameter).failure
        case _Expired():
            return outcomes.DeadlineExceeded().failure
        case QueueFull():
            return outcomes.StreamFull().failure
        case ServiceUnavailable() | Unavailable():
            return Failure.of(FailureCode.INTERNAL, "the request could not be queued")
        case _:
            log.error("call_failed", exc_info=error)
            return Failure.of(FailureCode.INTERNAL, "the worker failed on this call")


def _id_of(body: bytes, headers: Mapping[str, str]) -> str:
    """Return the request id from the body or the headers of a call, else a new id."""
    try:
        value = from_json(body)
    except ValueError:
        value = None
    given = value.get("request_id") if isinstance(value, dict) else None
    for candidate in (given, headers.get(MESSAGE_ID)):
        if isinstance(candidate, str) and is_request_id(candidate):
            return candidate
    return uuid4().hex


async def _refuse(call: Call, inbox: str, code: str, description: str) -> None:
    if inbox:
        await refuse(call, code, description)
