"""The models that workers serve, by the names that callers may give in `model`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import structlog

from consumer.bus.connection import BusUnavailable
from consumer.bus.services import Metadata
from consumer.gateway.errors import ApiError, of_error
from generation_client import ServiceUnavailable
from generation_contracts import Task

log = structlog.get_logger()

FRESH = 5.0  # seconds for which the workers' replies are used without another request
MAX_NAME = 200  # characters; a model id is a hub id or the name of a folder

ReadMetadata = Callable[[], Awaitable[Sequence[Metadata]]]


@dataclass(frozen=True)
class Model:
    """A model that callers may name.

    Attributes:
        name: The id in `/v1/models`.
        task: The task of the model, which is also its queue.
        created: Unix time in seconds at which this gateway first saw the model.
        is_loaded: Whether a worker serves the model now.
    """

    name: str
    task: Task
    created: int
    is_loaded: bool


class Catalogue:
    """The models of all workers.

    A model remains known while no worker of its task replies: workers may be scaled to zero, and
    requests wait in the queue. While no model of a task has been seen, any name is accepted for
    the task, because the queued request starts the first worker.

    Args:
        read_metadata: Returns the metadata of all workers; raises BusUnavailable.
        now: The clock, in seconds.
    """

    def __init__(
        self, read_metadata: ReadMetadata, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._read_metadata = read_metadata
        self._now = now
        self._models: dict[tuple[Task, str], Model] = {}
        self._read_at: float | None = None
        self._succeeded = False  # whether the last read succeeded
        self._reading: asyncio.Task[None] | None = None

    async def models(self) -> list[Model]:
        """List the models of all tasks."""
        if not self._is_fresh:
            await self._refresh()
        return [model for task in Task for model in self._of(task)]

    async def name_of(self, name: str | None, task: Task) -> str:
        """Resolve the model name of a request.

        Args:
            name: The id of a model, the last part of the id, or the name of the task. None and an
                empty string mean the only model of the task.
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

    def _of(self, task: Task) -> list[Model]:
        seen = [model for model in self._models.values() if model.task == task]
        loaded = [model for model in seen if model.is_loaded]
        return loaded or seen or [Model(str(task), task, int(time.time()), is_loaded=False)]

    def _find(self, name: str | None, task: Task) -> str | None:
        if self._read_at is None:
            return None
        models = self._of(task)
        if not name or name == task:
            return models[0].name
        names = [model.name for model in models]
        if name in names:
            return name
        if self._succeeded and not self._is_seen(task, name):
            return name
        last_parts = {each.rpartition("/")[2].lower(): each for each in reversed(names)}
        return last_parts.get(name.lower())

    def _is_seen(self, task: Task, name: str) -> bool:
        """Return whether a task has a known model, or another task uses the name."""
        others = {model.name for model in self._models.values()} | set(Task)
        return name in others or any(model.task == task for model in self._models.values())

    def _refresh(self) -> "asyncio.Task[None]":
        """Start to read the workers' metadata, or return the task that is reading it."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="catalogue")
        return self._reading

    async def _read(self) -> None:
        try:
            replies = await self._read_metadata()
        except BusUnavailable as error:
            log.warning("worker_metadata_unavailable", reason=str(error))
            replies = ()
            self._succeeded = False
        else:
            self._succeeded = True
        loaded = set(_model_names(replies))
        created = {key: model.created for key, model in self._models.items()}
        self._models = {
            (task, name): Model(
                name, task, created.get((task, name), int(time.time())), (task, name) in loaded
            )
            for task, name in sorted(loaded | self._still_known(loaded))
        }
        self._read_at = self._now()

    def _still_known(self, loaded: set[tuple[Task, str]]) -> set[tuple[Task, str]]:
        served = {task for task, _ in loaded}
        return {key for key in self._models if key[0] not in served}


def _model_names(replies: Iterable[Metadata]) -> Iterable[tuple[Task, str]]:
    for metadata in replies:
        task, name = metadata.get("task"), metadata.get("id", "")
        if task in set(Task) and 0 < len(name) <= MAX_NAME and name.isprintable():
            yield Task(task), name
