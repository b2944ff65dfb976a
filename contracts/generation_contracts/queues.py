"""Queues: which task and which model each one serves, from the metadata of its request stream.

The metadata belong to the stream, so the list of queues is complete without any worker.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from generation_contracts.base import DEFAULT_QUEUES, Task
from generation_contracts.subjects import Subjects, require_queue_name

QUEUE_KEY = "generation.queue"
TASK_KEY = "generation.task"
MODEL_KEY = "generation.model"
CREATED_BY_KEY = "generation.created-by"


@dataclass(frozen=True)
class QueueInfo:
    """A queue of an installation.

    Attributes:
        name: Token in the subjects of the queue.
        task: Task of the requests.
        model: Name of the model that the workers of the queue serve; None if none was declared.
        created_by: What has created the queue; None if unknown.
    """

    name: str
    task: Task
    model: str | None = None
    created_by: str | None = None

    @property
    def is_default(self) -> bool:
        """Whether every installation has this queue."""
        return self.name in DEFAULT_QUEUES

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which a request can ask for the model of the queue."""
        return (self.name,) if self.model is None else (self.name, self.model)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the request stream."""
        values = {
            QUEUE_KEY: self.name,
            TASK_KEY: str(self.task),
            MODEL_KEY: self.model,
            CREATED_BY_KEY: self.created_by,
        }
        return {name: value for name, value in values.items() if value}


def queue_of_stream(config: Mapping[str, Any], subjects: Subjects) -> QueueInfo | None:
    """Return the queue of a request stream; None for a stream that is not one, or unreadable.

    Args:
        config: Configuration of the stream, as in the server's replies.
        subjects: Subjects of the installation.
    """
    metadata = config.get("metadata") or {}
    default = next(
        (t for t in DEFAULT_QUEUES if subjects.requests_stream(t) == config.get("name")), None
    )
    name, task = metadata.get(QUEUE_KEY, default), metadata.get(TASK_KEY, default)
    if name is None or task not in set(Task):
        return None
    try:
        require_queue_name(name, Task(task))
    except ValueError:
        return None
    if subjects.requests_stream(name) != config.get("name"):
        return None
    model = metadata.get(MODEL_KEY)
    return QueueInfo(str(name), Task(task), model or None, metadata.get(CREATED_BY_KEY))


def default_queues() -> dict[str, QueueInfo]:
    """Return the queues that every installation has, by name."""
    return {str(task): QueueInfo(str(task), task) for task in DEFAULT_QUEUES}


def is_named(name: str, known: Iterable[str]) -> bool:
    """Return whether a model is named by one of its names or by the last part of a hub id."""
    wanted = name.lower()
    return any(wanted in {each.lower(), each.rpartition("/")[2].lower()} for each in known)


def queue_for(model: str | None, task: Task, queues: Collection[QueueInfo]) -> QueueInfo | None:
    """Return the queue for the requests of a task that ask for a model.

    Args:
        model: The name of a model or of a queue; None means the default queue, or the only queue of
            a task without one.
        task: Task of the request.
        queues: All queues.

    Returns:
        The queue. Without a match the default queue, if it has not declared its model: its workers
        know what they serve. None if no queue serves the model, or if a task without a default
        queue has several queues and `model` names none of them.
    """
    of_task = sorted(
        (queue for queue in queues if queue.task == task),
        key=lambda queue: (not queue.is_default, queue.name),
    )
    default = next((queue for queue in of_task if queue.name == task), None)
    if default is None and task in DEFAULT_QUEUES:
        default = QueueInfo(str(task), task)
    if default is None and len(of_task) == 1:
        default = of_task[0]
    if model is None:
        return default
    exact = (queue for queue in of_task if model in queue.model_names)
    close = (queue for queue in of_task if is_named(model, queue.model_names))
    found = next(exact, None) or next(close, None)
    accepts_any = default is not None and default.is_default and default.model is None
    return found or (default if accepts_any else None)


def why_no_queue(model: str | None, task: Task) -> str:
    """Return why `queue_for` has found no queue, as text for the sender."""
    if model is None:
        return f"{task} has several queues, or none: name one of them"
    return f"no queue of {task} serves this model"
