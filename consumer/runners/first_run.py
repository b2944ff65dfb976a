"""The run before the first job: it triggers compilation and shows that the options work.

Only a run shows whether a kernel supports the device, or a cache the family. The one-time work of a
first run also does not delay the first job.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from consumer.ports.model import (
    DeviceLost,
    ModelError,
    ModelUnavailable,
    OutOfMemory,
    RunRequest,
    UnsupportedParameter,
)
from consumer.runners.task_settings import runner_spec
from generation_contracts import Request, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from consumer.runners.runner import LoadedModel

log = structlog.get_logger()


def run_once(model: "LoadedModel", task: Task, settings: tuple[str, ...]) -> None:
    """Generate one output of the default size in the fewest steps that use all features.

    Args:
        model: The loaded model; closed if the run fails.
        task: The model's task.
        settings: The settings that the run validates, for the message.

    Raises:
        ModelUnavailable: One line with the settings and the failure.
    """
    if failure := _failure(model, task, save_memory=False):
        model.close()
        raise _refusal(settings, failure)


def probe_once(model: "LoadedModel", task: Task, reasons: tuple[str, ...]) -> None:
    """Generate one output to show that a model works, for reasons other than a setting.

    Like a job, the run is repeated with the measures that save memory if memory is short. If it is
    still out of memory, the model is not refused, because smaller requests can succeed.

    Args:
        model: The loaded model; closed if the run fails.
        task: The model's task.
        reasons: The properties of the model that the run validates, for the message.

    Raises:
        ModelUnavailable: One line with the reasons and the failure.
    """
    for save_memory in (False, True):
        failure = _failure(model, task, save_memory=save_memory)
        if failure is None:
            return
        if not isinstance(failure, OutOfMemory):
            model.close()
            raise _refusal(reasons, failure)
    log.warning("first_run_out_of_memory", untried=reasons)


def probe_request(request: Request, images: Sequence["Image"]) -> RunRequest:
    """Return a run that is never cancelled and drops its progress."""
    return RunRequest(request, images, _NoProgress(), lambda: False)


def _failure(model: "LoadedModel", task: Task, *, save_memory: bool) -> Exception | None:
    try:
        request, images = runner_spec(task).smallest(model.description)
        model.check(request)
        model.run([probe_request(request, images)], save_memory=save_memory)
    except (UnsupportedParameter, OutOfMemory, DeviceLost, ModelError) as error:
        return error.with_traceback(None)  # the frames would keep the tensors of the run alive
    return None


def _refusal(names: tuple[str, ...], failure: Exception) -> ModelUnavailable:
    return ModelUnavailable(f"{', '.join(names)}: the first run failed: {failure}")


class _NoProgress:
    """A `consumer.ports.model.RunProgress` that drops everything."""

    def step(self, done: int, of: int) -> None:
        """Drop the step."""

    def text(self, added: str) -> None:
        """Drop the text."""

    def preview(self, jpeg: bytes) -> None:
        """Drop the preview."""
