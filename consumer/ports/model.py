"""Port of the model: a runner, and the one thread that calls it."""

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar

from generation_contracts import ModelInfo, Request
from generation_contracts.events import ParameterValue

if TYPE_CHECKING:
    from PIL.Image import Image


P = ParamSpec("P")
T = TypeVar("T")


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


OnStep = Callable[[int, int], None]  # (steps done, steps in all); called in the inference thread
OnPreview = Callable[[bytes], None]  # (a small JPEG file); called in the inference thread
OnText = Callable[[str], None]  # (what has been added to the text); called in the inference thread
IsCancelled = Callable[[], bool]


@dataclass(frozen=True, eq=False)
class BatchMember:
    """One of several requests that run as one; see `Runner.run` for what each field is."""

    request: Request
    images: Sequence["Image"]
    on_step: OnStep
    cancelled: IsCancelled


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
        self,
        request: Request,
        images: Sequence["Image"],
        *,
        on_step: OnStep,
        cancelled: IsCancelled,
        on_text: OnText | None = None,
        on_preview: OnPreview | None = None,
        save_memory: bool = False,
    ) -> RunnerOutput:
        """Run the model once.

        Args:
            request: A request that `check` has passed.
            images: Its decoded inputs, RGB; empty for text-to-image.
            on_step: Told after each step.
            cancelled: Asked after each step; when it says yes, the run stops there.
            on_text: Told what is added to a text, where the request wants to see it grow.
            on_preview: Told how a picture looks so far, where the request wants to see it.
            save_memory: Turn on what makes the run smaller and slower, for a second try.

        Raises:
            Interrupted: `cancelled` said yes; the model is ready for the next run.
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

    def run_batch(self, members: Sequence[BatchMember]) -> Sequence[RunnerOutput | None]:
        """Run the model once for several requests.

        After each step each member's `on_step` is told and its `cancelled` asked. Who says yes is
        asked no more and gets no output; the others go on.

        Args:
            members: Two or more whose `batch_key` is the same.

        Returns:
            One output for each, in their order; None for who was cancelled.

        Raises:
            Interrupted: All of them were cancelled.
            Exception: What `run` raises; it may be one member's fault, and nobody can tell whose.
        """

    def close(self) -> None:
        """Let go of the weights."""


class Inference(Protocol):
    """The one thread in which the runner's methods are called."""

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Call a function there, and wait for what it gives."""

    def call_next(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Awaitable[T]:
        """Have a function called there as soon as the call that is under way returns.

        Where that raises, or none is under way, it waits for one that returns: take it back then.
        There is one place for such a call.
        """

    def take_back(self) -> bool:
        """Do not make the call of `call_next`; False: it has begun."""


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
