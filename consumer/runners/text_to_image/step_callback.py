"""What a pipeline calls at the end of each step: it tells the step, and stops a cancelled run.

Raising is the way that stops all families at once and leaves the next run undisturbed; the flag
`_interrupt` of the pipelines still decodes, and some have none.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from consumer.ports.model import IsCancelled, OnStep
from consumer.runners.faults import StoppedAtStep
from consumer.runners.text_to_image.pipeline_loading import OLD_STEP_CALLBACK, STEP_CALLBACK
from consumer.runners.text_to_image.preview import Preview


class StepCallback:
    """Counts the steps of several runs of a pipeline as those of one.

    Args:
        on_step: Told after each step.
        cancelled: Asked after each step.
        modern: Whether the pipeline takes the callback of today, or the old one.
        run: Which of the runs it is, from 0.
        runs: How many there are.
        preview: Looks at the latents after each step; only with the callback of today.
    """

    def __init__(
        self,
        on_step: OnStep,
        cancelled: IsCancelled,
        *,
        modern: bool,
        run: int,
        runs: int,
        preview: Preview | None = None,
    ) -> None:
        self._modern = modern
        self._on_step = on_step
        self._cancelled = cancelled
        self._run = run
        self._runs = runs
        self._preview = preview

    def arguments(self, asked: int) -> dict[str, Any]:
        """The callback as the pipeline takes it, for a number of steps asked for."""
        if self._modern:
            return {STEP_CALLBACK: partial(self._at_end, asked)}
        return {OLD_STEP_CALLBACK: partial(self._at_end_of_old, asked), "callback_steps": 1}

    def _at_end(
        self, asked: int, pipe: Any, index: int, _time: Any, tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        # Second-order schedulers make nearly twice as many steps as were asked for.
        self._tell(index, getattr(pipe, "_num_timesteps", None) or asked)
        if self._preview is not None and "latents" in tensors:
            self._preview.step(pipe, index, tensors["latents"])
        return {}  # None raises in the pipelines

    def _at_end_of_old(self, asked: int, index: int, *_: Any) -> None:
        self._tell(index, asked)

    def _tell(self, index: int, steps: int) -> None:
        done = self._run * steps + index + 1
        self._on_step(done, self._runs * steps)
        if self._cancelled():
            raise StoppedAtStep
