"""The models that workers serve, by their names, as the workers report them."""

from dataclasses import dataclass

from generation_contracts import Task


@dataclass(frozen=True)
class Model:
    """A model that callers may name.

    Attributes:
        name: What `/v1/models` lists and `model` in a request names.
        task: The queue that its requests go to.
        owner: What `owned_by` says.
    """

    name: str
    task: Task
    owner: str = "generation-consumer"


class Catalogue:
    """The models of all workers."""
