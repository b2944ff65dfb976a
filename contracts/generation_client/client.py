"""The client: requests as method calls, their events as an iterator, results by id."""

import asyncio
import hashlib
import json
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, Self

import aiohttp
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError
from pydantic import ValidationError

from generation_client.errors import (
    DownloadFailed,
    GenerationError,
    NoWorker,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    ServiceUnavailable,
    UnsupportedMessage,
)
from generation_client.lookup import (
    AnyEvent,
    NoAnswer,
    ResultEvent,
    read_event,
    refusal,
    stored_result,
)
from generation_client.submitting import submit
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    FailedEvent,
    ImageArtifact,
    ImageToTextRequest,
    Request,
    Subjects,
    SucceededEvent,
    Task,
    TerminalEvent,
    TextToImageRequest,
    check_slip,
    decode_cancel_reply,
    encode,
    request_digest,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.requests import digest_of_bytes
from generation_contracts.servers import parse_servers

CONNECT_WITHIN = 30.0  # seconds; nats-py itself would try a failing TLS handshake for ever
LOOK_EVERY = 2.0  # seconds; a result whose announcement was missed is found in the stream
MAX_OUTAGE = 120.0  # seconds
CANCEL_WITHIN = 10.0  # seconds for the answer to a cancellation
DOWNLOAD_WITHIN = 60.0  # seconds for one output


def new_request_id() -> str:
    """An id of its own for each request."""
    return uuid.uuid4().hex


def task_of(request: Request) -> Task:
    """The task that a request belongs to."""
    return Task.TEXT_TO_IMAGE if isinstance(request, TextToImageRequest) else Task.IMAGE_TO_TEXT


class GenerationClient:
    """Sends requests and collects what becomes of them; an asynchronous context manager.

    Whatever it waits for survives a lost connection: it connects again, and a result that was
    published meanwhile is found in the stream. After `max_outage` the waiting call raises; the
    client still connects again, and the result can be collected later.

    Args:
        server: URLs, comma-separated, or a connected nats-py client, which is left open. The user
            and the password in a URL are percent-encoded: `nats://app:p%40ss@host:4222`.
        root: The installation's subject root.
        max_outage: Seconds without an answer of the results stream after which a call that waits
            for a result raises ServiceUnavailable; None never does.
        options: For `nats.connect`: user_credentials, nkeys_seed, tls, …
    """

    def __init__(
        self,
        server: str | Client = "nats://127.0.0.1:4222",
        *,
        root: str = "generation",
        max_outage: float | None = MAX_OUTAGE,
        **options: Any,
    ) -> None:
        self._server = server
        self._subjects = Subjects(root)
        self._max_outage = max_outage
        self._options = options
        self._secret = secrets.token_bytes(32)  # of the ids that requests are deduplicated by
        self._parts = AsyncExitStack()
        self._client: Client | None = server if isinstance(server, Client) else None

    async def __aenter__(self) -> Self:
        if not isinstance(self._server, Client):
            self._client = await _connect(self._server, self._options)
            self._parts.push_async_callback(_close, self._client)
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
            UnsupportedMessage: Its result is of a later version of the contract.
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
            UnsupportedMessage: Its result is of a later version of the contract. News of a later
                version are skipped.
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
            another process. To submit it again is harmless: this client's second submit is not
            stored, and one of another client is answered and not run.

        Raises:
            QueueFull: The stream is full.
            RequestTooLarge: The request does not fit.
            InvalidRequest: A step of its slip cannot follow the one before it.
            ServiceUnavailable: No server, or no stream for requests.
        """
        check_slip(request)
        request = _identified(request)
        client, task = self._connected, task_of(request)
        await submit(client, self._subjects, task, request, secret=self._secret)
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
            ServiceUnavailable: The results cannot be read: no stream, no permission, the connection
                is closed for good or was lost for longer than `max_outage`.
            UnsupportedMessage: The result is of a later version of the contract.
        """
        task = Task(task)
        if within == 0:
            return await self._only_look(task, request_id)
        async with asyncio.timeout(within):
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
            UnsupportedMessage: The answer is of a later version of the contract.
        """
        subject = self._subjects.cancel(request_id)
        try:
            answer = await self._connected.request(subject, b"", timeout=CANCEL_WITHIN)
        except NoRespondersError:
            raise NoWorker("there is no worker to cancel it") from None
        except (Error, OSError) as error:
            reason = refusal(self._connected, subject) or f"NATS: no answer: {type(error).__name__}"
            raise ServiceUnavailable(reason) from None
        try:
            return decode_cancel_reply(answer.data)
        except ValidationError:
            raise _refused_or_newer(answer.data) from None

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
        url, headers = self._address(picture)
        timeout = aiohttp.ClientTimeout(total=DOWNLOAD_WITHIN)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, headers=headers) as response,
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

    def _address(self, picture: ImageArtifact) -> tuple[str, dict[str, str]]:
        """Return where a file is read, and with which headers."""
        return picture.url, {}

    @property
    def _connected(self) -> Client:
        if self._client is None:
            raise ServiceUnavailable("not connected: use `async with GenerationClient(…)`")
        return self._client

    async def _only_look(self, task: Task, request_id: str) -> ResultEvent:
        try:
            found = await stored_result(self._connected, self._subjects, task, request_id)
        except NoAnswer as error:
            raise ServiceUnavailable(f"NATS: {error}") from None
        if found is None:
            raise TimeoutError
        return found

    @asynccontextmanager
    async def _listening(
        self, task: Task, request_id: str, *, news: bool = False
    ) -> AsyncIterator[AsyncIterator[AnyEvent]]:
        """Events of one request, up to and with its terminal one. Listen first, then submit."""
        received: asyncio.Queue[AnyEvent | UnsupportedMessage] = asyncio.Queue()

        async def take_result(message: Msg) -> None:
            try:
                event = read_event(message.data, task, request_id)
            except UnsupportedMessage as newer:
                received.put_nowait(newer)
                return
            if isinstance(event, TerminalEvent):
                received.put_nowait(event)

        async def take_news(message: Msg) -> None:
            with suppress(UnsupportedMessage):  # the result does not depend on it
                event = read_event(message.data, task, request_id)
                if event is not None and not isinstance(event, TerminalEvent):
                    received.put_nowait(event)

        # The result last: the connection keeps the last refusal only, and news may be forbidden.
        subjects = [(self._subjects.progress(task, request_id), take_news)] if news else []
        subjects.append((self._subjects.result(task, request_id), take_result))
        client = self._connected
        try:
            listening = [await client.subscribe(subject, cb=take) for subject, take in subjects]
        except (Error, OSError) as error:
            raise ServiceUnavailable(f"NATS: {type(error).__name__}") from None
        try:
            # A request that is sent now has no result yet.
            yield self._heard(task, request_id, received, wait=LOOK_EVERY if news else 0.0)
        finally:
            if not client.is_closed:
                for subscription in listening:
                    await subscription.unsubscribe()

    async def _heard(
        self,
        task: Task,
        request_id: str,
        received: "asyncio.Queue[AnyEvent | UnsupportedMessage]",
        *,
        wait: float,
    ) -> AsyncIterator[AnyEvent]:
        client, now = self._connected, asyncio.get_running_loop().time
        answered = now()
        while not client.is_closed:
            event: AnyEvent | UnsupportedMessage | None = None
            try:
                event = await asyncio.wait_for(received.get(), wait)
            except TimeoutError:
                try:
                    event = await stored_result(client, self._subjects, task, request_id)
                    answered = now()
                except NoAnswer as error:
                    if self._max_outage is not None and now() - answered > self._max_outage:
                        raise ServiceUnavailable(f"NATS: {error}") from None
            if isinstance(event, UnsupportedMessage):
                raise event
            if event is not None:
                yield event
            if isinstance(event, TerminalEvent):
                return
            if reason := refusal(client, self._subjects.result(task, request_id)):
                raise ServiceUnavailable(reason)
            wait = LOOK_EVERY
        raise ServiceUnavailable("NATS: the connection is closed")


async def _connect(servers: str, options: dict[str, Any]) -> Client:
    try:
        named = parse_servers(servers)
    except ValueError as error:
        raise ServiceUnavailable(f"NATS: cannot connect: {error}") from None
    settings: dict[str, Any] = {
        **named.credentials,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": _leave,
        **options,
    }
    try:
        return await asyncio.wait_for(nats.connect(list(named.urls), **settings), CONNECT_WITHIN)
    except (Error, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ServiceUnavailable(f"NATS: cannot connect: {reason}") from None


async def _close(client: Client) -> None:
    with suppress(OSError):  # nats-py writes what is left, also where the connection is lost
        await client.close()


async def _leave(_: Exception) -> None:
    """What goes wrong with the connection is seen where something is asked of it."""


def _with_id(parameters: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"request_id": new_request_id(), **given}


def _identified(request: Request) -> Request:
    if request.request_id is not None:
        return request
    return request.model_copy(update={"request_id": new_request_id()})


def _refused_or_newer(body: bytes) -> GenerationError:
    """What the answer to a cancellation means that is no `CancelReply` of this version."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        value = None
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        return ServiceUnavailable(f"the cancellation was refused: {error.get('description')}")
    if isinstance(value, dict) and "status" in value:
        return UnsupportedMessage("CancelReply", body, "status")
    return ServiceUnavailable("the cancellation was not answered by a worker")


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
