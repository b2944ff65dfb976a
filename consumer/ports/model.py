"""Port of the model: a runner, which the inference thread calls."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from generation_contracts import ModelInfo, Request
from generation_contracts.events import ParameterValue

if TYPE_CHECKING:
    from PIL.Image import Image


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
