"""The client: requests as method calls, their events as an iterator, results by id."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Self

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from generation_client.errors import (
    DownloadFailed,
    NoWorker,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    ServiceUnavailable,
)
from generation_client.submitting import submit
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    FailedEvent,
    ImageArtifact,
    ImageToTextRequest,
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    SucceededEvent,
    Task,
    TerminalEvent,
    TextToImageRequest,
    check_slip,
    decode_cancel_reply,
    decode_event,
    decode_result,
    encode,
    request_digest,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.requests import digest_of_bytes

CONNECT_WITHIN = 30.0  # seconds; nats-py itself would try a failing TLS handshake for ever
LOOK_EVERY = 2.0  # seconds; a result whose announcement was missed is found in the stream
LOOK_TIMEOUT = 5.0  # seconds for one look
CANCEL_WITHIN = 10.0  # seconds for the answer to a cancellation
DOWNLOAD_WITHIN = 60.0  # seconds for one output

AnyEvent = StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent
ResultEvent = SucceededEvent | FailedEvent | CancelledEvent


def new_request_id() -> str:
    """An id of its own for each request."""
    return uuid.uuid4().hex


def task_of(request: Request) -> Task:
    """The task that a request belongs to."""
    return Task.TEXT_TO_IMAGE if isinstance(request, TextToImageRequest) else Task.IMAGE_TO_TEXT


class GenerationClient:
    """Sends requests and collects what becomes of them; an asynchronous context manager.

    Whatever it waits for survives a lost connection: it connects again for ever, and a result that
    was published meanwhile is found in the stream.

    Args:
        server: URLs, comma-separated, or a connected nats-py client, which is left open.
        root: The installation's subject root.
        options: For `nats.connect`: user_credentials, nkeys_seed, tls, …
    """

    def __init__(
        self,
        server: str | Client = "nats://127.0.0.1:4222",
        *,
        root: str = "generation",
        **options: Any,
    ) -> None:
        self._server = server
        self._subjects = Subjects(root)
        self._options = options
        self._parts = AsyncExitStack()
        self._client: Client | None = server if isinstance(server, Client) else None

    async def __aenter__(self) -> Self:
        if not isinstance(self._server, Client):
            self._client = await _connect(self._server, self._options)
            self._parts.push_async_callback(self._client.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    # -- ask and wait -----------------------------------------------------------------------------

    async def text_to_image(
        self,
        prompt: str,
        *,
        on_event: Callable[[AnyEvent], None] | None = None,
        **parameters: Any,
    ) -> SucceededEvent:
        """Make pictures from a prompt, and wait for them.

        Args:
            prompt: What to draw.
            on_event: Told each event as it comes, the terminal one too.
            parameters: Fields of `TextToImageRequest`; what is None is the model's own.

        Raises:
            pydantic.ValidationError: Not within the contract; nothing was sent.
            GenerationError: One of its kinds; see `run`.
        """
        request = TextToImageRequest(prompt=prompt, **_with_id(parameters))
        return await self.run(request, on_event=on_event)

    async def image_to_text(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        *,
        on_event: Callable[[AnyEvent], None] | None = None,
        **parameters: Any,
    ) -> SucceededEvent:
        """Ask something about pictures, and wait for the answer: `result.outputs[0].text`.

        Args:
            prompt: What to ask.
            images: References, `s3://bucket/key`, or pictures in the request itself.
            on_event: Told each event as it comes, the terminal one too.
            parameters: Fields of `ImageToTextRequest`; what is None is the model's own.

        Raises:
            pydantic.ValidationError: Not within the contract; nothing was sent.
            GenerationError: One of its kinds; see `run`.
        """
        request = ImageToTextRequest(prompt=prompt, images=tuple(images), **_with_id(parameters))
        return await self.run(request, on_event=on_event)

    async def run(
        self, request: Request, *, on_event: Callable[[AnyEvent], None] | None = None
    ) -> SucceededEvent:
        """Send a request and wait until it has succeeded.

        Of a chain this is the first step; `result` collects the later ones by their ids.

        Raises:
            QueueFull, RequestTooLarge, ServiceUnavailable: See `submit`.
            RequestIdTaken: The id was used before, for something else.
            RequestFailed, RequestCancelled: It has ended otherwise.
        """
        async with aclosing(self.events(request)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        return _succeeded(event)

    async def events(self, request: Request) -> AsyncGenerator[AnyEvent, None]:
        """Send a request; its events as they come, the terminal one last.

        Of the news before the terminal event some may be lost.

        Raises:
            QueueFull, RequestTooLarge, ServiceUnavailable: See `submit`.
            RequestIdTaken: The id was used before, for something else.
        """
        request = _identified(request)
        task, request_id = task_of(request), str(request.request_id)
        async with self._listening(task, request_id, news=True) as events:
            await self.submit(request)
            async for event in events:
                if isinstance(event, TerminalEvent) and event.request_digest not in _digests(
                    request
                ):
                    raise RequestIdTaken("the id has been used for another request")
                yield event

    # -- ask now, collect later -------------------------------------------------------------------

    async def submit(self, request: Request) -> str:
        """Store a request durably and do not wait for it.

        Returns:
            Its id: its own, or a new one. With it the result can be collected later, also by
            another process; to submit it again is harmless.

        Raises:
            QueueFull: The stream is full.
            RequestTooLarge: The request does not fit.
            InvalidRequest: A step of its slip cannot follow the one before it.
            ServiceUnavailable: No server, or no stream for requests.
        """
        check_slip(request)
        request = _identified(request)
        await submit(self._connected, self._subjects, task_of(request), request)
        return str(request.request_id)

    async def result(
        self, task: Task | str, request_id: str, *, within: float | None = None
    ) -> ResultEvent:
        """The terminal event of a request, whoever sent it; waits until there is one.

        Args:
            task: The request's.
            request_id: Its id.
            within: Seconds; None waits for ever. 0 only looks.

        Raises:
            TimeoutError: None so far.
            ServiceUnavailable: The connection is closed for good.
        """
        task = Task(task)
        async with asyncio.timeout(within or None) as limit:
            if (found := await self._stored(task, request_id)) is not None:
                return found
            if within == 0:
                limit.reschedule(0.0)
            async with self._listening(task, request_id) as events:
                async for event in events:
                    if isinstance(event, TerminalEvent):
                        return event
        raise AssertionError("events end with a terminal one")

    async def cancel(self, request_id: str) -> CancelReply:
        """Cancel a request that is queued or running.

        Returns:
            What there was to cancel; see `CancelReply.status`. With `stopping` the terminal event
            comes when the device is free.

        Raises:
            NoWorker: No worker is there to see to it.
            ServiceUnavailable: It cannot be done now.
        """
        try:
            answer = await self._connected.request(
                self._subjects.cancel(request_id), b"", timeout=CANCEL_WITHIN
            )
            return decode_cancel_reply(answer.data)
        except NoRespondersError:
            raise NoWorker("there is no worker to cancel it") from None
        except (Error, OSError) as error:
            raise ServiceUnavailable(f"NATS: no answer: {type(error).__name__}") from None
        except ValidationError:
            raise ServiceUnavailable("the cancellation was refused") from None

    async def ended(self, request_id: str, *, within: float | None = None) -> str:
        """Wait for the end of a request of either task.

        Returns:
            The type of its terminal event.

        Raises:
            TimeoutError: It has not ended within so many seconds.
        """
        waiting = [asyncio.ensure_future(self.result(task, request_id)) for task in Task]
        try:
            async with asyncio.timeout(within):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result().type
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def download(self, picture: ImageArtifact) -> bytes:
        """A picture's file, compared with its event.

        Raises:
            DownloadFailed: It cannot be fetched, or its bytes are not the ones that were stored.
        """
        import aiohttp  # noqa: PLC0415 - a tenth of a second, for those alone who download

        timeout = aiohttp.ClientTimeout(total=DOWNLOAD_WITHIN)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(picture.url) as response,
            ):
                response.raise_for_status()
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            # The error's own text has the presigned URL in it.
            raise DownloadFailed(f"{picture.key}: {type(error).__name__}") from None
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise DownloadFailed(f"{picture.key}: the bytes are not the ones that were stored")
        return content

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _connected(self) -> Client:
        if self._client is None:
            raise ServiceUnavailable("not connected: use `async with GenerationClient(…)`")
        return self._client

    @asynccontextmanager
    async def _listening(
        self, task: Task, request_id: str, *, news: bool = False
    ) -> AsyncIterator[AsyncIterator[AnyEvent]]:
        """Events of one request, up to and with its terminal one. Listen first, then submit."""
        received: asyncio.Queue[AnyEvent] = asyncio.Queue()

        async def take(message: Msg) -> None:
            try:
                received.put_nowait(decode_event(message.data))
            except ValidationError:
                return  # of a later version, or not ours

        subjects = [self._subjects.result(task, request_id)]
        if news:
            subjects.append(self._subjects.progress(task, request_id))
        client = self._connected
        try:
            listening = [await client.subscribe(subject, cb=take) for subject in subjects]
        except (Error, OSError) as error:
            raise ServiceUnavailable(f"NATS: {type(error).__name__}") from None
        try:
            yield self._heard(task, request_id, received)
        finally:
            if not client.is_closed:
                for subscription in listening:
                    await subscription.unsubscribe()

    async def _heard(
        self, task: Task, request_id: str, received: "asyncio.Queue[AnyEvent]"
    ) -> AsyncIterator[AnyEvent]:
        while not self._connected.is_closed:
            event: AnyEvent | None
            try:
                event = await asyncio.wait_for(received.get(), LOOK_EVERY)
            except TimeoutError:
                event = await self._stored(task, request_id)
            if event is not None:
                yield event
            if isinstance(event, TerminalEvent):
                return
        raise ServiceUnavailable("NATS: the connection is closed")

    async def _stored(self, task: Task, request_id: str) -> ResultEvent | None:
        try:
            found = await asyncio.wait_for(
                self._connected.jetstream().get_last_msg(
                    self._subjects.results_stream,
                    self._subjects.result(task, request_id),
                    direct=True,
                ),
                LOOK_TIMEOUT,
            )
            return decode_result(found.data or b"")
        except (NotFoundError, ValidationError, Error, OSError, TimeoutError):
            return None  # not there, not readable, or not to be reached now: the next look tells


async def _connect(servers: str, options: dict[str, Any]) -> Client:
    settings: dict[str, Any] = {
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": _leave,
        **options,
    }
    try:
        return await asyncio.wait_for(nats.connect(servers.split(","), **settings), CONNECT_WITHIN)
    except (Error, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ServiceUnavailable(f"NATS: cannot connect: {reason}") from None


async def _leave(_: Exception) -> None:
    """What goes wrong with the connection is seen where something is asked of it."""


def _with_id(parameters: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"request_id": new_request_id(), **given}


def _identified(request: Request) -> Request:
    if request.request_id is not None:
        return request
    return request.model_copy(update={"request_id": new_request_id()})


def _digests(request: Request) -> set[str]:
    # What a worker could not read as a request has the digest of its bytes.
    return {request_digest(request), digest_of_bytes(encode(request))}


def _succeeded(event: AnyEvent) -> SucceededEvent:
    match event:
        case SucceededEvent():
            return event
        case FailedEvent():
            raise RequestFailed(event)
        case CancelledEvent():
            raise RequestCancelled(event)
        case _:
            raise AssertionError("events end with a terminal one")
