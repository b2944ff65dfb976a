"""The models that workers serve, by the names that callers may give in `model`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import structlog

from consumer.bus.connection import BusUnavailable
from consumer.bus.services import Metadata
from consumer.gateway.errors import ApiError, of_error
from generation_client import ServiceUnavailable
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.fields import MAX_MODEL_NAME
from generation_contracts.queues import QueueInfo, default_queues, is_named, queue_for

log = structlog.get_logger()

FRESH = 5.0  # seconds for which the workers' replies are used without another request
MAX_NAME = MAX_MODEL_NAME

ReadMetadata = Callable[[], Awaitable[Sequence[Metadata]]]
ReadQueues = Callable[[], Awaitable[Mapping[str, QueueInfo]]]


@dataclass(frozen=True)
class Model:
    """A model that callers may name.

    Attributes:
        name: The id in `/v1/models`.
        task: The task of the model.
        created: Unix time in seconds at which this gateway first saw the model.
        is_loaded: Whether a worker serves the model now.
        queue: The queue of the model.
    """

    name: str
    task: Task
    created: int
    is_loaded: bool
    queue: str


async def _only_default_queues() -> Mapping[str, QueueInfo]:
    return default_queues()


class Catalogue:
    """The models of all queues, as their streams declare them and as workers report them.

    A model remains known while no worker of its queue replies: workers may be scaled to zero, and
    requests wait in the queue. While no model of a default queue has been seen or declared, any
    name is accepted for its task, because the queued request starts the first worker.

    Args:
        read_metadata: Returns the metadata of all workers; raises BusUnavailable.
        now: The clock, in seconds.
        read_queues: Returns all queues by name.
    """

    def __init__(
        self,
        read_metadata: ReadMetadata,
        now: Callable[[], float] = time.monotonic,
        read_queues: ReadQueues = _only_default_queues,
    ) -> None:
        self._read_metadata = read_metadata
        self._now = now
        self._read_queues = read_queues
        self._queues: Mapping[str, QueueInfo] = default_queues()
        self._models: dict[tuple[str, str], Model] = {}  # by queue and name
        self._read_at: float | None = None
        self._succeeded = False  # whether the last read succeeded
        self._reading: asyncio.Task[None] | None = None

    async def models(self) -> list[Model]:
        """List the models of all queues, the default queues first."""
        if not self._is_fresh:
            await self._refresh()
        return [model for queue in self._queues.values() for model in self._of(queue)]

    async def queues(self) -> list[tuple[QueueInfo, Model]]:
        """List all queues, each with its model."""
        if not self._is_fresh:
            await self._refresh()
        return [(queue, self._of(queue)[0]) for queue in self._queues.values()]

    async def name_of(self, name: str | None, task: Task) -> str:
        """Resolve the model name of a request; see `find`."""
        return (await self.find(name, task)).name

    async def find(self, name: str | None, task: Task) -> Model:
        """Find the model of a request.

        Args:
            name: The id of a model, the last part of the id, the name of a queue or of the task.
                None and an empty string mean the model of the default queue.
            task: The task of the endpoint.

        Raises:
            ApiError: 404: the task has no such model; 503: the workers could not be reached.
        """
        found = self._find(name, task)
        if found is not None:
            if not self._is_fresh:
                self._refresh()  # in the background, for later requests
            return found
        if not self._is_fresh or not self._succeeded:
            await self._refresh()
        found = self._find(name, task)
        if found is None:
            raise self.unknown(
                f"there is no such model for {task}: GET /v1/models lists those there are"
            )
        return found

    def unknown(self, message: str) -> ApiError:
        """Return the error for an unknown name: 404, or 503 if the last read failed."""
        if not self._succeeded:
            return of_error(ServiceUnavailable())
        return ApiError(HTTPStatus.NOT_FOUND, message, "model_not_found", "model")

    @property
    def _is_fresh(self) -> bool:
        return self._read_at is not None and self._now() - self._read_at < FRESH

    def _of(self, queue: QueueInfo) -> list[Model]:
        """Return the models of a queue: declared, loaded, seen before, or named like the queue."""
        seen = [model for model in self._models.values() if model.queue == queue.name]
        loaded = [model for model in seen if model.is_loaded]
        if queue.model is not None and not (queue.is_default and seen):
            return [_model(queue, queue.model, is_loaded=bool(loaded))]
        return loaded or seen or [_model(queue, queue.name, is_loaded=False)]

    def _find(self, name: str | None, task: Task) -> Model | None:
        if self._read_at is None:
            return None
        default = queue_for(None, task, self._queues.values()) or QueueInfo(str(task), task)
        exists = task in DEFAULT_QUEUES or default.name in self._queues
        if not name or name == task:
            return self._of(default)[0] if exists else None
        if name in self._queues and self._queues[name].task == task:
            return self._of(self._queues[name])[0]
        queues = [default, *(q for q in self._queues.values() if q.task == task and q != default)]
        models = [model for queue in queues for model in self._of(queue)]
        exact = (model for model in models if model.name == name)
        close = (model for model in models if is_named(name, [model.name]))
        found = next(exact, None) or next(close, None)
        if found is None and default.is_default and self._succeeded and default.model is None:
            accepts_any = not self._is_seen(task, name)
            return _model(default, name, is_loaded=False) if accepts_any else None
        return found

    def _is_seen(self, task: Task, name: str) -> bool:
        """Return whether a default queue has a known model, or another queue uses the name."""
        declared = {queue.model for queue in self._queues.values()}
        others = {model.name for model in self._models.values()} | declared | set(Task)
        return name in others or any(queue == task for queue, _ in self._models)

    def _refresh(self) -> "asyncio.Task[None]":
        """Start to read the queues and the workers' metadata, or return the task that reads."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="catalogue")
        return self._reading

    async def _read(self) -> None:
        self._queues = await self._read_queues()
        try:
            replies = await self._read_metadata()
        except BusUnavailable as error:
            log.warning("worker_metadata_unavailable", reason=str(error))
            replies = ()
            self._succeeded = False
        else:
            self._succeeded = True
        loaded = dict(_loaded(replies))
        tasks = {key: model.task for key, model in self._models.items()} | loaded
        served = {queue for queue, _ in loaded}
        known = {key for key in self._models if key[0] not in served} | loaded.keys()
        created = {key: model.created for key, model in self._models.items()}
        now = int(time.time())
        self._models = {
            (queue, name): Model(
                name,
                tasks[queue, name],
                created.get((queue, name), now),
                (queue, name) in loaded,
                queue,
            )
            for queue, name in sorted(known)
        }
        self._read_at = self._now()


def _model(queue: QueueInfo, name: str, *, is_loaded: bool) -> Model:
    return Model(name, queue.task, int(time.time()), is_loaded, queue.name)


def _loaded(replies: Iterable[Metadata]) -> Iterable[tuple[tuple[str, str], Task]]:
    """Yield the queue, the name and the task of each model that a worker reports."""
    for metadata in replies:
        task, name = metadata.get("task"), metadata.get("id", "")
        if task in set(Task) and 0 < len(name) <= MAX_NAME and name.isprintable():
            yield (metadata.get("queue", str(task)), name), Task(task)
