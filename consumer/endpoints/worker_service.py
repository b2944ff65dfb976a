"""The front door: for callers who send a request and wait for its result on their inbox.

A request to a subject of a stream is answered by the server at once, with the place where it was
stored, never with a result; and the caller's inbox is nowhere in the message that a worker gets.
So this is a NATS micro service on subjects of its own. It checks a request, stores it with the
inbox in a header, and says nothing: whichever worker ends the request answers the inbox. What is
wrong is answered at once, with a failed event.

Answers go to the subject that the sender names, so it is checked before anything is done: a message
with a reply subject that is not allowed has no effect and gets no answer.
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
from consumer.jobs import outcomes
from consumer.ports.bus import StopAck
from consumer.ports.model import UnsupportedParameter
from consumer.ports.telemetry import Observer
from consumer.ports.unavailable import Unavailable
from generation_client import QueueFull, RequestTooLarge, ServiceUnavailable, submit
from generation_contracts import (
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
from generation_contracts.requests import digest_of_bytes
from generation_contracts.schema import json_schemas
from generation_contracts.subjects import HOLDER, is_request_id

log = structlog.get_logger()

ANSWER_WITHIN = 30.0  # seconds, at the start, for the answer of the own service
EMPTY_WITHIN = 2.0  # seconds, at the end, for calls that have come; one takes a millisecond
CANCELLATIONS = 10_000  # at the same time; each takes a few kB while it waits for an answer


@dataclass(frozen=True)
class Backend:
    """What is behind the door.

    Attributes:
        task: What calls are for.
        worker: Name of this process in the events that it answers with.
        model: Shown by `nats micro info`.
        reply_prefixes: What the inbox of a call or a cancellation may begin with.
        check: Says whether the model can do what is asked; raises UnsupportedParameter.
        cancel: Cancels a request by its id, wherever it is.
        request_stop: Stops a request that this worker has; None when it has not.
        is_running: Whether this worker has a request.
        observer: Told of each call that is refused, and why.
        worker_inboxes: What the inbox of an interrupt begins with: workers send them.
    """

    task: Task
    worker: str
    model: ModelInfo
    reply_prefixes: tuple[str, ...]
    check: Callable[[Request], None]
    cancel: Callable[[str], Awaitable[CancelReply]]
    request_stop: Callable[[str], Awaitable[StopAck | None]]
    is_running: Callable[[str], bool]
    observer: Observer
    worker_inboxes: str = "_INBOX."


class WorkerService:
    """The service of one daemon; all daemons of a task share its calls, and all of them the rest.

    Args:
        bus: A connection for nothing else; see `connect_endpoints`.
        subjects: Where calls come in, and where requests go.
        backend: What is behind the door.
    """

    def __init__(self, bus: Bus, subjects: Subjects, backend: Backend) -> None:
        self._bus = bus
        self._subjects = subjects
        self._backend = backend
        self._service: Service | None = None
        self._interrupts: Subscription | None = None
        self._cancelling: set[asyncio.Task[None]] = set()
        self._refused = RefusedReplies(backend.observer)

    async def start(self) -> None:
        """Listen.

        Raises:
            BusUnavailable: The connection is closed, or the own service has not answered within
                `ANSWER_WITHIN`.
        """
        task, model = self._backend.task, self._backend.model
        try:
            # First: whoever is told to cancel may ask this worker, too.
            self._interrupts = await self._bus.client.subscribe(
                self._subjects.interrupts, cb=self._interrupt
            )
            self._service = await add_service(
                self._bus.client,
                ServiceConfig(
                    name=SERVICE,
                    version=semantic_version(version("generation-consumer")),
                    description="Pictures from texts, texts about pictures",
                    metadata=_texts(worker=self._backend.worker, task=task, **model.model_dump()),
                ),
            )
            await self._service.add_endpoint(
                name=str(task),
                subject=self._subjects.call(task),
                handler=self._call,
                metadata={"request": json.dumps(json_schemas()[_TITLES[task]])},
            )
            await self._service.add_endpoint(
                name="cancel", subject=self._subjects.cancels, handler=self._cancel_if_allowed
            )
        except (Error, OSError) as error:
            raise BusUnavailable(f"NATS: no service: {type(error).__name__}") from None
        asking = partial(self._require_answer, f"$SRV.PING.{SERVICE}.{self._service.id}")
        await wait_until_available(asking, deadline=time.monotonic() + ANSWER_WITHIN)

    async def _require_answer(self, subject: str) -> None:
        """Ask the service of this worker: its answer says that the server has its subscriptions."""
        try:
            async with self._bus.question(API_TIMEOUT):
                await self._bus.client.request(subject, timeout=API_TIMEOUT)
        except (Error, OSError) as error:
            reason = f"NATS: the service of this worker does not answer: {type(error).__name__}"
            raise BusUnavailable(reason) from None

    async def close(self) -> None:
        """Listen no more, and finish what has been begun. Never raises."""
        try:
            if self._service is not None:
                # No other worker gets a call that this one has received.
                if not await drain_endpoints(self._service, within=EMPTY_WITHIN):
                    log.warning("calls_may_be_lost")  # the bus is away, or they were too many
                await self._service.stop()
            if self._interrupts is not None:
                await self._interrupts.unsubscribe()
        except (Error, OSError) as error:
            log.warning("front_door_not_closed", error=type(error).__name__)
        if self._cancelling:
            await asyncio.wait(self._cancelling)

    def _may_answer(self, reply: str, prefixes: tuple[str, ...], *, asked: str) -> bool:
        if is_reply_subject(reply, prefixes, self._subjects):
            return True
        self._refused.add(reply, asked=asked)
        return False

    # -- calls ------------------------------------------------------------------------------------

    async def _call(self, call: Call) -> None:
        # Handlers run one after another: this one stores the request and returns.
        inbox = reply_subject(call)
        if not inbox:
            return  # nobody waits for an answer: it was published, and belongs to another subject
        if not self._may_answer(inbox, self._backend.reply_prefixes, asked="call"):
            return
        headers = call.headers or {}
        request_id = _id_of(call.data, headers)
        digest = digest_of_bytes(call.data)
        try:
            request = self._admitted(call.data, request_id)
            digest = request_digest(request)
            await submit(
                self._bus.client,
                self._subjects,
                self._backend.task,
                request,
                headers=self._sent_with(request_id, inbox, headers),
            )
        except Exception as error:  # noqa: BLE001 - the caller is told, whatever it is
            failure = _failure(error)
            log.info("call_refused", request_id=request_id, code=failure.code)
            self._backend.observer.call_refused(failure.code)
            event = FailedEvent(
                request_id=request_id,
                task=self._backend.task,
                sequence=0,
                time=datetime.now(UTC),
                worker=self._backend.worker,
                attempt=1,
                request_digest=digest,
                failure=failure,
            )
            await self._answer(inbox, event)

    def _admitted(self, body: bytes, request_id: str) -> Request:
        request = decode_request(self._backend.task, body)
        check_routing_slip(request)
        if request.reply_to is not None:
            raise InvalidRequest("reply_to: a call is answered on its inbox")
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise _Expired
        self._backend.check(request)
        return request.model_copy(update={"request_id": request_id})

    def _sent_with(self, request_id: str, inbox: str, headers: Mapping[str, str]) -> dict[str, str]:
        # Two callers with one request both wait for an answer, so both requests are stored; the
        # second is not run, only answered. The message id is random: with one that can be guessed,
        # another sender could have it stored before, and the call would be dropped as a duplicate.
        sent = {MESSAGE_ID: f"{request_id}.{uuid4().hex}", REPLY_TO: inbox}
        if TRACE_PARENT in headers:
            sent[TRACE_PARENT] = headers[TRACE_PARENT]
        return sent

    async def _answer(self, inbox: str, event: FailedEvent) -> None:
        headers = event_headers(event)
        try:
            await self._bus.client.publish(inbox, encode(event), headers=headers)
        except (Error, OSError) as error:
            log.warning("call_not_answered", error=type(error).__name__)

    # -- cancellation -----------------------------------------------------------------------------

    async def _cancel_if_allowed(self, call: Call) -> None:
        inbox = reply_subject(call)
        if not inbox or self._may_answer(inbox, self._backend.reply_prefixes, asked="cancel"):
            await self._cancel(call)

    async def _cancel(self, call: Call) -> None:
        # A task for each: handlers run one after another, and a cancellation may wait for a worker.
        # `Cancellation` bounds what all of them ask the server and load at the same time.
        if len(self._cancelling) >= CANCELLATIONS:
            await _refuse(call, reply_subject(call), "503", "too many cancellations")
            return
        cancelling = asyncio.create_task(self._cancelled(call), name="cancel")
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancelled(self, call: Call) -> None:
        request_id = call.subject.rpartition(".")[2]
        inbox = reply_subject(call)
        try:
            if not is_request_id(request_id):
                await _refuse(call, inbox, "400", "the subject's last token is no request id")
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
        if message.reply and not self._may_answer(message.reply, prefixes, asked="interrupt"):
            return
        token = message.subject.rpartition(".")[2]
        if token.startswith(HOLDER):
            if message.data == PROCESS or not self._backend.is_running(token.removeprefix(HOLDER)):
                return
            answer = b""
        elif message.data:
            # No worker sends a body: the server does, to the reply subject of a sender's choice.
            log.warning("junk_among_interrupts")
            return
        else:
            stop_ack = await self._backend.request_stop(token)
            if stop_ack is None:
                return
            answer = stop_ack.value.encode()
        if message.reply:
            try:
                await self._bus.client.publish(message.reply, answer)
            except (Error, OSError) as error:
                log.warning("interrupt_not_answered", error=type(error).__name__)


_TITLES = {Task.TEXT_TO_IMAGE: "TextToImageRequest", Task.IMAGE_TO_TEXT: "ImageToTextRequest"}


class _Expired(Exception):  # noqa: N818 - a state of the request
    """The deadline had passed when the call came."""


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
        case ServiceUnavailable():
            return Failure.of(FailureCode.INTERNAL, "the request could not be queued")
        case _:
            log.error("call_failed", exc_info=error)
            return Failure.of(FailureCode.INTERNAL, "the worker failed on this call")


def _id_of(body: bytes, headers: Mapping[str, str]) -> str:
    """The caller's id, read from whatever came; else a new one."""
    try:
        value = from_json(body)
    except ValueError:
        value = None
    given = value.get("request_id") if isinstance(value, dict) else None
    for candidate in (given, headers.get(MESSAGE_ID)):
        if isinstance(candidate, str) and is_request_id(candidate):
            return candidate
    return uuid4().hex


def _texts(**values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


async def _refuse(call: Call, inbox: str, code: str, description: str) -> None:
    if inbox:
        body = json.dumps({"error": {"code": code, "description": description}}).encode()
        await call.respond_error(code, description, data=body)
