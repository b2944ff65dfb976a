"""One worker on a real nats-server and a real S3 server, for `tests.support.behaviour`.

The worker connects through relays, so that a test can cut one worker off from one service. The
sender uses direct connections and none of the project's code. The model is scripted; every other
part is the one that the daemon uses.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from io import BytesIO
from typing import Any, Self
from uuid import uuid4

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.errors import NotFoundError
from PIL import Image

from consumer.app.composition import make_topology
from consumer.artifacts import ObjectStoreArtifacts, StoreConfig, store_config
from consumer.background_tasks import cancel_and_wait
from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import connect
from consumer.bus.delivery import DeliveryContext
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.bus.retries import RetryMover
from consumer.devstack import DevStack
from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.jobs.admission import Admission
from consumer.jobs.executor import Executor, Limits
from consumer.media.codec import ImageCodec
from consumer.ports.bus import DeadLetter, ResultEvent
from consumer.ports.media import EncodedImage
from consumer.ports.store import StoreUnavailable
from consumer.ports.telemetry import Observer
from consumer.settings import Settings
from generation_contracts import (
    ImageArtifact,
    ProgressEvent,
    StartedEvent,
    Subjects,
    Task,
    decode_event,
    decode_result,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.headers import (
    DEAD_LETTER_CODE,
    DEAD_LETTER_REASON,
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_WORKER,
)
from tests.support.memory_ports import MemoryObserver, ScriptedRunner, Tally
from tests.support.plain_s3 import plain_s3_client

CHUNK = 65_536  # bytes
CONNECT_WITHIN = 10.0  # seconds; only bounds a wait for something that must happen
LONG = 3_600.0  # seconds; longer than any test
# The adapter gives up early, so that the tests cover the retries of the executor.
STORE_DEADLINE = 0.2  # seconds for all attempts of one operation
STORE_PAUSE = 0.005  # seconds


class Relay:
    """Relays connections to a server; during an outage it aborts all connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_down = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.begin()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def address(self) -> str:
        """The host and the port that clients connect to."""
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def begin(self) -> None:
        """Begin an outage."""
        self._is_down = True
        for writer in self._writers:
            writer.transport.abort()

    def end(self) -> None:
        """End the outage."""
        self._is_down = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_down:
            writer.transport.abort()
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, server_writer), (server_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._writers.add(sink)
        with suppress(ConnectionError):
            while data := await source.read(CHUNK):
                sink.write(data)
                await sink.drain()
        self._writers.remove(sink)
        sink.close()


class CountingArtifacts(ObjectStoreArtifacts):
    """The store's adapter, which counts the operations that failed after all attempts."""

    def __init__(self, config: StoreConfig, *, observer: Observer) -> None:
        super().__init__(config, observer=observer)
        self.misses = Tally()

    async def store(
        self, task: Task, request_id: str, index: int, image: EncodedImage
    ) -> ImageArtifact:
        try:
            return await super().store(task, request_id, index, image)
        except StoreUnavailable:
            self.misses.add()
            raise

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        try:
            return await super().fetch(source, max_bytes=max_bytes)
        except StoreUnavailable:
            self.misses.add()
            raise


class Sender:
    """A sender of requests, with plain nats-py and MinIO clients."""

    def __init__(self, servers: DevStack, subjects: Subjects) -> None:
        self._servers = servers
        self._subjects = subjects
        self._client: Client
        self._subscriptions: dict[str, Subscription] = {}
        self._received: dict[str, list[Msg]] = {"replies": [], "news": []}

    async def open(self, parts: AsyncExitStack) -> None:
        """Connect and subscribe; `parts` deletes the streams at the end."""
        self._client = await nats.connect(self._servers.nats.url)
        parts.push_async_callback(self._client.close)
        parts.push_async_callback(self._delete_streams)
        for what, subject in (
            ("replies", "_INBOX.sender.*"),
            ("news", f"{self._subjects.root}.progress.>"),
        ):
            self._subscriptions[what] = await self._client.subscribe(subject)
        await self._client.flush()  # nats-py may send the first PING before the SUBs
        await self._client.flush()

    async def publish(self, subject: str, body: bytes, headers: dict[str, str] | None) -> None:
        await self._client.jetstream().publish(subject, body, headers=headers)

    async def received(self, what: str) -> list[Msg]:
        """Return all messages that a subscription has received."""
        await self._client.flush()  # the server sends its PONG after all earlier messages
        subscription, received = self._subscriptions[what], self._received[what]
        while subscription.pending_msgs:
            received.append(await subscription.next_msg())
        return received

    async def last(self, stream: str, subject: str) -> bytes | None:
        """Return the stored message of a subject."""
        try:
            found = await self._client.jetstream().get_last_msg(stream, subject)
        except NotFoundError:
            return None
        return found.data or b""

    async def count(self, stream: str) -> int:
        info = await self._client.jetstream().stream_info(stream)
        return int(info.state.messages)

    async def dead_letters(self) -> list[tuple[DeadLetter, bytes]]:
        jetstream, stream = self._client.jetstream(), self._subjects.dead_letters_stream
        found = []
        for sequence in range(1, await self.count(stream) + 1):
            message = await jetstream.get_msg(stream, sequence)
            headers = message.headers or {}
            letter = DeadLetter(
                code=headers[DEAD_LETTER_CODE],
                reason=headers[DEAD_LETTER_REASON],
                request_id=headers[DEAD_LETTER_REQUEST_ID],
                worker=headers[DEAD_LETTER_WORKER],
            )
            found.append((letter, message.data or b""))
        return found

    def put_object(self, bucket: str, key: str, data: bytes) -> None:
        plain_s3_client(self._servers.store).put_object(bucket, key, BytesIO(data), len(data))

    def get_object(self, bucket: str, key: str) -> bytes:
        response = plain_s3_client(self._servers.store).get_object(bucket, key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    def keys(self, bucket: str, prefix: str) -> set[str]:
        objects = plain_s3_client(self._servers.store).list_objects(
            bucket, prefix=prefix, recursive=True
        )
        return {found.object_name or "" for found in objects}

    async def _delete_streams(self) -> None:
        # Each set of streams reserves gigabytes of the server's storage.
        jetstream = self._client.jetstream()
        for stream in await jetstream.streams_info():
            if str(stream.config.name).startswith(f"{self._subjects.root.upper()}_"):
                await jetstream.delete_stream(str(stream.config.name))


def _image_file() -> bytes:
    """Return a PNG file of 4x4 pixels."""
    return ImageCodec().encode(Image.new("RGB", (4, 4)), "png", seed=0).data


class RealWorld:
    """Implements `tests.support.behaviour.World`, with a separate subject root on shared servers.

    Attributes:
        store: The relay in front of the S3 server.
        bus: The relay in front of the nats-server.
    """

    image_file = _image_file()

    def __init__(self, servers: DevStack, task: Task, store: Relay, bus: Relay) -> None:
        root = f"t{uuid4().hex[:8]}"
        values: dict[str, Any] = {name.lower(): v for name, v in servers.environment().items()}
        values |= {"nats_url": f"nats://{bus.address}", "s3_endpoint": f"http://{store.address}"}
        values |= {"consumer_subject_root": root, "s3_prefix": root, "model_type": task}
        self._settings = Settings(**values)
        self._task = task
        self._subjects = self._settings.subjects
        self._sender = Sender(servers, self._subjects)
        self._pull: PullLoop
        self.store = store
        self.bus = bus
        self.runner = ScriptedRunner()
        self.observer = MemoryObserver()
        self.executor: Executor

    @classmethod
    async def make(
        cls,
        servers: DevStack,
        parts: AsyncExitStack,
        *,
        task: Task = Task.TEXT_TO_IMAGE,
        **limits: float,
    ) -> Self:
        """Start a worker; `limits` are fields of `executor.Limits`."""
        store = await parts.enter_async_context(Relay(servers.store.ports["s3.port"]))
        bus = await parts.enter_async_context(Relay(int(servers.nats.url.rpartition(":")[2])))
        world = cls(servers, task, store, bus)
        await world._sender.open(parts)
        await world._open(parts, limits)
        return world

    async def _open(self, parts: AsyncExitStack, limits: Mapping[str, Any]) -> None:
        bus = await connect(self._settings, name="test", within=CONNECT_WITHIN)
        parts.push_async_callback(bus.close)
        topology = make_topology(self._settings, bus)
        await topology.apply((self._task,))

        async def ensure() -> object:
            return await topology.ensure(self._task)

        durable = await topology.ensure(self._task)
        config = replace(
            store_config(self._settings),
            deadline=STORE_DEADLINE,
            first_pause=STORE_PAUSE,
            longest_pause=STORE_PAUSE,
        )
        self._artifacts = CountingArtifacts(config, observer=self.observer)
        parts.push_async_callback(self._artifacts.close)
        parts.callback(self.runner.close)
        numbers = {
            "ack_wait": durable.ack_wait,
            "max_attempts": 3,
            "stall_timeout": LONG,
            "retry_delay": 0.0,
            **limits,
        }
        events = JetStreamEvents(bus, self._subjects, ensure=ensure)
        names = {str(self._task): topology.durable_name(self._task)}
        queue = JetStreamQueue(bus, self._subjects, names)
        workers = BroadcastWorkers(bus, self._subjects, queue=self._task, durables=names)

        def start() -> Executor:
            run_queue = RunQueue()
            parts.callback(run_queue.close)
            InferenceWorker(self.runner, run_queue, on_busy=self.observer.device_busy).start()
            return Executor(
                worker="worker-1",
                admission=Admission(self._task, self._subjects, self._settings.reply_prefixes),
                limits=Limits(**numbers),
                model=self.runner.description,
                runner=self.runner,
                run_queue=run_queue,
                events=events,
                queue=queue,
                workers=workers,
                artifacts=self._artifacts,
                images=ImageCodec(),
                observer=self.observer,
            )

        self._start = start
        self.executor = self._start()
        marks = AttemptMarks(bus, self._subjects, self._task)
        context = DeliveryContext(bus, durable.ack_wait, marks, LeaseGuard(self._settings))
        self._pull = PullLoop(bus, durable, ensure=ensure, context=context)
        await self._pull.start()
        parts.push_async_callback(self._pull.close)
        retries = topology.retries(self._task)
        retry_marks = AttemptMarks(bus, self._subjects, self._task, of="retries")
        moving = PullLoop(bus, retries, ensure=ensure, context=replace(context, marks=retry_marks))
        await moving.start()
        parts.push_async_callback(moving.close)
        mover = RetryMover(bus, self._task, retries, events)
        moves = asyncio.create_task(_move(moving, mover))
        parts.push_async_callback(cancel_and_wait, moves)

    # -- the interface of the suite ---------------------------------------------------------------

    async def send(
        self,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        subject = self._subjects.request(self._task, request_id)
        await self._sender.publish(subject, body, None if headers is None else dict(headers))

    async def work(self) -> int | None:
        delivery = await self._pull.next()
        assert delivery is not None
        code = await self.executor.handle(delivery)
        if code is not None:  # the process exits, and its supervisor starts another one
            self.executor = self._start()
        return code

    async def pending(self) -> int:
        requests = await self._sender.count(self._subjects.requests_stream(self._task))
        return requests + await self._sender.count(self._subjects.retries_stream)

    async def result(self, request_id: str) -> ResultEvent | None:
        subject = self._subjects.result(self._task, request_id)
        body = await self._sender.last(self._subjects.results_stream, subject)
        return None if body is None else decode_result(body)

    async def replies(self) -> list[tuple[str, ResultEvent]]:
        messages = await self._sender.received("replies")
        return [(message.subject, decode_result(message.data)) for message in messages]

    async def transient_events(self, request_id: str) -> list[StartedEvent | ProgressEvent]:
        events = [decode_event(message.data) for message in await self._sender.received("news")]
        return [
            event
            for event in events
            if isinstance(event, StartedEvent | ProgressEvent) and event.request_id == request_id
        ]

    async def dead_letters(self) -> list[tuple[DeadLetter, bytes]]:
        return await self._sender.dead_letters()

    def source(self, name: str) -> dict[str, str]:
        return {"bucket": self._settings.s3_bucket, "key": f"{self._subjects.root}/{name}"}

    async def put_object(self, name: str, data: bytes) -> None:
        await asyncio.to_thread(self._sender.put_object, **self.source(name), data=data)

    async def object(self, bucket: str, key: str) -> bytes:
        return await asyncio.to_thread(self._sender.get_object, bucket, key)

    async def objects(self) -> set[str]:
        return await asyncio.to_thread(
            self._sender.keys, self._settings.s3_bucket, f"{self._subjects.root}/"
        )

    async def until_store_call_fails(self) -> None:
        await self._artifacts.misses.more(2)


async def _move(pull: PullLoop, mover: RetryMover) -> None:
    while (retry := await pull.next()) is not None:
        await mover.move(retry)
