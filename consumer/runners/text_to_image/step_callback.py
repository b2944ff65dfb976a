"""The callback that a pipeline calls after each step: it reports progress and stops cancelled runs.

A cancelled run is stopped by an exception, which works for all families and does not affect the
next run. With the flag `_interrupt`, pipelines still decode the image, and some lack the flag.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from consumer.runners.faults import StoppedAtStep
from consumer.runners.text_to_image.pipeline_loading import OLD_STEP_CALLBACK, STEP_CALLBACK
from consumer.runners.text_to_image.preview import Preview


class StepCallback:
    """Reports the steps of several calls of a pipeline as the steps of one run.

    Args:
        on_step: Called after each step with the steps done and the steps in total.
        cancelled: Polled after each step; the run stops when it returns True.
        on_step_end: Whether the pipeline takes `callback_on_step_end`, or the older `callback`.
        run: Index of this call of the pipeline, from 0.
        runs: Number of calls.
        preview: Gets the latents after each step; only with `callback_on_step_end`.
    """

    def __init__(
        self,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool],
        *,
        on_step_end: bool,
        run: int,
        runs: int,
        preview: Preview | None = None,
    ) -> None:
        self._has_step_end = on_step_end
        self._on_step = on_step
        self._cancelled = cancelled
        self._run = run
        self._runs = runs
        self._preview = preview

    def arguments(self, requested: int) -> dict[str, Any]:
        """Return the pipeline's keyword arguments for a requested number of steps."""
        if self._has_step_end:
            return {STEP_CALLBACK: partial(self._on_step_end, requested)}
        return {OLD_STEP_CALLBACK: partial(self._on_old_callback, requested), "callback_steps": 1}

    def _on_step_end(
        self, requested: int, pipe: Any, index: int, _time: Any, tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        # Second-order schedulers make nearly twice as many steps as requested.
        self._report(index, getattr(pipe, "_num_timesteps", None) or requested)
        if self._preview is not None and "latents" in tensors:
            self._preview.step(pipe, index, tensors["latents"])
        return {}  # the pipelines raise if this is None

    def _on_old_callback(self, requested: int, index: int, *_: Any) -> None:
        self._report(index, requested)

    def _report(self, index: int, steps: int) -> None:
        done = self._run * steps + index + 1
        self._on_step(done, self._runs * steps)
        if self._cancelled():
            raise StoppedAtStep
