"""Port of the model: a runner, which the inference thread calls."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import JsonValue

from consumer.ports.media import OutputFormat
from generation_contracts import ModelInfo, Request
from generation_contracts.events import ParameterValue

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ModelDescription:
    """Identity, parameters and limits of a loaded model.

    Attributes:
        info: Published in events.
        parameters: Names of the optional request fields that the model supports; a request with
            any other optional field is refused.
        defaults: Values for fields that a request leaves out.
        request_schema: JSON Schema of the requests; None: the schema of the contract.
        size_multiple: Width and height must be multiples of it, in pixels; None for text.
        max_pixels: Limit of width times height of an output image; None for text.
        least_steps: Minimum number of denoising steps; None for text.
    """

    info: ModelInfo
    parameters: frozenset[str]
    defaults: Mapping[str, int | float | str | None]
    request_schema: Mapping[str, Any] | None = None
    size_multiple: int | None = None
    max_pixels: int | None = None
    least_steps: int | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One image from the model."""

    image: "Image"
    seed: int
    flagged: bool | None = None  # by the safety checker; None without a safety checker
    output_format: OutputFormat | None = None  # None: as the request says


@dataclass(frozen=True)
class GeneratedText:
    """One text from the model, without the tokens of the prompt."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seed: int | None = None  # None: no sampling


@dataclass(frozen=True)
class GeneratedFile:
    """Bytes from the model, which are stored unchanged."""

    data: bytes = field(repr=False)
    media_type: str
    extension: str


@dataclass(frozen=True)
class GeneratedJson:
    """A JSON value from the model."""

    value: JsonValue


GeneratedOutput = GeneratedImage | GeneratedText | GeneratedFile | GeneratedJson


@dataclass(frozen=True)
class RunnerOutput:
    """Output of one run.

    Attributes:
        outputs: In the order of the event; empty if the output was refused.
        refused: Whether the safety checker flagged an image and the policy is to fail; then there
            are no outputs.
    """

    outputs: tuple[GeneratedOutput, ...] = ()
    refused: bool = False
    warnings: tuple[str, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)  # defaults included

    @property
    def images(self) -> tuple[GeneratedImage, ...]:
        """The images among the outputs."""
        return tuple(output for output in self.outputs if isinstance(output, GeneratedImage))

    @property
    def files(self) -> tuple[GeneratedImage | GeneratedFile, ...]:
        """The outputs that are stored as files."""
        kinds = GeneratedImage | GeneratedFile
        return tuple(output for output in self.outputs if isinstance(output, kinds))

    @property
    def text(self) -> GeneratedText | None:
        """The first text among the outputs."""
        texts = (output for output in self.outputs if isinstance(output, GeneratedText))
        return next(texts, None)


class RunProgress(Protocol):
    """Progress reports of a run. The inference thread calls the methods between two steps."""

    def step(self, done: int, of: int) -> None:
        """Report the number of finished steps, and the total as far as the run knows it."""

    def text(self, added: str) -> None:
        """Report text that was appended, if the request enables text streaming."""

    def preview(self, jpeg: bytes) -> None:
        """Report a preview of the image as a small JPEG file, if the request enables previews."""


@dataclass(frozen=True, eq=False)
class RunRequest:
    """One request of a run.

    Attributes:
        request: The request, with a seed; `Runner.check` has accepted it.
        images: The decoded inputs, RGB; empty for text-to-image.
        progress: Receives the progress of the run.
        cancelled: Called after each step; when it returns True the run stops for this request.
    """

    request: Request
    images: Sequence["Image"]
    progress: RunProgress
    cancelled: Callable[[], bool]


class Runner(Protocol):
    """A model. Every method is called in the inference thread, unless its docstring says otherwise.

    One thread per loaded model is a correctness requirement: a diffusers pipeline that two threads
    share raises IndexError or silently produces wrong images.
    """

    def load(self) -> ModelDescription:
        """Load the weights.

        Raises:
            ModelUnavailable: The model cannot be loaded; the text is one line.
        """

    def check(self, request: Request) -> None:
        """Validate the request against the model, without a run; any thread may call it.

        Raises:
            UnsupportedParameter: The model does not support a field or its value.
        """

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> Sequence[RunnerOutput | None]:
        """Run the model once.

        After each step the runner reports the progress of each request and calls its `cancelled`.
        For a cancelled request it stops both and returns no output; the other requests continue.

        Args:
            runs: One request, or several with equal `batch_key`.
            save_memory: Use the options that need less memory and more time; for one request.

        Returns:
            One output for each request, in their order; None for a cancelled request.

        Raises:
            Interrupted: All requests were cancelled; the model is ready for the next run.
            UnsupportedParameter: The model refused a value that `check` could not validate.
            OutOfMemory: The device has too little memory; the runner has freed what it could.
            DeviceLost: This process cannot use the device any more.
            ModelError: Any other failure inside the model.
        """

    def batch_key(self, request: Request) -> Hashable | None:
        """Return a key that is equal for requests that can run as one batch.

        Any thread may call it.

        Args:
            request: A request with a seed, which `check` has accepted.

        Returns:
            The key; None if the request must run alone.
        """

    def close(self) -> None:
        """Release the weights."""


class ModelUnavailable(Exception):  # noqa: N818 - a state of the model
    """The model cannot be loaded."""


class ModelMisconfigured(ModelUnavailable):
    """A setting of the model is wrong: a restart does not help. The text begins with its name."""


class UnsupportedParameter(Exception):  # noqa: N818 - the contract's word: unsupported_parameter
    """The model does not support a parameter, or not this value; the text is safe to show."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Interrupted(Exception):  # noqa: N818 - not an error: the caller requested it
    """The run was stopped because `cancelled` returned True."""


class OutOfMemory(Exception):  # noqa: N818 - the contract's word for it is out_of_memory
    """The device has too little memory for the run.

    Attributes:
        tried: The memory-saving options that were enabled; the texts are safe to show.
    """

    def __init__(self, message: str, tried: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried


class DeviceLost(Exception):  # noqa: N818 - a state of the device
    """A sticky device error: every later call in this process would fail as well."""


class ModelError(Exception):
    """The model raised; the text, the exception's class name, is safe to show."""
