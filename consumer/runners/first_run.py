"""The run before the first job: it compiles what is compiled, and shows that the options work.

Whether a kernel takes this device, or a cache this family, shows nowhere else; and the first job
need not wait for what a first run does only once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from consumer.ports.model import (
    DeviceLost,
    ModelDescription,
    ModelError,
    ModelUnavailable,
    OutOfMemory,
    RunRequest,
    UnsupportedParameter,
)
from generation_contracts import ImageToTextRequest, Request, Task, TextToImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from consumer.runners.runner import LoadedModel

log = structlog.get_logger()

_STEPS = 2  # the first fills a step cache, the second reads it
_TOKENS = 2  # the first comes from the prompt, the second from the cache of keys and values
_SIDE = 224  # pixels of the image that is read
_SEED = 0
_UNREAD = "s3://first-run/image.png"  # whoever runs a model gives it the decoded image


def run_once(model: "LoadedModel", task: Task, settings: tuple[str, ...]) -> None:
    """Make one output of the default size in the fewest steps that pass through everything.

    Args:
        model: Just loaded; closed if it fails.
        task: What it makes.
        settings: Names of the settings whose effect the run shows, for the message.

    Raises:
        ModelUnavailable: One line with the settings and what the run raised.
    """
    if failure := _failure(model, task, save_memory=False):
        model.close()
        raise _refusal(settings, failure)


def probe_once(model: "LoadedModel", task: Task, reasons: tuple[str, ...]) -> None:
    """Show by one output that a model works, where no setting asked for the run.

    The run saves memory where it must, as a job does. A run that is out of memory shows nothing:
    smaller requests can still succeed, so the model is not refused.

    Args:
        model: Just loaded; closed if it fails.
        task: What it makes.
        reasons: What of the model only a run can show to work, for the message.

    Raises:
        ModelUnavailable: One line with the reasons and what the run raised.
    """
    for save_memory in (False, True):
        failure = _failure(model, task, save_memory=save_memory)
        if failure is None:
            return
        if not isinstance(failure, OutOfMemory):
            model.close()
            raise _refusal(reasons, failure)
    log.warning("first_run_out_of_memory", untried=reasons)


def unattended(request: Request, images: Sequence["Image"]) -> RunRequest:
    """A run that is not cancelled, and whose progress nothing reads."""
    return RunRequest(request, images, _NoProgress(), lambda: False)


def _failure(model: "LoadedModel", task: Task, *, save_memory: bool) -> Exception | None:
    try:
        request, images = _least(model.description, task)
        model.check(request)
        model.run([unattended(request, images)], save_memory=save_memory)
    except (UnsupportedParameter, OutOfMemory, DeviceLost, ModelError) as error:
        return error.with_traceback(None)  # its frames would keep the tensors of the run
    return None


def _refusal(names: tuple[str, ...], failure: Exception) -> ModelUnavailable:
    return ModelUnavailable(f"{', '.join(names)}: the first run failed: {failure}")


def _least(description: ModelDescription, task: Task) -> tuple[Request, list["Image"]]:
    if task is Task.IMAGE_TO_TEXT:
        from PIL import Image

        image = Image.new("RGB", (_SIDE, _SIDE), "gray")
        request = ImageToTextRequest(
            prompt="What is it?", images=(_UNREAD,), max_new_tokens=_TOKENS, seed=_SEED
        )
        return request, [image]
    default = description.defaults.get("num_inference_steps")
    steps = min(_STEPS, default) if isinstance(default, int) else _STEPS
    steps = max(steps, description.least_steps or 1)
    return TextToImageRequest(prompt="a gray square", num_inference_steps=steps, seed=_SEED), []


class _NoProgress:
    """A `consumer.ports.model.RunProgress` that nothing reads."""

    def step(self, done: int, of: int) -> None:
        """Drop it."""

    def text(self, added: str) -> None:
        """Drop it."""

    def preview(self, jpeg: bytes) -> None:
        """Drop it."""
