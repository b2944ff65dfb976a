"""What a model raises, translated into the exceptions of the ports, without keeping its tensors.

A traceback keeps every frame, and the frames keep the tensors of the failed run: memory can only be
given back after the `except` block has been left, and what is raised then must not refer to the
original.
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

# torch has an exception of its own for a full cuda device only; the rest are plain RuntimeErrors.
_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_CUDA_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation: the one device error that is not sticky
_LINE = 300  # characters of a library's message that are worth showing
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+[^\s/'\"]*")


class StoppedAtStep(Exception):  # noqa: N818 - not an error: it was asked for
    """Raised in a step's callback: the way out of the libraries when a run is to stop."""


class BadOutput(Exception):  # noqa: N818 - a state of the output
    """The model ran, but what it made is not a result; the text is safe to show."""


def translated(run: Callable[[], T], *, free: Callable[[], None], saved: Sequence[str] = ()) -> T:
    """Run a model and raise nothing but the exceptions of `consumer.ports.model.Runner.run`.

    Args:
        run: The run.
        free: Gives back what an ended run holds; called once nothing refers to its tensors, and not
            when the device is lost.
        saved: What the run did to save memory, in words for the sender; read when it has failed.

    Raises:
        Interrupted, UnsupportedParameter, OutOfMemory, DeviceLost, ModelError: See the port.
    """
    failure: Exception
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - each of them is translated
        failure = _translate(error, tuple(saved))
    try:
        if not isinstance(failure, DeviceLost):
            free()
    except torch.AcceleratorError:
        failure = DeviceLost("the device failed while its memory was given back")
    try:
        raise failure from None
    finally:
        del failure, run, free  # the traceback keeps this frame as well


def load_failure(error: Exception, *, name: str, folder: Path | None = None) -> ModelUnavailable:
    """One clear line, without a path, for what the libraries raised while they loaded a model."""
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
    # The message of the exception can quote the prompt: only its class and place are told.
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
