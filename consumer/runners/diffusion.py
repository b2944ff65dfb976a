"""Text to image: any pipeline that diffusers loads from a model_index.json."""

# mypy: allow-untyped-calls

import copy
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance
from PIL import Image as Pillow

from consumer.ports import (
    GeneratedImage,
    Interrupted,
    IsCancelled,
    ModelDescription,
    OnStep,
    RunnerOutput,
)
from consumer.runners import memory, quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import BadOutput, StoppedAtStep, translated
from consumer.runners.parameters import Parameters
from consumer.runners.pipeline_loading import (
    OLD_STEP_CALLBACK,
    STEP_CALLBACK,
    download,
    load_pipeline,
)
from consumer.runners.source import located
from consumer.runners.truncation import Cuts
from generation_contracts import ModelInfo, Request, Task, TextToImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = 2**32  # seeds are below it; picture n has seed + n, modulo this
CHANNELS = 3  # red, green, blue


def load(config: ModelConfig) -> "DiffusionModel":
    """Load the configured pipeline.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    quantization.see_that_it_can_be(config, placement)
    with located(Task.TEXT_TO_IMAGE, config, download) as source:
        pipe = load_pipeline(source, placement, config)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=type(pipe).__name__.removesuffix("Pipeline"),
        dtype=placement.dtype_name,
        device=placement.device.type,
    )
    return DiffusionModel(pipe, placement, info, offloaded=config.offload != "none")


class DiffusionModel:
    """A loaded pipeline; see `consumer.ports.Runner` for what its methods promise.

    Args:
        pipe: The pipeline whose weights all runs share. A run has a copy of its own, with a
            scheduler of its own; never one from `from_pipe`, which casts the shared weights.
        placement: Where it was put.
        info: What it is called.
        offloaded: Whether its parts wait in main memory.
    """

    def __init__(
        self, pipe: Any, placement: Placement, info: ModelInfo, *, offloaded: bool
    ) -> None:
        self._pipe = pipe
        self._placement = placement
        self._parameters = Parameters(pipe, info)
        self._types = memory.types_of(pipe)
        self._undo = ExitStack()  # what saves memory in this run
        self._can_offload = placement.device.type != "cpu" and not offloaded

    @property
    def description(self) -> ModelDescription:
        """What the pipeline is and takes."""
        return self._parameters.description

    def check(self, request: Request) -> None:
        """See whether the pipeline can do what is asked."""
        self._parameters.check(_text_to_image(request))

    def run(
        self,
        request: Request,
        images: Sequence["Image"],  # noqa: ARG002 - of the port; a text is all that is read
        *,
        on_step: OnStep,
        cancelled: IsCancelled,
        save_memory: bool,
    ) -> RunnerOutput:
        """Make the pictures of one request."""
        if cancelled():
            raise Interrupted("stopped before the first step")
        asked = _text_to_image(request)
        return translated(
            lambda: self._make(asked, on_step, cancelled, save_memory=save_memory),
            free=self._free,
        )

    def close(self) -> None:
        """Give the device's memory back."""
        del self._pipe, self._parameters  # each of them holds the weights
        release(self._placement.device)

    def _make(
        self,
        request: TextToImageRequest,
        on_step: OnStep,
        cancelled: IsCancelled,
        *,
        save_memory: bool,
    ) -> RunnerOutput:
        first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        seeds = [(first + n) % SEEDS for n in range(request.num_images)]
        batches = [[seed] for seed in seeds] if save_memory else [seeds]
        cuts = Cuts()
        pictures: list[GeneratedImage] = []
        blanked = 0
        with torch.inference_mode():
            if save_memory:
                device = self._placement.device
                memory.save(self._undo, self._pipe, device, offload=self._can_offload)
            for number, batch in enumerate(batches):
                steps = _Steps(
                    on_step,
                    cancelled,
                    modern=self._parameters.takes(STEP_CALLBACK),
                    run=number,
                    runs=len(batches),
                )
                arrays, blanks = self._run_pipeline(request, batch, steps, cuts)
                pictures += map(GeneratedImage, map(_picture, arrays), batch)
                blanked += blanks
            self._undo.close()
        warnings = cuts.warnings()
        if blanked:
            warnings += (f"the model's safety checker blanked pictures: {blanked}",)
        if save_memory:
            warnings += ("memory was short: made one picture at a time, decoded in tiles",)
        return RunnerOutput(images=tuple(pictures), warnings=warnings)

    def _run_pipeline(
        self, request: TextToImageRequest, seeds: list[int], steps: "_Steps", cuts: Cuts
    ) -> tuple[Any, int]:
        pipe = self._own_pipeline(request, cuts)
        try:
            output = pipe(
                **self._parameters.arguments(request),
                **steps.arguments(self._parameters.steps(request)),
                num_images_per_prompt=len(seeds),
                # One for each picture, and on the CPU, whose numbers are the same everywhere.
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            )
        finally:
            # Also after a failure: a step cache or an offloaded part would spoil the next run.
            pipe.maybe_free_model_hooks()
        width, height = self._parameters.size(request)
        arrays = np.asarray(output.images)
        if arrays.shape != (len(seeds), height, width, CHANNELS):
            raise BadOutput("the model made pictures of another shape than asked for")
        if not np.isfinite(arrays).all():
            raise BadOutput("the model made pixels that are not numbers")
        flags = getattr(output, "nsfw_content_detected", None) or []
        return arrays, sum(bool(flag) for flag in flags)

    def _own_pipeline(self, request: TextToImageRequest, cuts: Cuts) -> Any:
        """A shallow copy with its own state: a fresh scheduler and guider, watched tokenizers."""
        pipe = copy.copy(self._pipe)
        parts: dict[str, Any] = self._pipe.components
        for name, part in parts.items():
            if isinstance(part, SchedulerMixin):
                scheduler: Any = part
                setattr(pipe, name, scheduler.from_config(scheduler.config))
            elif isinstance(part, BaseGuidance):
                scale = request.guidance_scale
                mine = {} if scale is None or name != "guider" else {"guidance_scale": scale}
                setattr(pipe, name, part.new(**mine))
            elif (watched := cuts.watched(name, part)) is not part:
                setattr(pipe, name, watched)
        return pipe

    def _free(self) -> None:
        release(self._placement.device)
        with torch.inference_mode():
            self._undo.close()
            memory.restore_types(self._pipe, self._types)


class _Steps:
    """Tells each step, and stops the pipeline when it is cancelled.

    Raising is the way that stops all families at once and leaves the next run undisturbed; the flag
    `_interrupt` of the pipelines still decodes, and some have none.
    """

    def __init__(
        self, on_step: OnStep, cancelled: IsCancelled, *, modern: bool, run: int, runs: int
    ) -> None:
        self._modern = modern
        self._on_step = on_step
        self._cancelled = cancelled
        self._run = run
        self._runs = runs

    def arguments(self, asked: int) -> dict[str, Any]:
        """The callback as the pipeline takes it, for a number of steps asked for."""
        if self._modern:
            return {STEP_CALLBACK: partial(self._at_end, asked)}
        return {OLD_STEP_CALLBACK: partial(self._at_end_of_old, asked), "callback_steps": 1}

    def _at_end(self, asked: int, pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        # Second-order schedulers make nearly twice as many steps as were asked for.
        self._tell(index, getattr(pipe, "_num_timesteps", None) or asked)
        return {}  # None raises in the pipelines

    def _at_end_of_old(self, asked: int, index: int, *_: Any) -> None:
        self._tell(index, asked)

    def _tell(self, index: int, steps: int) -> None:
        done = self._run * steps + index + 1
        self._on_step(done, self._runs * steps)
        if self._cancelled():
            raise StoppedAtStep


def _text_to_image(request: Request) -> TextToImageRequest:
    if not isinstance(request, TextToImageRequest):
        raise TypeError("a request for another task")
    return request


def _picture(array: Any) -> "Image":
    return Pillow.fromarray((array * 255).round().astype(np.uint8))
