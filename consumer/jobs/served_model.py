"""The model that a worker serves, by the names that requests may use."""

from dataclasses import dataclass

from consumer.ports.model import UnsupportedParameter
from generation_contracts import Request
from generation_contracts.queues import QueueInfo, is_named


@dataclass(frozen=True)
class ServedModel:
    """The model of one worker.

    Attributes:
        queue: The queue of the worker, with the model that the queue declares.
        model_id: Id of the loaded model.
    """

    queue: QueueInfo
    model_id: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a request can ask for this model."""
        return tuple(dict.fromkeys((*self.queue.model_names, self.model_id)))

    def check(self, request: Request) -> None:
        """Refuse a request for another model.

        Raises:
            UnsupportedParameter: The request names another model.
        """
        if request.model is None or is_named(request.model, self.names):
            return
        raise UnsupportedParameter(
            "model",
            f"model: the queue {self.queue.name} serves {' or '.join(self.names[1:])}; "
            "`consumer queues list` and GET /v1/models list the others",
        )
