"""One worker on in-memory ports, which a test can read and make fail."""

from collections.abc import Mapping
from typing import Any

from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.jobs.admission import Admission
from consumer.jobs.executor import Executor, Limits
from consumer.ports.bus import DeadLetter, ResultEvent
from consumer.ports.media import Credentials
from generation_contracts import ProgressEvent, StartedEvent, Subjects, Task
from tests.support.memory_ports import (
    BUCKET,
    MemoryArtifacts,
    MemoryDelivery,
    MemoryEvents,
    MemoryImages,
    MemoryObserver,
    MemoryQueue,
    MemoryWorkers,
    Outage,
    ScriptedRunner,
)

LONG = 3_600.0  # seconds; longer than any test


class MemoryWorld:
    """Implements `tests.support.behaviour.World`.

    Attributes:
        journal: The port calls that had an effect, in order.
        delivery: The last delivery that the worker took.
    """

    image_file = b"image 4 4\n" + bytes(3 * 4 * 4)

    def __init__(
        self,
        *,
        task: Task = Task.TEXT_TO_IMAGE,
        ack_wait: float = LONG,
        max_attempts: int = 3,
        stall_timeout: float = LONG,
        prompt_in_images: bool = False,
        credentials: Credentials | None = None,
        credentials_required: bool = False,
        most_in_flight: int = 1,
        max_batch: int = 1,
        window: float = 0.0,
        runner: ScriptedRunner | None = None,
    ) -> None:
        self.journal: list[str] = []
        self.task = task
        self.subjects = Subjects()
        self.bus = Outage()
        self.queue = MemoryQueue(self.journal, self.bus, task=task)
        self.workers = MemoryWorkers()
        self.events = MemoryEvents(self.journal, self.bus)
        self.artifacts = MemoryArtifacts(self.journal)
        self.store = self.artifacts.outage
        self.images = MemoryImages()
        self.observer = MemoryObserver()
        self.runner = runner or ScriptedRunner()
        self.delivery: MemoryDelivery | None = None
        self.run_queue: RunQueue
        self._limits = Limits(
            ack_wait=ack_wait,
            max_attempts=max_attempts,
            stall_timeout=stall_timeout,
            retry_delay=0.0,
        )
        self._images: dict[str, Any] = {
            "prompt_in_images": prompt_in_images,
            "credentials": credentials,
            "credentials_required": credentials_required,
        }
        self._room = {"max_batch": max_batch, "window": window}
        self._most_in_flight = most_in_flight
        self.executor = self._start()

    def _start(self) -> Executor:
        """Start a worker: the inference thread and the executor."""
        self.run_queue = RunQueue(**self._room)
        InferenceWorker(self.runner, self.run_queue, on_busy=self.observer.device_busy).start()
        return Executor(
            worker="worker-1",
            admission=Admission(self.task, self.subjects, ("_INBOX.", "generation.reply.")),
            limits=self._limits,
            model=self.runner.description,
            runner=self.runner,
            run_queue=self.run_queue,
            events=self.events,
            queue=self.queue,
            workers=self.workers,
            artifacts=self.artifacts,
            images=self.images,
            observer=self.observer,
            **self._images,
            most_in_flight=self._most_in_flight,
        )

    async def send(
        self,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.queue.publish(self.subjects.request(self.task, request_id), body, dict(headers or {}))

    async def work(self) -> int | None:
        delivery = self.delivery = self.queue.take()
        code = await self.executor.handle(delivery)
        if code is not None:  # the process exits, and the supervisor starts a new process
            self.executor = self._start()
        return code

    async def pending(self) -> int:
        return len(self.queue)

    async def result(self, request_id: str) -> ResultEvent | None:
        return self.events.stored(self.task, request_id)

    async def replies(self) -> list[tuple[str, ResultEvent]]:
        return self.events.replies

    async def transient_events(self, request_id: str) -> list[StartedEvent | ProgressEvent]:
        return [event for event in self.events.progress if event.request_id == request_id]

    async def dead_letters(self) -> list[tuple[DeadLetter, bytes]]:
        return self.events.letters

    def source(self, name: str) -> dict[str, str]:
        return {"bucket": BUCKET, "key": name}

    async def put_object(self, name: str, data: bytes) -> None:
        self.artifacts.objects[name] = data

    async def object(self, bucket: str, key: str) -> bytes:
        assert bucket == BUCKET
        return self.artifacts.objects[key]

    async def objects(self) -> set[str]:
        return set(self.artifacts.objects)

    async def until_store_call_fails(self) -> None:
        await self.artifacts.calls.more(2)

    def close(self) -> None:
        """End the inference thread."""
        self.runner.close()
        self.run_queue.close()

    @property
    def settlements(self) -> list[str]:
        """The settlements of the last delivery."""
        assert self.delivery is not None
        return self.delivery.settlements


class Worlds:
    """Creates worlds, and closes them at the end of a test."""

    def __init__(self) -> None:
        self._worlds: list[MemoryWorld] = []

    async def __call__(self, **options: Any) -> MemoryWorld:
        world = MemoryWorld(**options)
        self._worlds.append(world)
        return world

    def close(self) -> None:
        for world in self._worlds:
            world.close()
