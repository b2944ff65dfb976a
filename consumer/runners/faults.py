"""Translation of a model's exceptions into those of the ports, without keeping tensors alive.

A traceback refers to every frame, and the frames refer to the tensors of the failed run. Memory can
therefore be freed only after the `except` block, and the translated exception must not refer to the
original one.
"""

import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from consumer.ports.model import (
    DeviceLost,
    Interrupted,
    ModelError,
    ModelUnavailable,
    OutOfMemory,
    UnsupportedParameter,
)

T = TypeVar("T")

log = structlog.get_logger()

# torch has a specific exception for a full cuda device only; the others are RuntimeErrors.
_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_CUDA_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation: the only device error that is not sticky
_LINE = 300  # the most characters of a library's message in a log or message
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+[^\s/'\"]*")


class StoppedAtStep(Exception):  # noqa: N818 - not an error: the run was cancelled
    """Raised in the step callback to leave the library's code when a run is cancelled."""


class BadOutput(Exception):  # noqa: N818 - a state of the output
    """The model ran, but its output is not a result. The message contains no text of a request."""


def translate_failures(
    run: Callable[[], T], *, free: Callable[[], None], saved: Sequence[str] = ()
) -> T:
    """Run a model and raise only the exceptions of `consumer.ports.model.Runner.run`.

    Args:
        run: The run.
        free: Frees the memory of a failed run. It is called when nothing refers to the run's
            tensors any more, and not when the device is lost.
        saved: The measures of the run that save memory, as text for the sender; read after a
            failure.

    Raises:
        Interrupted, UnsupportedParameter, OutOfMemory, DeviceLost, ModelError: See the port.
    """
    failure: Exception
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - every exception is translated
        failure = _translate(error, tuple(saved))
    try:
        if not isinstance(failure, DeviceLost):
            free()
    except torch.AcceleratorError:
        failure = DeviceLost("the device failed while its memory was freed")
    try:
        raise failure from None
    finally:
        del failure, run, free  # the traceback refers to this frame too


def load_failure(error: Exception, *, name: str, folder: Path | None = None) -> ModelUnavailable:
    """Log an exception of loading a model, and translate it into one line without a path.

    Args:
        error: What a library raised.
        name: The model's name in the message.
        folder: Replaced in the message by the name.
    """
    log.error("model_not_loaded", model=name, error=type(error).__name__, detail=str(error))
    if _is_out_of_memory(error):
        return ModelUnavailable(f"{name}: does not fit into the device's memory")
    text = str(error) if folder is None else str(error).replace(str(folder), name)
    line = " ".join(_ABSOLUTE_PATH.sub("…", text).split())[:_LINE]
    return ModelUnavailable(f"{name}: cannot be loaded: {line or type(error).__name__}")


def _translate(error: Exception, saved: tuple[str, ...]) -> Exception:
    match error:
        case StoppedAtStep() | Interrupted():
            return Interrupted("stopped at a step")
        case UnsupportedParameter():
            return UnsupportedParameter(error.parameter, str(error))
        case BadOutput():
            log.error("model_output_unusable", reason=str(error))
            return ModelError(str(error))
    if _is_out_of_memory(error):
        return OutOfMemory("the device's memory did not suffice", saved)
    if isinstance(error, torch.AcceleratorError):
        log.error("device_lost", error=type(error).__name__, where=_where(error))
        return DeviceLost("the device cannot be used any more")
    # The exception's message can quote the prompt, so only its class and source line are reported.
    log.error("model_raised", error=type(error).__name__, where=_where(error))
    return ModelError(type(error).__name__)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_MEMORY_ALLOCATION
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"
