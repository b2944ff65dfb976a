"""The installation of a fault test: real servers, real daemon processes, and a plain sender."""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
from minio import Minio
from nats.aio.client import Client
from nats.js.api import StreamState
from nats.js.errors import NotFoundError

from consumer.app.apply import apply
from consumer.devstack import Daemon, DevStack
from consumer.settings import Settings
from generation_contracts import Subjects, Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.forked import ForkedWorker
from tests.support.plain_s3 import plain_s3_client
from tests.support.quick_runner import FOLDER

ROOT = Path(__file__).parents[2]
WITHIN = 30.0  # seconds; only bounds a wait for something that must happen
ACK_WAIT = 2.0  # seconds
POLL = 0.01  # seconds

Event = dict[str, Any]


class Scene:
    """One installation with a separate subject root, on servers that other tests share.

    Attributes:
        stack: The servers. A test may kill and restart them.
        folder: The folder in which the workers write their notes.
        sender: A plain nats-py connection.
        subjects: The subjects of this installation.
    """

    def __init__(self, stack: DevStack, folder: Path, parts: AsyncExitStack) -> None:
        self.stack = stack
        self.folder = folder
        self.subjects = Subjects(f"t{uuid.uuid4().hex[:8]}")
        self.task = Task.TEXT_TO_IMAGE
        self.sender: Client
        self.workers: list[Daemon] = []
        self._parts = parts

    async def open(self) -> None:
        """Connect the sender, and create the streams, the durable and the bucket."""

        async def ignore(_: Exception) -> None:
            """Ignore connection errors: the tests stop the servers on purpose."""

        self.sender = await nats.connect(
            self.stack.nats.url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,
            error_cb=ignore,
        )
        self._parts.push_async_callback(self._close)
        await self.apply()

    async def apply(self, **settings: str) -> None:
        """Run `consumer apply` with the settings of the installation and additional settings."""
        values: dict[str, Any] = {**self.settings(), **settings}
        await apply(Settings(**{name.lower(): value for name, value in values.items()}))

    def settings(self) -> dict[str, str]:
        """Return the environment of a worker."""
        return {
            **self.stack.environment(),
            "MODEL_TYPE": str(self.task),
            "CONSUMER_SUBJECT_ROOT": self.subjects.root,
            "CONSUMER_ACK_WAIT": str(ACK_WAIT),
            "CONSUMER_RETRY_DELAY": "0.05",
            "S3_PREFIX": self.subjects.root,
        }

    async def start(self, cause: str = "none", **settings: str) -> Daemon:
        """Start a worker with a fault, and return it when it is ready."""
        worker = self.launch(cause, **settings)
        await asyncio.to_thread(worker.wait_ready)
        return worker

    def launch(self, cause: str = "none", **settings: str) -> Daemon:
        """Start a worker with a fault, and return without waiting."""
        number = len(self.workers)
        worker = ForkedWorker(
            f"worker-{number}-{cause}",
            {**self.settings(), FOLDER: str(self.folder), **settings},
            log=self.folder / f"worker-{number}-{cause}.log",
            cause=cause,
        )
        self._parts.callback(worker.kill)
        self.workers.append(worker)
        worker.start()
        return worker

    # -- the sender -------------------------------------------------------------------------------

    async def submit(self, **fields: Any) -> str:
        """Publish a request, and return its id."""
        request_id = str(fields.pop("request_id", None) or uuid.uuid4().hex)
        await self.publish({"prompt": "a", "request_id": request_id, **fields})
        return request_id

    async def publish(self, body: object, headers: dict[str, str] | None = None) -> int:
        """Publish any body on the request subject, and return its sequence in the stream."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        subject = self.subjects.request(self.task)
        return (await self.sender.jetstream().publish(subject, data, headers=headers)).seq

    async def events(self, request_id: str) -> list[Event]:
        """Return every stored terminal event of a request. More than one is an error."""
        subject = self.subjects.result(self.task, request_id)
        return await self._stored(self.subjects.results_stream, subject)

    async def event(self, request_id: str, within: float = WITHIN) -> Event:
        """Wait for the terminal event of a request, and return it."""
        found: list[Event] = []

        async def stored() -> bool:
            found[:] = await self.events(request_id)
            return bool(found)

        await self.until(stored, f"event of {request_id}", within)
        assert len(found) == 1
        return found[0]

    async def dead_letters(self) -> list[dict[str, str]]:
        """Return the headers of every dead letter."""
        jetstream = self.sender.jetstream()
        info = await jetstream.stream_info(self.subjects.dead_letters_stream)
        letters = []
        for sequence in range(max(1, info.state.first_seq), info.state.last_seq + 1):
            message = await jetstream.get_msg(self.subjects.dead_letters_stream, sequence)
            letters.append(message.headers or {})
        return letters

    async def pending(self) -> int:
        """Return the number of requests in the streams of both tasks and in the retries stream."""
        jetstream = self.sender.jetstream()
        before = await self._retries()
        infos = [
            await jetstream.stream_info(self.subjects.requests_stream(task))
            for task in DEFAULT_QUEUES
        ]
        waiting = sum((before.subjects or {}).values())
        left = waiting + sum(info.state.messages for info in infos)
        if left == 0 and (await self._retries()).last_seq != before.last_seq:
            return (
                await self.pending()
            )  # one went from the one stream to the other between the looks
        return left

    async def _retries(self) -> StreamState:
        """Return the state of the retries stream for the task of this installation."""
        info = await self.sender.jetstream().stream_info(
            self.subjects.retries_stream,
            subjects_filter=self.subjects.retry(self.task, "x")[:-1] + "*",
        )
        return info.state

    async def describe_pending(self) -> str:
        """Describe the pending requests and the state of each durable, for messages."""
        jetstream, lines = self.sender.jetstream(), []
        for stream in (
            *map(self.subjects.requests_stream, DEFAULT_QUEUES),
            self.subjects.retries_stream,
        ):
            info = await jetstream.stream_info(stream, subjects_filter=">")
            lines.append(f"{stream}: {info.state.subjects or {}}, last {info.state.last_seq}")
            for durable in await jetstream.consumers_info(stream):
                counts = {
                    name: getattr(durable, name)
                    for name in ("num_pending", "num_ack_pending", "num_redelivered", "num_waiting")
                }
                lines.append(f"  {durable.name}: {durable.delivered}, {counts}")
        return "\n".join(lines)

    async def until_empty(self, within: float = WITHIN) -> None:
        """Return once no request is pending."""

        async def empty() -> bool:
            return await self.pending() == 0

        await self.until(empty, "an empty queue", within)

    # -- the workers ------------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """Return the request id of every started run, in order."""
        return self.notes("runs")

    def notes(self, name: str) -> list[str]:
        """Return the lines that the workers have noted under a name."""
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    async def until_noted(self, name: str, lines: int = 1) -> None:
        """Return once a number of lines has been noted under a name."""

        async def noted() -> bool:
            return len(self.notes(name)) >= lines

        await self.until(noted, f"{lines} lines in {name}")

    async def until_logged(self, worker: Daemon, text: str) -> None:
        """Return once a worker has logged a text."""

        async def logged() -> bool:
            return text in worker.log_since_start()

        await self.until(logged, f"{text} in the log of {worker.name}")

    async def exit_code(self, worker: Daemon, within: float = WITHIN) -> int:
        """Wait until a worker exits, and return its exit code."""

        async def exited() -> bool:
            return not worker.alive

        await self.until(exited, f"the end of {worker.name}", within)
        assert worker.returncode is not None
        return worker.returncode

    async def object(self, output: Event) -> bytes:
        """Return the bytes of an output in the store."""
        return await asyncio.to_thread(self._object, output["bucket"], output["key"])

    async def keys(self) -> set[str]:
        """Return the keys of every object of this installation."""
        return await asyncio.to_thread(self._keys)

    async def until(
        self, condition: Callable[[], Awaitable[bool]], what: str, within: float = WITHIN
    ) -> None:
        """Poll a condition until it holds: other processes send no notification."""
        try:
            async with asyncio.timeout(within):
                while not await condition():  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(POLL)
        except TimeoutError:
            logs = "\n".join(worker.log_since_start()[-3000:] for worker in self.workers)
            raise AssertionError(f"no {what} within {within:g} s\n{logs}") from None

    # -- inside -----------------------------------------------------------------------------------

    async def _stored(self, stream: str, subject: str) -> list[Event]:
        jetstream = self.sender.jetstream()
        try:
            info = await jetstream.stream_info(stream, subjects_filter=subject)
            last = await jetstream.get_last_msg(stream, subject)
        except NotFoundError:
            return []
        count = (info.state.subjects or {}).get(subject, 0)
        event: Event = json.loads(last.data or b"")
        return [event] * count

    def _store(self) -> Minio:
        return plain_s3_client(self.stack.store)

    def _object(self, bucket: str, key: str) -> bytes:
        response = self._store().get_object(bucket_name=bucket, object_name=key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    def _keys(self) -> set[str]:
        prefix = f"{self.subjects.root}/"
        found = self._store().list_objects(
            bucket_name=self.stack.store.bucket, prefix=prefix, recursive=True
        )
        return {one.object_name or "" for one in found}

    async def _close(self) -> None:
        # The streams reserve gigabytes of the server's storage limit.
        for worker in self.workers:
            await asyncio.to_thread(worker.kill)
        jetstream = self.sender.jetstream()
        for stream in await jetstream.streams_info():
            if str(stream.config.name).startswith(f"{self.subjects.root.upper()}_"):
                await jetstream.delete_stream(str(stream.config.name))
        await self.sender.close()
