"""`GenerationClient`: sends requests, iterates over their events, and reads results by id."""

import asyncio
import hashlib
import json
import os
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, Self, TypeVar

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
    RequestInvalid,
    ServiceUnavailable,
    UnsupportedMessage,
    UploadFailed,
)
from generation_client.images import Images, each_image, fitted, inline, media_type, read_file
from generation_client.lookup import (
    AnyEvent,
    ResultEvent,
    ResultsUnreadable,
    read_event,
    refusal,
    stored_result,
)
from generation_client.queue_list import STREAM_LIST, QueuesUnreadable, list_queues
from generation_client.submitting import MAX_REQUEST, submit
from generation_client.uploading import post_form
from generation_contracts import (
    TASKS,
    ArtifactReference,
    CancelledEvent,
    CancelReply,
    FailedEvent,
    InvalidRequest,
    Request,
    StoredArtifact,
    Subjects,
    SucceededEvent,
    Task,
    TerminalEvent,
    UploadRequest,
    check_routing_slip,
    decode_cancel_reply,
    decode_upload_reply,
    encode,
    request_digest,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import QueueInfo, queue_for, why_no_queue
from generation_contracts.requests import digest_of_bytes
from generation_contracts.servers import parse_servers

CONNECT_TIMEOUT = 5.0  # seconds; nats-py repeats a failing attempt without limit
LOOKUP_INTERVAL = 2.0  # seconds; a result whose message was missed is found in the stream
MAX_OUTAGE = 120.0  # seconds
ENDPOINT_TIMEOUT = 10.0  # seconds for the reply to a cancellation or an upload request
HEADERS_SIZE = 512  # bytes; more than the headers of a request
DOWNLOAD_TIMEOUT = 60.0  # seconds for one output


R = TypeVar("R", bound=Request)
_UPLOADED = "s3://uploads/not-yet"  # in a request: the place of a file that is not uploaded yet


def new_request_id() -> str:
    """Return a random request id."""
    return uuid.uuid4().hex


def task_of(request: Request) -> Task:
    """Return the task of a request."""
    return request.task


class GenerationClient:
    """Sends requests and reads their results; an asynchronous context manager.

    A waiting call survives a lost connection: the client reconnects, and finds a result that was
    published meanwhile in the results stream. After `max_outage` the call raises. The client
    continues to reconnect, and the result can be read later.

    Args:
        server: Comma-separated URLs, or a connected nats-py client, which is not closed. The user
            and the password in a URL are percent-encoded: `nats://app:p%40ss@host:4222`.
        root: Subject root of the installation.
        max_outage: Seconds without a reply of the results stream after which a waiting call raises
            ServiceUnavailable; None: no limit.
        options: Options of `nats.connect`: user_credentials, nkeys_seed, tls, …
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
        self._secret = secrets.token_bytes(32)  # see `message_id`
        self._parts = AsyncExitStack()
        self._client: Client | None = server if isinstance(server, Client) else None

    async def __aenter__(self) -> Self:
        if not isinstance(self._server, Client):
            self._client = await _connect(self._server, self._options)
            self._parts.push_async_callback(_close, self._client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    # -- submit and wait --------------------------------------------------------------------------

    async def text_to_image(
        self,
        prompt: str,
        *,
        on_event: Callable[[AnyEvent], None] | None = None,
        **parameters: Any,
    ) -> SucceededEvent:
        """Generate images from a prompt, and wait for the result.

        Args:
            prompt: Description of the image.
            on_event: Called with each event, including the terminal event.
            parameters: `queue` of `generate`, and fields of `TextToImageRequest`. None means the
                default of the model.

        Raises:
            RequestInvalid: The request is invalid; it was not sent.
            GenerationError: See `run` for its subclasses.
        """
        task = Task.TEXT_TO_IMAGE
        return await self.generate(task, on_event=on_event, prompt=prompt, **parameters)

    async def image_to_text(
        self,
        prompt: str,
        images: Images,
        *,
        upload: bool = False,
        on_event: Callable[[AnyEvent], None] | None = None,
        **parameters: Any,
    ) -> SucceededEvent:
        """Ask a question about images, and wait for the text: `result.outputs[0].text`.

        Args:
            prompt: The question or instruction.
            images: One image or a sequence: bytes or the path of a PNG, JPEG or WebP file, an image
                of Pillow, a result or one of its outputs, a reference, or an `s3://bucket/key` URI.
            upload: Upload the files with all their pixels; see `with_images`.
            on_event: Called with each event, including the terminal event.
            parameters: `queue` of `generate`, and fields of `ImageToTextRequest`. None means the
                default of the model.

        Raises:
            RequestInvalid: The request is invalid, or a file cannot be read; it was not sent.
            UploadFailed, NoWorker: A file was too large for the request and not uploaded.
            GenerationError: See `run` for its subclasses.
        """
        return await self.generate(
            Task.IMAGE_TO_TEXT,
            images=images,
            upload=upload,
            on_event=on_event,
            prompt=prompt,
            **parameters,
        )

    async def generate(
        self,
        task: Task,
        *,
        images: Images | None = None,
        upload: bool = False,
        queue: str | None = None,
        on_event: Callable[[AnyEvent], None] | None = None,
        **fields: Any,
    ) -> SucceededEvent:
        """Send a request of any task, and wait for the result.

        Args:
            task: The task.
            images: The input images, if the task has any; see `image_to_text`.
            upload: Upload the files with all their pixels; see `with_images`.
            queue: See `run`.
            on_event: Called with each event, including the terminal event.
            fields: The other fields of the task's request. None means the default of the model.

        Raises:
            RequestInvalid: The request is invalid, or a file cannot be read; it was not sent.
            UploadFailed, NoWorker: A file was too large for the request and not uploaded.
            GenerationError: See `run` for its subclasses.
        """
        if images is not None:
            fields["images"] = (_UPLOADED,)
        request = _checked(TASKS[task].request, **_with_id(fields))
        if images is not None:
            request = await self.with_images(request, images, upload=upload)
        return await self.run(request, queue=queue, on_event=on_event)

    async def with_images(self, request: R, images: Images, *, upload: bool = False) -> R:
        """Return a copy of a request with other images, which fits the limits of NATS.

        Files that fit are sent inside the request, unchanged. If they do not fit, the largest ones
        are scaled to the number of pixels that workers use (this needs the extra `images`). Files
        that still do not fit are uploaded.

        Args:
            request: Its `images` are replaced.
            images: See `image_to_text`.
            upload: Upload all files unchanged instead.

        Raises:
            RequestInvalid: A file cannot be read, or an image is against the contract.
            UploadFailed, NoWorker, ServiceUnavailable: See `upload`.
        """
        given = await asyncio.to_thread(lambda: list(each_image(images)))
        sources = [_UPLOADED if isinstance(image, bytes) else image for image in given]
        fields = {**dict(request), "images": tuple(sources)}
        checked = _checked(type(request), **fields)
        files = {number: image for number, image in enumerate(given) if isinstance(image, bytes)}
        limit = min(self._connected.max_payload, MAX_REQUEST) - HEADERS_SIZE
        room = -1 if upload else limit - len(encode(checked))
        final: list[ImageSource] = [
            source
            for place, source in TASKS[request.task].sources(checked)
            if place.startswith("images.")
        ]
        for number, file in (await asyncio.to_thread(fitted, files, room)).items():
            if file is not None:
                final[number] = inline(file)
        for number, image in enumerate(final):
            if number in files and image == _UPLOADED:
                final[number] = await self.upload(files[number])
        return checked.model_copy(update={"images": tuple(final)})

    async def upload(self, file: bytes | os.PathLike[str]) -> ArtifactReference:
        """Upload an image file to the object store, without credentials of the store.

        A worker signs a form that accepts this one file for ten minutes. The store deletes the file
        after a day, if `consumer apply` could set that rule.

        Returns:
            The reference to use as an input image.

        Raises:
            RequestInvalid: The file cannot be read, or is not a PNG, JPEG or WebP file.
            UploadFailed: The worker or the store refuses the file, or the store is away.
            NoWorker: No worker is running.
            ServiceUnavailable: NATS or the worker cannot process the upload now.
        """
        data = file if isinstance(file, bytes) else await asyncio.to_thread(read_file, file)
        wanted = UploadRequest(size=max(1, len(data)), media_type=media_type(data))
        subject = self._subjects.upload
        reply = await self._request(subject, encode(wanted), what="sign the upload")
        try:
            form = decode_upload_reply(reply)
        except ValidationError:
            raise _upload_error(reply) from None
        await post_form(form, data, wanted.media_type)
        return ArtifactReference(bucket=form.bucket, key=form.key)

    async def run(
        self,
        request: Request,
        *,
        queue: str | None = None,
        on_event: Callable[[AnyEvent], None] | None = None,
    ) -> SucceededEvent:
        """Send a request and wait until it has succeeded.

        For a chain, this waits for the first step. Read the later steps with `result`.

        Args:
            request: The request; without an id it gets a new one.
            queue: The queue; None: the queue of the request's `model`, see `queue_for`.
            on_event: Called with each event, including the terminal event.

        Raises:
            QueueFull, RequestTooLarge, ServiceUnavailable: See `submit`.
            RequestIdTaken: The id belongs to another request.
            RequestFailed, RequestCancelled: The request has failed or was cancelled.
            UnsupportedMessage: The result has a later version of the contract.
        """
        async with aclosing(self.events(request, queue=queue)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        return _succeeded(event)

    async def events(
        self,
        request: Request,
        *,
        queue: str | None = None,
        on_stored: Callable[[], None] | None = None,
    ) -> AsyncGenerator[AnyEvent, None]:
        """Send a request and yield its events, the terminal event last.

        `started` and `progress` events may be lost.

        Args:
            request: The request; without an id it gets a new one.
            queue: See `run`.
            on_stored: Called when the request is stored in the queue.

        Raises:
            QueueFull, RequestTooLarge, ServiceUnavailable: See `submit`.
            RequestIdTaken: The id belongs to another request.
            UnsupportedMessage: The result has a later version of the contract. `started` and
                `progress` events of a later version are skipped.
        """
        request = _identified(request)
        queue, request_id = queue or await self.queue_for(request), str(request.request_id)
        async with self._subscribed(queue, request_id, progress=True) as events:
            await self.submit(request, queue=queue)
            if on_stored is not None:
                on_stored()
            async for event in events:
                if isinstance(event, TerminalEvent) and event.request_digest not in _digests(
                    request
                ):
                    raise RequestIdTaken(
                        f"the id {request_id} belongs to another request; this one needs a new id"
                    )
                yield event

    # -- submit now, read the result later --------------------------------------------------------

    async def submit(self, request: Request, *, queue: str | None = None) -> str:
        """Store a request in the request stream, without waiting for its result.

        Repeating the call is safe. A second submit by this client is not stored. A second submit by
        another client gets a reply and does not run.

        Args:
            request: The request; without an id it gets a new one.
            queue: See `run`.

        Returns:
            The request id, newly generated if the request has none. Any process can read the result
            with it.

        Raises:
            QueueFull: The stream is full.
            RequestTooLarge: The request exceeds a limit of the server or the stream.
            RequestInvalid: A step of the routing slip cannot follow the previous step.
            ServiceUnavailable: No server, or no request stream.
        """
        try:
            check_routing_slip(request)
        except InvalidRequest as error:
            raise RequestInvalid.of(error) from None
        request = _identified(request)
        queue = queue or await self.queue_for(request)
        await submit(self._connected, self._subjects, queue, request, secret=self._secret)
        return str(request.request_id)

    async def queues(self) -> tuple[QueueInfo, ...]:
        """List the queues: their names, tasks and models. This needs no worker.

        Raises:
            ServiceUnavailable: No server, or this user may not list the streams.
        """
        try:
            found = await list_queues(self._list_request, self._subjects)
        except (Error, OSError, QueuesUnreadable) as error:
            reason = refusal(self._connected, STREAM_LIST) or f"NATS: no list of queues: {error}"
            raise ServiceUnavailable(reason) from None
        return tuple(found.values())

    async def queue_for(self, request: Request) -> str:
        """Return the name of the queue for the model of a request.

        Without `model`, this is the default queue of the task and the server is not asked. A task
        without a default queue needs `model`, unless it has one queue only.

        Raises:
            RequestInvalid: No queue serves this model.
            ServiceUnavailable: See `queues`.
        """
        if request.model is None and request.task in DEFAULT_QUEUES:
            return str(request.task)
        found = queue_for(request.model, request.task, await self.queues())
        if found is None:
            problem = why_no_queue(request.model, request.task)
            raise RequestInvalid(f"model: {problem}", ({"field": "model", "problem": problem},))
        return found.name

    async def result(
        self, queue: str, request_id: str, *, within: float | None = None
    ) -> ResultEvent:
        """Wait for the terminal event of a request of any sender.

        Args:
            queue: Queue of the request; the default queue of a task has the name of the task.
            request_id: Id of the request.
            within: Seconds to wait; None: no limit; 0: return or raise at once.

        Raises:
            TimeoutError: The request has not ended within this time.
            ServiceUnavailable: The results cannot be read: no stream, no permission, a closed
                connection, or an outage of more than `max_outage`.
            UnsupportedMessage: The result has a later version of the contract.
        """
        if within == 0:
            return await self._stored_now(queue, request_id)
        async with asyncio.timeout(within):
            async with self._subscribed(queue, request_id) as events:
                async for event in events:
                    if isinstance(event, TerminalEvent):
                        return event
        raise AssertionError("the last event is not terminal")

    async def cancel(self, request_id: str) -> CancelReply:
        """Cancel a request that is queued or in progress.

        Returns:
            The reply; see `CancelReply.status`. With `stopping`, the terminal event follows when
            the device is free.

        Raises:
            NoWorker: No worker is running.
            ServiceUnavailable: NATS or the worker cannot process the cancellation now.
            UnsupportedMessage: The reply has a later version of the contract.
        """
        subject = self._subjects.cancel(request_id)
        reply = await self._request(subject, b"", what="cancel the request")
        try:
            return decode_cancel_reply(reply)
        except ValidationError:
            raise _cancel_error(reply) from None

    async def ended(self, request_id: str, *, within: float | None = None) -> str:
        """Wait for the end of a request of an unknown queue.

        If this user may not list the queues, only the default queues are searched.

        Args:
            request_id: Id of the request.
            within: Seconds to wait; None: no limit.

        Returns:
            The type of the terminal event.

        Raises:
            TimeoutError: The request has not ended within this time.
            ServiceUnavailable, UnsupportedMessage: See `result`.
        """
        try:
            names = [queue.name for queue in await self.queues()]
        except ServiceUnavailable:
            names = [str(task) for task in Task]
        waiting = [asyncio.ensure_future(self.result(name, request_id)) for name in names]
        try:
            async with asyncio.timeout(within):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result().type
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def download(self, artifact: StoredArtifact) -> bytes:
        """Fetch the file of an output and verify its digest.

        Raises:
            DownloadFailed: The file cannot be fetched, or its bytes differ from the stored bytes.
        """
        url, headers = self._address(artifact)
        timeout = aiohttp.ClientTimeout(total=DOWNLOAD_TIMEOUT)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, headers=headers) as response,
            ):
                response.raise_for_status()
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            # The text of the error contains the presigned URL.
            raise DownloadFailed(f"{artifact.key}: {type(error).__name__}") from None
        if hashlib.sha256(content).hexdigest() != artifact.sha256:
            raise DownloadFailed(f"{artifact.key}: the bytes differ from the stored bytes")
        return content

    # -- internals --------------------------------------------------------------------------------

    def _address(self, artifact: StoredArtifact) -> tuple[str, dict[str, str]]:
        """Return the URL of a file, and the headers of the HTTP request."""
        return artifact.url, {}

    @property
    def _connected(self) -> Client:
        if self._client is None:
            raise ServiceUnavailable("not connected: use `async with GenerationClient(…)`")
        return self._client

    async def _list_request(self, subject: str, body: bytes) -> bytes:
        reply = await self._connected.request(subject, body, timeout=ENDPOINT_TIMEOUT)
        return reply.data

    async def _request(self, subject: str, body: bytes, *, what: str) -> bytes:
        """Send a message to an endpoint of the workers, and return the body of the reply."""
        try:
            reply = await self._connected.request(subject, body, timeout=ENDPOINT_TIMEOUT)
        except NoRespondersError:
            raise NoWorker(f"no worker is running that could {what}") from None
        except (Error, OSError) as error:
            reason = refusal(self._connected, subject) or f"NATS: no answer: {type(error).__name__}"
            raise ServiceUnavailable(reason) from None
        return reply.data

    async def _stored_now(self, queue: str, request_id: str) -> ResultEvent:
        try:
            event = await stored_result(self._connected, self._subjects, queue, request_id)
        except ResultsUnreadable as error:
            raise ServiceUnavailable(f"NATS: {error}") from None
        if event is None:
            raise TimeoutError
        return event

    @asynccontextmanager
    async def _subscribed(
        self, queue: str, request_id: str, *, progress: bool = False
    ) -> AsyncIterator[AsyncIterator[AnyEvent]]:
        """Subscribe to the events of a request; the iterator ends with the terminal event.

        Subscribe before the request is submitted, so that no event is missed.
        """
        received: asyncio.Queue[AnyEvent | UnsupportedMessage] = asyncio.Queue()

        async def take_result(message: Msg) -> None:
            try:
                event = read_event(message.data, queue, request_id)
            except UnsupportedMessage as newer:
                received.put_nowait(newer)
                return
            if isinstance(event, TerminalEvent):
                received.put_nowait(event)

        async def take_progress(message: Msg) -> None:
            with suppress(UnsupportedMessage):  # not needed for the result
                event = read_event(message.data, queue, request_id)
                if event is not None and not isinstance(event, TerminalEvent):
                    received.put_nowait(event)

        # The result subject is last: nats-py stores only the last refused permission, and the
        # permission for progress is optional.
        progress_subject = self._subjects.progress(queue, request_id)
        subjects = [(progress_subject, take_progress)] if progress else []
        subjects.append((self._subjects.result(queue, request_id), take_result))
        client = self._connected
        try:
            subscriptions = [await client.subscribe(subject, cb=take) for subject, take in subjects]
        except (Error, OSError) as error:
            raise ServiceUnavailable(f"NATS: {type(error).__name__}") from None
        try:
            # `progress` is for a request that is submitted next, which has no result yet.
            first_wait = LOOKUP_INTERVAL if progress else 0.0
            yield self._received(queue, request_id, received, wait=first_wait)
        finally:
            if not client.is_closed:
                for subscription in subscriptions:
                    await subscription.unsubscribe()

    async def _received(
        self,
        queue: str,
        request_id: str,
        received: "asyncio.Queue[AnyEvent | UnsupportedMessage]",
        *,
        wait: float,
    ) -> AsyncIterator[AnyEvent]:
        client, now = self._connected, asyncio.get_running_loop().time
        last_reply = now()
        while not client.is_closed:
            event: AnyEvent | UnsupportedMessage | None = None
            cancellations = _cancellations()
            try:
                event = await asyncio.wait_for(received.get(), wait)
            except TimeoutError:
                try:
                    event = await stored_result(client, self._subjects, queue, request_id)
                    last_reply = now()
                except ResultsUnreadable as error:
                    if self._max_outage is not None and now() - last_reply > self._max_outage:
                        raise ServiceUnavailable(f"NATS: {error}") from None
            if _cancellations() > cancellations:
                # Until Python 3.12, asyncio.wait_for drops a cancellation that arrives at the same
                # time as its result (python/cpython#86296). nats-py uses it for each request.
                raise asyncio.CancelledError
            if isinstance(event, UnsupportedMessage):
                raise event
            if event is not None:
                yield event
            if isinstance(event, TerminalEvent):
                return
            if reason := refusal(client, self._subjects.result(queue, request_id)):
                raise ServiceUnavailable(reason)
            wait = LOOKUP_INTERVAL
        raise ServiceUnavailable("NATS: the connection is closed")


def _cancellations() -> int:
    """Return how many cancellations of the current task were requested and not withdrawn."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


async def _connect(servers: str, options: dict[str, Any]) -> Client:
    try:
        named = parse_servers(servers)
    except ValueError as error:
        raise ServiceUnavailable(f"NATS: cannot connect: {error}") from None
    last: list[Exception] = []  # the newest error; nats-py repeats without a limit, and forgets it

    async def note(error: Exception) -> None:
        last[:] = [error]

    settings: dict[str, Any] = {
        **named.credentials,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": note,
        **options,
    }
    try:
        return await asyncio.wait_for(nats.connect(list(named.urls), **settings), CONNECT_TIMEOUT)
    except (Error, OSError, TimeoutError) as error:
        cause = last[0] if last and isinstance(error, TimeoutError) else error
        reason = str(cause) or type(cause).__name__
        raise ServiceUnavailable(
            f"NATS: cannot connect to {', '.join(named.urls)}: {reason}"
        ) from None


async def _close(client: Client) -> None:
    with suppress(OSError):  # nats-py flushes its buffer, even if the connection is lost
        await client.close()


def _with_id(parameters: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"request_id": new_request_id(), **given}


def _identified(request: Request) -> Request:
    if request.request_id is not None:
        return request
    return request.model_copy(update={"request_id": new_request_id()})


def _checked(kind: type[R], /, **fields: Any) -> R:
    try:
        return kind(**fields)
    except ValidationError as error:
        raise RequestInvalid.of(error) from None


def _service_error(body: bytes) -> tuple[Any, str | None]:
    """Return the JSON of a reply, and its description if it is a service error."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return None, None
    error = value.get("error") if isinstance(value, dict) else None
    return value, str(error.get("description")) if isinstance(error, dict) else None


def _upload_error(body: bytes) -> GenerationError:
    """Return the exception for a reply that is not an `UploadReply` of this version."""
    value, description = _service_error(body)
    if description is not None:
        return UploadFailed(f"the upload was refused: {description}")
    if isinstance(value, dict) and "url" in value:
        return UnsupportedMessage("UploadReply", body)
    return ServiceUnavailable("the reply to the upload request is not from a worker")


def _cancel_error(body: bytes) -> GenerationError:
    """Return the exception for a reply that is not a `CancelReply` of this version."""
    value, description = _service_error(body)
    if description is not None:
        return ServiceUnavailable(f"the cancellation was refused: {description}")
    if isinstance(value, dict) and "status" in value:
        return UnsupportedMessage("CancelReply", body, "status")
    return ServiceUnavailable("the reply to the cancellation is not from a worker")


def _digests(request: Request) -> set[str]:
    # A request that the worker could not decode has the digest of its bytes.
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
            raise AssertionError("the last event is not terminal")
