"""In-memory implementations of every port in `consumer.ports`, to run a job without a server.

They behave like the real ports. Messages are encoded and decoded, and a request has at most one
stored terminal event. A requeued message is delivered again with a higher delivery number. The
model runs in a separate thread. All ports append their effects to one journal, in order.
"""

import asyncio
import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

from PIL import Image

from consumer.jobs.executor import Executor
from consumer.ports.bus import (
    DeadLetter,
    Delivery,
    IdLookup,
    MessageTooLarge,
    ResultEvent,
    StopAck,
    StoredRequest,
)
from consumer.ports.media import EncodedImage, InputUnavailable, OutputFormat
from consumer.ports.model import (
    GeneratedImage,
    GeneratedText,
    Interrupted,
    ModelDescription,
    OutOfMemory,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.ports.store import StoreUnavailable
from consumer.telemetry import JobReport
from generation_contracts import (
    ArtifactReference,
    FailureCode,
    ImageArtifact,
    ModelInfo,
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    Task,
    TextToImageRequest,
    decode_event,
    decode_result,
    encode,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.headers import event_headers, event_type, wire_size

T = TypeVar("T")

BUCKET = "generation"
MAX_PAYLOAD = 2**20  # bytes, the default of nats-server
POLL = 0.001  # seconds between two checks of the cancel token in a blocked run
URL_ENDS = datetime(2100, 1, 1, tzinfo=UTC)


class Tally:
    """A counter whose changes a test can await."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self._changed.set()

    async def until(self, count: int) -> None:
        """Return once the count is reached."""
        while self.count < count:
            self._changed.clear()
            await self._changed.wait()

    async def more(self, count: int) -> None:
        """Return once the count has increased by a number."""
        await self.until(self.count + count)


class Outage:
    """Whether a service is unavailable."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._over.set()

    @property
    def unavailable(self) -> bool:
        return not self._over.is_set()

    def begin(self) -> None:
        self._over.clear()

    def end(self) -> None:
        self._over.set()

    async def over(self) -> None:
        await self._over.wait()


# -- the bus --------------------------------------------------------------------------------------


@dataclass(eq=False)
class MemoryDelivery:
    """One delivery of a message; it reports its settlement to its queue."""

    queue: "MemoryQueue"
    subject: str
    headers: Mapping[str, str]
    body: bytes
    stream: str
    stream_sequence: int
    deliveries: int
    stored_at: datetime
    carried: int = 0  # deliveries before the delayed retry
    uncounted: int = 0  # of the carried deliveries: how many did not count as an attempt
    origin: int = 0  # sequence of the message that the sender published
    settlements: list[str] = field(default_factory=list)
    renewals: Tally = field(default_factory=Tally)
    settling: Tally = field(default_factory=Tally)
    settle_error: Exception | None = None  # raised by every settlement
    renewal_error: Exception | None = None  # raised by the next renewal
    renewal_stopped: bool = False  # whether the worker has stopped renewing the lease

    @property
    def attempt(self) -> int:
        return self.carried + self.deliveries

    async def ack(self) -> None:
        await self._settle("ack")

    async def nak(self) -> None:
        await self._settle("nak")

    async def requeue(self) -> None:
        # The real port does not wait for the bus either when it stores a mark.
        if not self.queue.outage.unavailable:
            self.queue.requeued[self.stream_sequence].add(self.deliveries)
        await self._settle("requeue")

    async def mark_uncounted(self) -> None:
        if not self.queue.outage.unavailable:
            self.queue.marked_uncounted[self.stream_sequence].add(self.deliveries)

    async def mark_counted(self) -> None:
        if not self.queue.outage.unavailable:
            self.queue.marked_uncounted[self.stream_sequence].discard(self.deliveries)

    async def marked_uncounted(self) -> int:
        await self.queue.outage.over()
        number = self.stream_sequence
        return len(self.queue.requeued[number] | self.queue.marked_uncounted[number])

    async def mark_cancelled(self) -> None:
        if not self.queue.outage.unavailable:
            self.queue.cancelled.add(self.stream_sequence)

    async def was_cancelled(self) -> bool:
        await self.queue.outage.over()
        return self.stream_sequence in self.queue.cancelled or (
            bool(self.carried) and self.subject.rpartition(".")[2] in self.queue.cancelled_retries
        )

    async def term(self, reason: str) -> None:
        await self._settle(f"term {reason}")

    async def extend(self) -> None:
        self.renewals.add()
        error, self.renewal_error = self.renewal_error, None
        if error is not None:
            raise error

    def stop_renewing(self) -> None:
        self.renewal_stopped = True

    def redelivery(self, deliveries: int) -> "MemoryDelivery":
        """Return another delivery of the same message."""
        return MemoryDelivery(
            queue=self.queue,
            subject=self.subject,
            headers=self.headers,
            body=self.body,
            stream=self.stream,
            stream_sequence=self.stream_sequence,
            deliveries=deliveries,
            stored_at=self.stored_at,
            carried=self.carried,
            uncounted=self.uncounted,
            origin=self.origin,
        )

    async def _settle(self, how: str) -> None:
        self.settling.add()
        await self.queue.outage.over()
        if self.settle_error is not None:
            raise self.settle_error
        self.settlements.append(how)
        self.queue.settled(self, how)


class MemoryQueue:
    """A work queue stream with its durable consumer.

    Attributes:
        max_deliver: Largest number of deliveries of a message.
        in_flight: The deliveries whose leases have not expired; at most one of each message.
        exhausted: The last deliveries of max-deliver-exhausted messages, which stay in the stream.
        requeued: Numbers of the requeued deliveries, by sequence.
        marked_uncounted: Numbers of the deliveries that do not count as an attempt, by sequence.
        cancelled: Sequences of the requests that were cancelled while in progress.
        retries: The requests that wait for a delayed retry, with their ids.
        owners: The request digest that each id is marked with.
        queues: Names of the queues, by the name of their model.
        cancelled_retries: Ids of requests that were cancelled while they waited for a retry.
    """

    def __init__(
        self,
        journal: list[str],
        outage: Outage,
        *,
        max_deliver: int = 30,
        task: Task = Task.TEXT_TO_IMAGE,
    ) -> None:
        self.task = task
        self.max_deliver = max_deliver
        self.stream = "GENERATION_REQUESTS_TEXT_TO_IMAGE"
        self.outage = outage
        self.in_flight: list[MemoryDelivery] = []
        self.exhausted: list[MemoryDelivery] = []
        self.requeued: defaultdict[int, set[int]] = defaultdict(set)
        self.marked_uncounted: defaultdict[int, set[int]] = defaultdict(set)
        self.cancelled: set[int] = set()
        self.retries: list[tuple[str, MemoryDelivery]] = []
        self.owners: dict[str, str] = {}
        self.cancelled_retries: set[str] = set()
        self.queues: dict[str, str] = {}
        self._journal = journal
        self._last = 0
        self._new: deque[MemoryDelivery] = deque()
        self._redeliveries: deque[MemoryDelivery] = deque()  # delivered before all new messages

    def publish(
        self,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        carried: int = 0,
        uncounted: int = 0,
        origin: int | None = None,
    ) -> int:
        """Store a message, and return its sequence."""
        self._last += 1
        delivery = MemoryDelivery(
            queue=self,
            subject=subject,
            headers=headers,
            body=body,
            stream=self.stream,
            stream_sequence=self._last,
            deliveries=1,
            stored_at=datetime.now(UTC),
            carried=carried,
            uncounted=uncounted,
            origin=self._last if origin is None else origin,
        )
        self._new.append(delivery)
        return self._last

    def retry(self, delivery: MemoryDelivery, request_id: str, attempts: int, delay: float) -> None:
        """Store a copy, and queue the copy after a delay in seconds."""
        before = delivery.attempt
        waiting = request_id, replace(delivery, carried=before, uncounted=before - attempts)
        self.retries.append(waiting)

        def queue_again() -> None:
            self.retries.remove(waiting)
            self.publish(
                Subjects().request(self.task, request_id),
                delivery.body,
                delivery.headers,
                carried=before,
                uncounted=before - attempts,
                origin=delivery.origin,
            )

        if delay:
            asyncio.get_running_loop().call_later(delay, queue_again)
        else:
            queue_again()

    async def older(self, task: Task, request_id: str, than: Delivery) -> MemoryDelivery | None:
        await self.outage.over()
        subject = Subjects().request(task, request_id)
        stored = [*self._new, *self._redeliveries, *self.in_flight, *self.exhausted]
        same = [one for one in stored if one.subject == subject]
        oldest = min(same, key=lambda one: one.stream_sequence, default=None)
        if oldest is None or oldest.stream_sequence >= than.stream_sequence:
            return None
        return oldest

    async def owner(self, task: Task, request_id: str) -> str | None:
        await self.outage.over()
        assert task == self.task
        return self.owners.get(request_id)

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        assert task == self.task
        self.cancelled_retries.add(request_id)

    async def names(self) -> list[str]:
        raise AssertionError("a job looks up no other queues")

    async def queue_for(self, task: Task, model: str | None) -> str | None:
        await self.outage.over()
        return str(task) if model is None else self.queues.get(model)

    async def find(self, request_id: str) -> IdLookup:
        raise AssertionError(f"a job looks up no other requests: {request_id}")

    async def find_results(self, request_id: str) -> frozenset[Task]:
        raise AssertionError(f"a job looks up no other requests: {request_id}")

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        raise AssertionError(f"a job looks up no other requests: {task} {request_id}")

    @property
    def waiting(self) -> int:
        """Number of deliveries that a worker can take."""
        return len(self._redeliveries) + len(self._new)

    def take(self) -> MemoryDelivery:
        """Return the next delivery.

        Raises:
            IndexError: No delivery is waiting.
        """
        delivery = (self._redeliveries or self._new).popleft()
        self.in_flight.append(delivery)
        return delivery

    def settled(self, delivery: MemoryDelivery, how: str) -> None:
        self._journal.append(how)
        number = delivery.stream_sequence
        if how in {"nak", "requeue"}:
            # The server also accepts a NAK of an earlier delivery. It then redelivers the message
            # while another worker handles it. Queued and settled messages are not affected.
            for current in self.in_flight:
                if current.stream_sequence == number:
                    self.expire_lease(current)
                    return
        else:
            # The server accepts a late settlement, and removes every delivery of the message.
            self._redeliveries = deque(d for d in self._redeliveries if d.stream_sequence != number)
            self.in_flight = [d for d in self.in_flight if d.stream_sequence != number]
            self.exhausted = [d for d in self.exhausted if d.stream_sequence != number]

    def drop_other_deliveries(self, delivery: MemoryDelivery) -> None:
        """Remove all other deliveries, as if they waited in the retries stream."""
        self.in_flight = [delivery]

    def expire_lease(self, delivery: MemoryDelivery) -> None:
        """Expire the lease of a delivery: the message is redelivered up to `max_deliver` times."""
        self.in_flight.remove(delivery)
        if delivery.deliveries == self.max_deliver:
            self.exhausted.append(delivery)
        else:
            self._redeliveries.append(delivery.redelivery(delivery.deliveries + 1))

    def expire_leases(self) -> None:
        """Expire all leases."""
        for delivery in list(self.in_flight):
            self.expire_lease(delivery)

    def __len__(self) -> int:
        """Number of requests in the streams."""
        return self.waiting + len(self.in_flight) + len(self.exhausted) + len(self.retries)


class MemoryWorkers:
    """All workers of an installation, called without a message bus.

    Attributes:
        idle: Whether another worker waits for requests.
        executors: The executors of the workers.
    """

    def __init__(self) -> None:
        self.idle = False
        self.executors: list[Executor] = []

    async def request_stop(self, request_id: str) -> asyncio.Future[StopAck | None]:
        raise AssertionError(f"a job cancels no other requests: {request_id}")

    async def notify_stop(self, request_id: str) -> None:
        raise AssertionError(f"a job cancels no other requests: {request_id}")

    async def is_in_progress(self, request_id: str) -> bool:
        return any(one.has_started(request_id) for one in self.executors)

    async def others_idle(self) -> bool:
        return self.idle


class MemoryEvents:
    """Stores one result per subject, dead letters without duplicates, and all other events."""

    def __init__(self, journal: list[str], outage: Outage) -> None:
        self.max_payload = MAX_PAYLOAD
        self.publish_error: Exception | None = None  # raised when a result is stored
        self.retries_full: Exception | None = None  # raised when a delayed retry is stored
        self.progress: list[StartedEvent | ProgressEvent] = []
        self.replies: list[tuple[str, ResultEvent]] = []
        self.trace_parents: list[str | None] = []
        self.published = Tally()
        self.lookups = Tally()
        self.requests: list[tuple[Task, Request, str | None]] = []  # the next steps of chains
        self.subjects: set[str] = set()  # all subjects of published messages
        self._results: dict[tuple[Task, str], bytes] = {}
        self._letters: dict[tuple[Task, str, int], tuple[DeadLetter, bytes]] = {}
        self._journal = journal
        self._outage = outage

    @property
    def letters(self) -> list[tuple[DeadLetter, bytes]]:
        return list(self._letters.values())

    @property
    def dead_lettered(self) -> set[int]:
        """Stream sequences of the requests with a dead letter."""
        return {sequence for _, _, sequence in self._letters}

    def stored(self, task: Task, request_id: str) -> ResultEvent | None:
        """Return the terminal event as a reader of the stream gets it."""
        body = self._results.get((task, request_id))
        return None if body is None else decode_result(body)

    def put(self, event: ResultEvent) -> bool:
        """Store an event as another worker would; return whether it is the first of its request."""
        key = event.task, event.request_id
        return self._results.setdefault(key, body := encode(event)) is body

    async def find_result(self, task: Task, request_id: str) -> ResultEvent | None:
        self.lookups.add()
        await self._outage.over()
        return self.stored(task, request_id)

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        if wire_size(encode(event), event_headers(event)) > self.max_payload:
            raise MessageTooLarge
        await self._outage.over()
        if self.publish_error is not None:
            raise self.publish_error
        self.trace_parents.append(trace_parent)
        self.subjects.add(Subjects().result(event.task, event.request_id))
        first = self.put(event)
        self._journal.append(f"publish {_kind(event)}" if first else "fenced")
        stored = self.stored(event.task, event.request_id)
        assert stored is not None
        return stored

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        if not self._outage.unavailable:
            decoded = decode_event(encode(event))
            assert isinstance(decoded, StartedEvent | ProgressEvent)
            self.subjects.add(Subjects().progress(event.task, event.request_id))
            self.progress.append(decoded)
            self.trace_parents.append(trace_parent)
            self.published.add()

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        if not self._outage.unavailable:
            self.subjects.add(subject)
            self.replies.append((subject, decode_result(encode(event))))
            self.trace_parents.append(trace_parent)
            self._journal.append(f"reply {_kind(event)}")

    async def publish_request(
        self, task: Task, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        await self._outage.over()
        if wire_size(encode(request), {}) > MAX_PAYLOAD:
            raise MessageTooLarge
        self.subjects.add(Subjects().request(task, request.request_id))
        self._journal.append(f"request {request.request_id}")
        self.requests.append((task, request, reply_to))

    async def retry_later(
        self,
        task: Task,
        delivery: Delivery,
        *,
        request_id: str,
        attempts: int,
        delay: float,
        owner: str | None,
    ) -> None:
        await self._outage.over()
        if self.retries_full is not None:
            raise self.retries_full
        stored = getattr(delivery, "port", delivery)  # `stepped_world` wraps the delivery
        assert isinstance(stored, MemoryDelivery)
        assert task == stored.queue.task
        self._journal.append("retry")
        stored.queue.retry(stored, request_id, attempts, delay)
        if owner is not None:
            stored.queue.owners.setdefault(request_id, owner)

    async def dead_letter(self, task: Task, delivery: Delivery, letter: DeadLetter) -> None:
        await self._outage.over()
        position = task, delivery.stream, delivery.stream_sequence
        self.subjects.add(Subjects().dead_letter(task))
        self._letters.setdefault(position, (letter, delivery.body))
        self._journal.append("dead_letter")


def _kind(event: ResultEvent) -> str:
    return event_type(event).rpartition(".")[2]


# -- the store ------------------------------------------------------------------------------------


class MemoryArtifacts:
    """An object store with one bucket."""

    def __init__(self, journal: list[str]) -> None:
        self.outage = Outage()
        self.unreadable: set[str] = set()  # keys whose reading fails with an internal error
        self.objects: dict[str, bytes] = {}
        self.calls = Tally()
        self._journal = journal

    async def store(
        self, task: Task, request_id: str, index: int, image: EncodedImage
    ) -> ImageArtifact:
        self._answer()
        key = f"{task}/{request_id}/{index}-{image.sha256[:8]}.{image.extension}"
        self.objects[key] = image.data
        self._journal.append("store")
        return ImageArtifact(
            bucket=BUCKET,
            key=key,
            url=f"memory://{BUCKET}/{key}",
            url_expires_at=URL_ENDS,
            etag=hashlib.md5(image.data, usedforsecurity=False).hexdigest(),
            sha256=image.sha256,
            size=len(image.data),
            media_type=image.media_type,
            width=image.width,
            height=image.height,
            seed=image.seed,
            marks=image.marks,
        )

    async def discard(self, artifact: ImageArtifact) -> None:
        if not self.outage.unavailable:
            self.objects.pop(artifact.key, None)
            self._journal.append("discard")

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        self._answer()
        if not isinstance(source, ArtifactReference) or source.bucket != BUCKET:
            raise InputUnavailable("the worker may not read this object")
        if source.key in self.unreadable:
            raise StoreUnavailable("the store cannot do it now (InternalError)")
        data = self.objects.get(source.key)
        if data is None:
            raise InputUnavailable("there is no such object")
        if len(data) > max_bytes:
            raise InputUnavailable("too large")
        return data

    async def reachable(self) -> bool:
        return not self.outage.unavailable

    def _answer(self) -> None:
        self.calls.add()
        if self.outage.unavailable:
            raise StoreUnavailable("the store does not answer")


# -- images ---------------------------------------------------------------------------------------


class MemoryImages:
    """A codec whose files are a line of text and the raw pixels, without the provenance.

    Attributes:
        encode_error: Raised by `encode`.
        provenance: The provenance of each encoded image.
    """

    max_bytes = 2**20

    def __init__(self) -> None:
        self.encode_error: Exception | None = None
        self.provenance: list[Mapping[str, str]] = []

    def decode(self, data: bytes) -> Image.Image:
        head, _, pixels = data.partition(b"\n")
        if not head.startswith(b"image "):
            raise InputUnavailable("not an image")
        width, height = (int(side) for side in head.split()[1:])
        return Image.frombytes("RGB", (width, height), pixels)

    def encode(
        self,
        image: Image.Image,
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        if self.encode_error is not None:
            raise self.encode_error
        self.provenance.append(provenance or {})
        data = b"image %d %d\n%s" % (image.width, image.height, image.tobytes())
        return EncodedImage(
            data=data,
            media_type=f"image/{output_format}",  # type: ignore[arg-type] # one of the three
            extension=output_format,
            width=image.width,
            height=image.height,
            seed=seed,
            sha256=hashlib.sha256(data).hexdigest(),
        )


# -- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The arguments of one run of the model, and the text that the script has added so far."""

    request: Request
    images: tuple[Image.Image, ...]
    on_step: Callable[[int, int], None]
    cancelled: Callable[[], bool]
    on_text: Callable[[str], None]
    save_memory: bool
    written: list[str] = field(default_factory=list)  # texts of `tests.support.behaviour.writing`

    @classmethod
    def of(cls, run: RunRequest, *, save_memory: bool = False) -> "Run":
        return cls(
            run.request,
            tuple(run.images),
            run.progress.step,
            run.cancelled,
            run.progress.text,
            save_memory,
        )


Script = Callable[[Run], RunnerOutput]


def make(run: Run) -> RunnerOutput:
    """Return the requested output, in one step."""
    run.on_step(1, 1)
    request = run.request
    if not isinstance(request, TextToImageRequest):
        text = f"{len(run.images)} images"
        text = GeneratedText(text, "stop", prompt_tokens=3, completion_tokens=2)
        return RunnerOutput(outputs=(text,))
    seed = request.seed or 0
    size = request.width or 4, request.height or 4
    images = (
        GeneratedImage(Image.new("RGB", size, (n, seed & 255, seed >> 8 & 255)), seed + n)
        for n in range(request.num_images)
    )
    return RunnerOutput(outputs=tuple(images))


def raising(error: Callable[[], Exception]) -> Script:
    """Return a run that raises. `error` makes the exception, so that no test refers to it."""

    def run(_: Run) -> RunnerOutput:
        raise error()

    return run


def out_of_memory(*tried: str) -> OutOfMemory:
    """Return the exception of a run that exceeds the device memory."""
    return OutOfMemory("the device's memory did not suffice", tried)


class Hold:
    """A run that blocks until it is released or, if it polls the cancel token, cancelled."""

    def __init__(self, *, polls_cancel: bool, before: Callable[[Run], None], then: Script) -> None:
        self._polls_cancel = polls_cancel
        self._before = before
        self._then = then
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._released = threading.Event()

    def __call__(self, run: Run) -> RunnerOutput:
        self._before(run)
        self._loop.call_soon_threadsafe(self._begun.set)
        while not self._released.wait(POLL):
            if self._polls_cancel and run.cancelled():
                raise Interrupted
        return self._then(run)

    async def started(self) -> None:
        """Return once the run has started."""
        await self._begun.wait()

    def release(self) -> None:
        self._released.set()


class ScriptedRunner:
    """A model that runs the next script, or `make` when no script is left."""

    description = ModelDescription(
        info=ModelInfo(id="scripted", family="memory", dtype="float32", device="cpu"),
        parameters=frozenset({"width", "height", "num_inference_steps"}),
        defaults={"num_inference_steps": 1, "width": None},
    )

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._scripts: deque[Script] = deque()
        self._holds: list[Hold] = []

    def script_runs(self, *scripts: Script) -> None:
        """Set the scripts of the next runs."""
        self._scripts.extend(scripts)

    def hold_next_run(
        self,
        *,
        polls_cancel: bool = True,
        before: Callable[[Run], None] = lambda _: None,
        then: Script = make,
    ) -> Hold:
        """Make the next run block until it is released."""
        hold = Hold(polls_cancel=polls_cancel, before=before, then=then)
        self._holds.append(hold)
        self.script_runs(hold)
        return hold

    def load(self) -> ModelDescription:
        return self.description

    def check(self, request: Request) -> None:
        if isinstance(request, TextToImageRequest) and request.negative_prompt is not None:
            raise UnsupportedParameter("negative_prompt", "negative_prompt: no such parameter")

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        (request,) = runs
        run = Run.of(request, save_memory=save_memory)
        self.runs.append(run)
        script = self._scripts.popleft() if self._scripts else make
        return [script(run)]

    def batch_key(self, _: Request) -> Hashable | None:
        """Return None: each request runs alone."""

    def close(self) -> None:
        """Release every blocked run: the interpreter waits for the thread."""
        for hold in self._holds:
            hold.release()


# -- observer -------------------------------------------------------------------------------------


class MemoryObserver:
    """Records all notifications."""

    def __init__(self) -> None:
        self.started = 0
        self.reports: list[JobReport] = []
        self.broken_chains: list[FailureCode] = []
        self.steps = 0
        self.busy: list[float] = []
        self.store: list[tuple[bool, str]] = []

    @property
    def outcomes(self) -> list[str]:
        return [report.outcome for report in self.reports]

    def job_started(self) -> None:
        self.started += 1

    def job_finished(self, report: JobReport) -> None:
        self.reports.append(report)

    def chain_broken(self, code: FailureCode) -> None:
        self.broken_chains.append(code)

    def call_refused(self, code: FailureCode) -> None:
        raise AssertionError("a job does not use the request-reply endpoint")

    def device_stepped(self) -> None:
        self.steps += 1

    def device_busy(self, seconds: float) -> None:
        self.busy.append(seconds)

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        self.store.append((reachable, reason))

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        raise AssertionError(f"the memory bus accepts all messages: {writable} {reason}")
