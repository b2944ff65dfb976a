"""Ports: what the life of a job needs from the outside, as Protocols and plain values.

`execution` knows the bus, the store, the pictures' codec and the model only through these, so that
a job can be driven through every outcome with in-memory ports, and none of the libraries behind
them reaches the part that decides.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol

from consumer.telemetry import JobReport
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    FailureCode,
    ImageArtifact,
    ModelInfo,
    ProgressEvent,
    Request,
    StartedEvent,
    SucceededEvent,
    Task,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.events import ParameterValue

if TYPE_CHECKING:
    import asyncio

    from PIL.Image import Image

ResultEvent = SucceededEvent | FailedEvent | CancelledEvent
OutputFormat = Literal["png", "webp", "jpeg"]


class Unavailable(Exception):  # noqa: N818 - a state of the service
    """A service cannot be reached or used; the text is one clear line, without secrets."""


# -- the bus --------------------------------------------------------------------------------------


class Message(Protocol):
    """A request as a stream stores it, and how often it has been delivered."""

    @property
    def subject(self) -> str:
        """Where the request was published."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, empty where it has none."""

    @property
    def body(self) -> bytes:
        """The request's bytes."""

    @property
    def stream(self) -> str:
        """Name of the stream that stores the request."""

    @property
    def stream_sequence(self) -> int:
        """The request's sequence in its stream; the same for every delivery."""

    @property
    def stored_at(self) -> datetime:
        """When the stream stored the request, aware; the same for every delivery."""

    @property
    def attempt(self) -> int:
        """How often the request has been delivered, this time included; from 1."""

    @property
    def deliveries(self) -> int:
        """How often this very message has been delivered, this time included; from 1.

        A request that is queued again after a delay is another message.
        """

    @property
    def uncounted(self) -> int:
        """How many deliveries, before it was queued again after a delay, were no attempts."""


class Endable(Protocol):
    """Settles a request as ended. A request is settled once."""

    async def ack(self) -> None:
        """Settle as done; returns when the server has confirmed it."""

    async def term(self, reason: str) -> None:
        """Settle as never to be delivered again, with a reason for the advisory."""


class Marked(Protocol):
    """What workers have marked on a request for the worker that receives it next."""

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of this message were no attempts."""

    async def mark_cancelled(self) -> None:
        """Mark the request as cancelled, for the next worker if this one dies. Never raises."""

    async def was_cancelled(self) -> bool:
        """Return whether the request was cancelled while an earlier worker had it."""


class Requeueable(Protocol):
    """Returns a request to its queue, to be delivered again at once."""

    async def nak(self) -> None:
        """Return the request after a failed attempt."""

    async def requeue(self) -> None:
        """Return the request without an attempt: the delivery is not counted.

        Never raises: a process that is ending calls it.
        """


class Renewable(Protocol):
    """The lease on a delivery: while it lasts, no other worker receives the request."""

    async def extend(self) -> None:
        """Renew the lease for another `ack_wait`. Fire and forget: it never raises."""

    def stop_renewing(self) -> None:
        """Renew the lease no more, nor let the lease guard do it for this process."""


class Countable(Protocol):
    """Decides whether a delivery counts as an attempt."""

    async def mark_uncounted(self) -> None:
        """Mark this delivery as no attempt, unless `mark_counted` follows. Never raises."""

    async def mark_counted(self) -> None:
        """Mark this delivery as an attempt after all, unless it is requeued. Never raises."""


class QueuedRequest(Message, Endable, Marked, Protocol):
    """A request in its stream that this process may end, whether or not it has a lease on it."""


class Delivery(QueuedRequest, Requeueable, Renewable, Countable, Protocol):
    """One delivery of a request to this worker, with the lease on it."""


@dataclass(frozen=True)
class DeadLetter:
    """Why a request is dead-lettered, for the headers of its copy."""

    code: str
    reason: str
    request_id: str
    worker: str


class Events(Protocol):
    """The daemon's way of publishing. What must not be lost is retried until the bus has it."""

    async def find_result(self, task: Task, request_id: str) -> ResultEvent | None:
        """The stored terminal event of a request, or None."""

    async def publish_result(self, event: ResultEvent, *, trace_parent: str | None) -> ResultEvent:
        """Store the terminal event, unless the request has one.

        Returns:
            The event that is stored for the request: this one, or the one that was there before.

        Raises:
            MessageTooLarge: The event does not fit the server's `max_payload`.
            ResultUnreadable: An event of a later version of the contract is stored. Acknowledge the
                delivery without a reply: that version's worker answers and goes on with the chain.
        """

    async def publish_progress(
        self, event: StartedEvent | ProgressEvent, *, trace_parent: str | None
    ) -> None:
        """Tell what happens: passing news, lost when the bus is away; it never raises."""

    async def reply(self, subject: str, event: ResultEvent, *, trace_parent: str | None) -> None:
        """Answer on the sender's subject: a courtesy, the stored event is the truth."""

    async def publish_request(
        self, task: Task, request: Request, *, reply_to: str | None, trace_parent: str | None
    ) -> None:
        """Queue the next request of a chain; a second time is harmless.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """

    async def retry_later(
        self,
        task: Task,
        delivery: Message,
        *,
        request_id: str,
        attempts: int,
        delay: float,
        owner: str | None,
    ) -> None:
        """Store a copy of a request that is queued again after a delay; then acknowledge it.

        Args:
            task: Of the request.
            delivery: Its bytes and headers are kept, and how often it has been delivered.
            request_id: The copy is queued under it, also where the request's subject has no id.
            attempts: How many of its deliveries were attempts.
            delay: Seconds.
            owner: Digest of what the request asks for, where the id belongs to it from now on.

        Raises:
            MessageTooLarge: It does not fit the server's limit or the stream's.
            QueueFull: The stream takes no more.
        """

    async def dead_letter(self, task: Task, delivery: Message, letter: DeadLetter) -> None:
        """Keep the original bytes and headers of a request that no worker can handle."""


@dataclass(frozen=True)
class StoredRequest:
    """A request as it is stored in its stream.

    Attributes:
        delivery: Settling it deletes it from the stream.
        untouched: Whether it has been delivered to no worker so far.
    """

    delivery: QueuedRequest
    untouched: bool


@dataclass(frozen=True)
class IdLookup:
    """What is stored under a request id, by task.

    Attributes:
        requests: Tasks whose request stream has a message with the id in its subject.
        results: Tasks with a message on the result subject, whatever that message is.
    """

    requests: frozenset[Task]
    results: frozenset[Task]


class Queue(Protocol):
    """The requests in their streams, found by the ids in their subjects."""

    async def find(self, request_id: str) -> IdLookup:
        """Look what is stored under an id, without loading any of it.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def find_results(self, request_id: str) -> frozenset[Task]:
        """Look for results alone: `IdLookup.results`.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        """Load the oldest request with this id; None when there is none.

        Raises:
            Unavailable: The bus cannot be used.
        """

    async def older(self, task: Task, request_id: str, than: Message) -> Message | None:
        """Load the oldest request with this id in its subject, if it is older than a delivery.

        Waits for the bus. Loads nothing where the delivery's own message is the only one.

        Raises:
            Unavailable: The client has given up; the process has to end.
        """

    async def owner(self, task: Task, request_id: str) -> str | None:
        """Return the digest that an id belongs to since its request was stored for a retry.

        Waits for the bus.

        Raises:
            Unavailable: The client has given up; the process has to end.
        """

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        """Mark a request as cancelled for the worker that gets its next attempt. Never raises."""


class StopAck(Enum):
    """A worker's answer to a request to stop: the worker has the request."""

    STOPPING = "stopping"  # it stops at its next step, even if this worker should die
    ENDING = "ending"  # too late: its end is being published


class Workers(Protocol):
    """All workers of the installation. No method raises."""

    async def request_stop(self, request_id: str) -> "asyncio.Future[StopAck | None]":
        """Ask all workers to stop a request; each of them remembers the id.

        Returns:
            Once the message has been sent: the answer to wait for. None: no worker has answered.
        """

    async def notify_stop(self, request_id: str) -> None:
        """Ask all workers to stop a request, without an answer."""

    async def is_in_progress(self, request_id: str) -> bool:
        """Whether another worker has a job with this id. The job goes on.

        No answer within a moment counts as no.
        """

    async def others_idle(self) -> bool:
        """Whether another worker waits for requests; ask while the own pull does not stand.

        False when the bus cannot tell.
        """


class ResultUnreadable(Exception):  # noqa: N818 - a state of the request
    """The request has a terminal event, of a version of the contract that is not known here."""


class QueueFull(Exception):  # noqa: N818 - a state of the queue
    """The request stream takes no more."""


class MessageTooLarge(Exception):  # noqa: N818 - a state of the message
    """Body and headers together exceed the server's `max_payload`."""


# -- the store ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedImage:
    """One picture as a file, hashed once.

    Attributes:
        sha256: Hex.
    """

    data: bytes = field(repr=False)
    media_type: Literal["image/png", "image/webp", "image/jpeg"]
    extension: str
    width: int  # pixels
    height: int  # pixels
    seed: int
    sha256: str


class Artifacts(Protocol):
    """The object store."""

    async def store(
        self, task: Task, request_id: str, index: int, image: EncodedImage
    ) -> ImageArtifact:
        """Put one output under a key derived from the request id and the output's bytes.

        Raises:
            StoreUnavailable: Not stored within the adapter's own tries.
        """

    async def discard(self, artifact: ImageArtifact) -> None:
        """Delete an output that no event tells of, if possible. Never raises."""

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        """The bytes of one input picture.

        Raises:
            InputUnavailable: It is missing, too large, or not one that this worker may read.
            StoreUnavailable: The store does not answer, or not with this object.
        """

    async def reachable(self) -> bool:
        """Whether the store answers this worker at all. Never raises."""


class StoreUnavailable(Unavailable):
    """The store does not answer, or refuses for a reason that may pass; safe to show."""


class InputUnavailable(Exception):  # noqa: N818 - the contract's word for it is input_unavailable
    """An input picture cannot be had or read. The text is safe to show to the sender."""


# -- pictures -------------------------------------------------------------------------------------


class Images(Protocol):
    """The pictures' codec. Both methods compute: call them in a thread."""

    @property
    def max_bytes(self) -> int:
        """The largest input file."""

    def decode(self, data: bytes) -> "Image":
        """An input file to an RGB picture, upright.

        Raises:
            InputUnavailable: Not a PNG, JPEG or WebP file, broken, animated, or over the limits.
        """

    def encode(
        self,
        image: "Image",
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        """A picture to a file with its hash.

        Args:
            image: RGB.
            output_format: Of the file.
            seed: Goes into what is returned.
            provenance: Written into the file as its metadata: names and values.
        """


# -- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelDescription:
    """What a loaded model is and takes.

    Attributes:
        info: Goes into events.
        parameters: Names of the optional request fields that the model knows; any other one in a
            request is refused.
        defaults: What the model uses where a request says nothing.
        size_multiple: Width and height must be multiples of it, in pixels; None for text.
        max_pixels: Largest width times height of an output picture; None for text.
        least_steps: The fewest denoising steps that the model can make; None for text.
    """

    info: ModelInfo
    parameters: frozenset[str]
    defaults: Mapping[str, int | float | str | None]
    size_multiple: int | None = None
    max_pixels: int | None = None
    least_steps: int | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One picture as the model made it."""

    image: "Image"
    seed: int
    flagged: bool | None = None  # by the safety checker; None: there is none


@dataclass(frozen=True)
class GeneratedText:
    """One text as the model made it, without the prompt's tokens."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seed: int | None = None  # None: nothing was drawn by chance


@dataclass(frozen=True)
class RunnerOutput:
    """What one run gave: pictures for text-to-image, one text for image-to-text."""

    images: tuple[GeneratedImage, ...] = ()
    text: GeneratedText | None = None
    warnings: tuple[str, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)  # defaults included


class RunProgress(Protocol):
    """Where a run reports how far it is. The inference thread calls it between two steps."""

    def step(self, done: int, of: int) -> None:
        """Note a step: how many are done, and how many there are as far as the run knows."""

    def text(self, added: str) -> None:
        """Note what has been added to the text, where the request asks to see it grow."""

    def preview(self, jpeg: bytes) -> None:
        """Note how the image looks, as a small JPEG file, where the request asks for previews."""


@dataclass(frozen=True, eq=False)
class RunRequest:
    """One request of a run.

    Attributes:
        request: With a seed; `Runner.check` has passed it.
        images: Its decoded inputs, RGB; empty for text-to-image.
        progress: Where the run reports how far it is.
        cancelled: Called after each step; when it returns True the run stops for this request.
    """

    request: Request
    images: Sequence["Image"]
    progress: RunProgress
    cancelled: Callable[[], bool]


class Runner(Protocol):
    """A model. All methods are called in one and the same thread: the inference thread.

    One thread for each loaded model is a correctness requirement: a shared diffusers pipeline on
    two threads gives IndexErrors or silently wrong pictures.
    """

    def load(self) -> ModelDescription:
        """Load the weights.

        Raises:
            ModelUnavailable: With one clear line.
        """

    def check(self, request: Request) -> None:
        """See whether the model can do what is asked, without running it; any thread may call it.

        Raises:
            UnsupportedParameter: Names the field.
        """

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> Sequence[RunnerOutput | None]:
        """Run the model once.

        After each step the progress of each request is reported and its `cancelled` is called. A
        cancelled request is neither reported nor called again and gets no output; the others go on.

        Args:
            runs: One request, or several with the same `batch_key`.
            save_memory: Use the options that make the run smaller and slower; for one request.

        Returns:
            One output for each request, in their order; None for a cancelled one.

        Raises:
            Interrupted: All requests were cancelled; the model is ready for the next run.
            UnsupportedParameter: The model refused a value that `check` could not judge.
            OutOfMemory: The device's memory did not suffice; it has been freed as far as possible.
            DeviceLost: The device cannot be used by this process any more.
            ModelError: Anything else that went wrong inside the model.
        """

    def batch_key(self, request: Request) -> Hashable | None:
        """What requests have in common that can run as one; any thread may call it.

        Args:
            request: A request with a seed, which `check` has passed.

        Returns:
            Equal for requests that go together; None: this one runs alone.
        """

    def close(self) -> None:
        """Let go of the weights."""


class ModelUnavailable(Exception):  # noqa: N818 - a state of the model
    """The model cannot be loaded."""


class UnsupportedParameter(Exception):  # noqa: N818 - the contract's word: unsupported_parameter
    """The model does not have a parameter, or not with this value; the text is safe to show."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Interrupted(Exception):  # noqa: N818 - not an error: it was asked for
    """The run was stopped because `cancelled` said so."""


class OutOfMemory(Exception):  # noqa: N818 - the contract's word for it is out_of_memory
    """The device's memory did not suffice.

    Attributes:
        tried: What had been turned on to save memory, in words that are safe to show.
    """

    def __init__(self, message: str, tried: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried


class DeviceLost(Exception):  # noqa: N818 - a state of the device
    """A sticky device error: every later call in this process would fail too."""


class ModelError(Exception):
    """The model raised; the text, the exception's class name, is safe to show."""


# -- what goes on, told to whoever watches --------------------------------------------------------


class JobTrace(Protocol):
    """The trace of one job.

    Attributes:
        trace_parent: What goes out with everything that the job publishes: W3C trace context.
    """

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """The job has come to its end.

        Args:
            outcome: As in `JobReport`.
            queued: Seconds from stored to taken.
            stages: Where the time went.
        """


class Tracer(Protocol):
    """Where traces go; nothing of it raises or waits."""

    def begin(
        self, *, trace_parent: str | None, began: int, attributes: Mapping[str, str | int]
    ) -> JobTrace:
        """A job has begun.

        Args:
            trace_parent: The sender's.
            began: When the stream took the request, nanoseconds since the epoch.
            attributes: What it is about.
        """


@dataclass(frozen=True)
class Stage:
    """When a stage of a job began and ended, in nanoseconds since the epoch."""

    name: str
    began: int
    ended: int


@dataclass
class PassedOn:
    """A trace that nobody keeps here: the sender's context goes out as it came."""

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """Nothing is kept."""


class NoTracer:
    """Without the extra, or turned off."""

    def begin(
        self,
        *,
        trace_parent: str | None,
        began: int,  # noqa: ARG002 - the port's
        attributes: Mapping[str, str | int],  # noqa: ARG002 - the port's
    ) -> JobTrace:
        """Pass the sender's context on."""
        return PassedOn(trace_parent)


class Observer(Protocol):
    """Told what the daemon does; it never raises and never blocks."""

    def job_started(self) -> None:
        """A delivery is in hand."""

    def job_finished(self, report: JobReport) -> None:
        """A delivery is settled or given back."""

    def chain_broken(self, code: FailureCode) -> None:
        """A chain has ended at a step that could not be queued: it is no job, and no job's end."""

    def call_refused(self, code: FailureCode) -> None:
        """The front door has refused a call."""

    def device_stepped(self) -> None:
        """The run under way has come to a new step, or to more text."""

    def device_busy(self, seconds: float) -> None:
        """A run has ended, in which the device worked for so long."""

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """The store has answered, or not."""

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """JetStream has taken what was published, or refuses it."""
