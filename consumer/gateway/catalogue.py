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

FRESH = 5.0  # seconds for which an answer of the workers is used without asking again
MAX_NAME = 200  # characters; a model id is a hub id or the name of a folder

AskWorkers = Callable[[], Awaitable[Sequence[Metadata]]]


@dataclass(frozen=True)
class Model:
    """A model that callers may name.

    Attributes:
        name: What `/v1/models` lists.
        task: The queue of its requests.
        created: Unix time in seconds at which this gateway has first seen it.
        is_loaded: Whether a worker serves it now.
    """

    name: str
    task: Task
    created: int
    is_loaded: bool


class Catalogue:
    """The models of all workers.

    A model that was seen stays known while no worker of its task answers: its requests wait in the
    queue, and workers may be scaled to zero. Where no model of a task was ever seen, every name
    stands for its model: it is the queued request that starts the first worker.

    Args:
        ask: Asks all workers for their metadata; raises BusUnavailable.
        now: The clock, in seconds.
    """

    def __init__(self, ask: AskWorkers, now: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._now = now
        self._models: dict[tuple[Task, str], Model] = {}
        self._asked_at: float | None = None
        self._was_answered = False
        self._asking: asyncio.Task[None] | None = None

    async def models(self) -> list[Model]:
        """List the models of all tasks."""
        if not self._is_fresh:
            await self._refresh()
        return [model for task in Task for model in self._of(task)]

    async def name_of(self, name: str | None, task: Task) -> str:
        """Return the name of the model that a caller means.

        Args:
            name: The id of a model, the last part of the id, or the name of the task. None or an
                empty text stands for the only model of the task.
            task: The task of the endpoint.

        Raises:
            ApiError: 404: there is no such model for this task; 503: the workers that may serve it
                could not be asked.
        """
        found = self._find(name, task)
        if found is not None:
            if not self._is_fresh:
                self._refresh()  # for the next request; this one does not wait
            return found
        if not self._is_fresh or not self._was_answered:
            await self._refresh()
        found = self._find(name, task)
        if found is None:
            raise self.unknown(
                f"there is no such model for {task}: GET /v1/models lists those there are"
            )
        return found

    def unknown(self, message: str) -> ApiError:
        """Make the answer to a name that is not known: 404, or 503 where no worker has answered."""
        if not self._was_answered:
            return of_error(ServiceUnavailable())
        return ApiError(HTTPStatus.NOT_FOUND, message, "model_not_found", "model")

    @property
    def _is_fresh(self) -> bool:
        return self._asked_at is not None and self._now() - self._asked_at < FRESH

    def _of(self, task: Task) -> list[Model]:
        seen = [model for model in self._models.values() if model.task == task]
        loaded = [model for model in seen if model.is_loaded]
        return loaded or seen or [Model(str(task), task, int(time.time()), is_loaded=False)]

    def _find(self, name: str | None, task: Task) -> str | None:
        if self._asked_at is None:
            return None
        models = self._of(task)
        if not name or name == task:
            return models[0].name
        names = [model.name for model in models]
        if name in names:
            return name
        if self._was_answered and not self._is_seen(task, name):
            return name
        last_parts = {each.rpartition("/")[2].lower(): each for each in reversed(names)}
        return last_parts.get(name.lower())

    def _is_seen(self, task: Task, name: str) -> bool:
        """Whether a task has a model, or the name is that of another task or its model."""
        others = {model.name for model in self._models.values()} | set(Task)
        return name in others or any(model.task == task for model in self._models.values())

    def _refresh(self) -> "asyncio.Task[None]":
        """Ask the workers; several callers wait for one answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_workers(), name="catalogue")
        return self._asking

    async def _ask_workers(self) -> None:
        try:
            answers = await self._ask()
        except BusUnavailable as error:
            log.warning("workers_not_reached", reason=str(error))
            answers = ()
            self._was_answered = False
        else:
            self._was_answered = True
        loaded = set(_named(answers))
        created = {key: model.created for key, model in self._models.items()}
        self._models = {
            (task, name): Model(
                name, task, created.get((task, name), int(time.time())), (task, name) in loaded
            )
            for task, name in sorted(loaded | self._still_known(loaded))
        }
        self._asked_at = self._now()

    def _still_known(self, loaded: set[tuple[Task, str]]) -> set[tuple[Task, str]]:
        answering = {task for task, _ in loaded}
        return {key for key in self._models if key[0] not in answering}


def _named(answers: Iterable[Metadata]) -> Iterable[tuple[Task, str]]:
    for metadata in answers:
        task, name = metadata.get("task"), metadata.get("id", "")
        if task in set(Task) and 0 < len(name) <= MAX_NAME and name.isprintable():
            yield Task(task), name
