"""The base class of runners, and what a run is given."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from generation_runner.outputs import Output

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


class Parameters(BaseModel):
    """Base of the parameters of a runner: an unknown name is an error, as in all requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoParameters(Parameters):
    """The parameters of a runner that has none."""


class Cancelled(BaseException):
    """The request was cancelled. Let it pass; a `finally` block may clean up.

    It is a BaseException, so that `except Exception` in a library does not swallow it.
    """


class Context(Protocol):
    """What one run is given, and how it reports."""

    @property
    def images(self) -> "Sequence[PillowImage]":
        """The input images: RGB, upright, transparent parts over white."""

    @property
    def seed(self) -> int:
        """Seed of all random numbers: the request's, or one derived from its id."""

    @property
    def cancelled(self) -> bool:
        """Whether the request was cancelled. `step` raises by itself."""

    def step(self, done: int, of: int) -> None:
        """Report progress.

        Call it at least once a minute: a run without a step for `CONSUMER_STALL_TIMEOUT` counts as
        stalled, and a cancellation takes effect at the next step.

        Args:
            done: Finished steps.
            of: All steps.

        Raises:
            Cancelled: The request was cancelled.
        """

    def warn(self, text: str) -> None:
        """Add a warning to the result event, for example about a value that had no effect."""


P = TypeVar("P", bound=BaseModel)


class Runner(ABC, Generic[P]):
    """A model that a worker loads once and runs for each request.

    All methods are called in one thread, in this order: the constructor without arguments, `load`,
    any number of `run` or `run_batch`, `close`. An exception in `load` ends the worker. One in
    `run` fails the attempt; its text is not shown to the sender, because it could quote the
    request.

    Attributes:
        parameters: Validates the `parameters` of a request before it runs.
        min_images: Fewest input images of a request.
        max_images: Most input images of a request.
        name: Name of the model in events; empty means the name of the class.
        version: Version of the model in events; empty means none.
    """

    parameters: ClassVar[type[BaseModel]] = NoParameters
    min_images: ClassVar[int] = 0
    max_images: ClassVar[int] = 0
    name: ClassVar[str] = ""
    version: ClassVar[str] = ""

    def load(self, device: str) -> None:
        """Load the model.

        Args:
            device: `cuda`, `mps` or `cpu`, by MODEL_DEVICE.
        """

    @abstractmethod
    def run(self, parameters: P, context: Context) -> Output | Sequence[Output]:
        """Run the model for one request, and return its outputs."""

    def batch_key(self, _: P, /) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: they run one by one.

        Any thread may call it.
        """
        return None

    def run_batch(
        self, parameters: Sequence[P], contexts: Sequence[Context]
    ) -> Sequence[Output | Sequence[Output]]:
        """Run several requests with equal `batch_key`; see CONSUMER_MAX_BATCH.

        Here `Context.step` does not raise: the others of the batch go on. Without an
        implementation the requests run one after the other.

        Returns:
            The outputs of each request, in their order; those of a cancelled request are dropped.
        """
        return [self.run(*each) for each in zip(parameters, contexts, strict=True)]

    def close(self) -> None:
        """Release what `load` has taken. Called once, also if `load` has failed."""
