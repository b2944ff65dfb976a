"""Text to image: any pipeline that diffusers loads from a model_index.json."""

# mypy: allow-untyped-calls

import secrets
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as Pillow

from consumer.ports.model import (
    GeneratedImage,
    Interrupted,
    ModelDescription,
    RunnerOutput,
    RunRequest,
)
from consumer.runners import first_run, options
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import BadOutput, translated
from consumer.runners.source import located
from consumer.runners.text_to_image import memory
from consumer.runners.text_to_image.adapter_files import find_adapters
from consumer.runners.text_to_image.adapters import Adapters
from consumer.runners.text_to_image.batch import BatchKeys, arguments_of_a_batch
from consumer.runners.text_to_image.image_run import BatchMembers, ImageRun, Wanted
from consumer.runners.text_to_image.memory_guard import FreeBytes, free_bytes, least_to_decode
from consumer.runners.text_to_image.own_pipeline import own_pipeline
from consumer.runners.text_to_image.parameters import Parameters
from consumer.runners.text_to_image.pipeline_loading import STEP_CALLBACK, download, load_pipeline
from consumer.runners.text_to_image.preview import Preview
from consumer.runners.text_to_image.safety import SafetyChecker, load_checker
from consumer.runners.text_to_image.step_callback import StepCallback
from consumer.runners.text_to_image.trial import parts_to_try
from consumer.runners.text_to_image.truncation import TruncationTracker
from generation_contracts import ModelInfo, Request, Task, TextToImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = 2**32  # seeds are below it; image n has seed + n, modulo this
CHANNELS = 3  # red, green, blue


def load(config: ModelConfig) -> "DiffusionModel":
    """Load the configured pipeline, its adapters and the safety checker.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    options.validate_options(Task.TEXT_TO_IMAGE, config, placement)
    files = find_adapters(config)
    checker = load_checker(config.safety_checker)
    with located(Task.TEXT_TO_IMAGE, config, download) as source:
        pipe = load_pipeline(source, placement, config)
        adapters = Adapters(pipe, files)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=type(pipe).__name__.removesuffix("Pipeline"),
        dtype=placement.dtype_name,
        device=placement.device.type,
    )
    parameters = Parameters(pipe, info, config.defaults, adapters=files)
    # Parts that are quantized or shared out over several devices do not move.
    fixed = config.quantization != "none" or config.device_map != "none"
    model = DiffusionModel(
        pipe,
        placement,
        parameters,
        adapters,
        checker,
        keys=BatchKeys(pipe, parameters, config),
        movable=placement.device.type != "cpu" and config.offload == "none" and not fixed,
    )
    if untried := parts_to_try(pipe):
        first_run.probe_once(model, Task.TEXT_TO_IMAGE, (f"{source.id}: {', '.join(untried)}",))
    return model


class DiffusionModel:
    """A loaded pipeline; see `consumer.ports.model.Runner` for what its methods promise.

    Args:
        pipe: The pipeline whose weights all runs share. A run has a copy of its own.
        placement: Where it was put.
        parameters: What it takes.
        adapters: What was loaded into it, to be used by single runs.
        checker: Says which images are flagged; None: nobody does.
        keys: Says which requests go together.
        movable: Whether its parts can be moved to main memory for a run that needs the room.
        free: Tells the memory of the device that a run can have.
    """

    def __init__(
        self,
        pipe: Any,
        placement: Placement,
        parameters: Parameters,
        adapters: Adapters,
        checker: SafetyChecker | None,
        *,
        keys: BatchKeys,
        movable: bool,
        free: FreeBytes = free_bytes,
    ) -> None:
        self._pipe = pipe
        self._placement = placement
        self._parameters = parameters
        self._adapters = adapters
        self._keys = keys
        self._checker = checker
        self._types = memory.types_of(pipe)
        self._undo = ExitStack()  # what saves memory in this run
        self._movable = movable
        self._free_bytes = free

    @property
    def description(self) -> ModelDescription:
        """What the pipeline is and takes."""
        return self._parameters.description

    def check(self, request: Request) -> None:
        """See whether the pipeline can do what is asked."""
        self._parameters.check(_text_to_image(request))

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """Make the images of one request, or of several.

        Images of a batch equal those of single runs as far as `batch` says. Raises `OutOfMemory`
        before a batch starts where its images could not be decoded all at once.
        """
        members = BatchMembers(runs)
        if members.have_all_left():
            raise Interrupted("stopped before the first step")
        requests = [_text_to_image(run.request) for run in runs]
        wanted = [
            Wanted(place, seed) for place in members.active for seed in _seeds(requests[place])
        ]
        prompts = len(wanted) if len(members.active) > 1 else 1
        run = ImageRun(members, requests, wanted, TruncationTracker(prompts))
        outputs = translated(
            lambda: self._make(run, save_memory=save_memory), free=self._free, saved=run.saved
        )
        return [outputs.get(place) for place in range(len(runs))]

    def batch_key(self, request: Request) -> Hashable | None:
        """What requests have in common that can be made together; None: this one runs alone."""
        return self._keys.key(_text_to_image(request))

    def close(self) -> None:
        """Give the device's memory back."""
        del self._pipe, self._parameters, self._adapters, self._keys  # each of them holds weights
        release(self._placement.device)

    def _make(self, run: ImageRun, *, save_memory: bool) -> dict[int, RunnerOutput]:
        images: dict[int, list[GeneratedImage]] = {}
        with torch.inference_mode():
            parts = [run.wanted]
            if save_memory or self._cannot_be_decoded(run):
                parts = self._save_memory(run, move=save_memory and self._movable)
            with self._adapters.active(run.request.adapters):
                for number, part in enumerate(parts):
                    steps = StepCallback(
                        run.members.report,
                        run.members.have_all_left,
                        modern=self._parameters.takes(STEP_CALLBACK),
                        run=number,
                        runs=len(parts),
                        preview=self._preview(run, number),
                    )
                    made = self._run_pipeline(run, part, steps)
                    for image, wanted in zip(made, part, strict=True):
                        images.setdefault(wanted.place, []).append(image)
            self._undo.close()
        return {place: self._output(run, place, images[place]) for place in run.members.active}

    def _output(self, run: ImageRun, place: int, images: list[GeneratedImage]) -> RunnerOutput:
        warnings = run.cuts.warnings(run.prompt_of(place))
        warnings += self._adapters.warnings(run.requests[place].adapters)
        if blanked := sum(image.flagged is True for image in images):
            warnings += (f"the model's safety checker blanked images: {blanked}",)
        if run.saved:
            warnings += (f"memory was short: {', '.join(run.saved)}",)
        return RunnerOutput(
            images=tuple(self._checked(images)),
            warnings=warnings,
            parameters=self._parameters.resolved(run.requests[place], run.seeds_of(place)),
        )

    def _preview(self, run: ImageRun, number: int) -> Preview | None:
        # Of the first image; and not where memory is short.
        if not run.request.preview or number or run.saved:
            return None
        return Preview(run.members.preview, *self._parameters.size(run.request))

    def _cannot_be_decoded(self, run: ImageRun) -> bool:
        width, height = self._parameters.size(run.request)
        least = least_to_decode(self._pipe, images=len(run.wanted), width=width, height=height)
        free = self._free_bytes(self._placement.device)
        return least is not None and free is not None and free < least

    def _save_memory(self, run: ImageRun, *, move: bool) -> list[Sequence[Wanted]]:
        if run.is_batch:
            # One by one they are faster than all at once in tiles: the caller runs them so.
            raise MemoryError("so many images cannot be decoded at once")
        if len(run.wanted) > 1:
            run.saved.append("made one image at a time")
        run.saved += memory.save(self._undo, self._pipe, self._placement.device, offload=move)
        return [[wanted] for wanted in run.wanted]

    def _run_pipeline(
        self, run: ImageRun, part: Sequence[Wanted], steps: StepCallback
    ) -> list[GeneratedImage]:
        request, parameters = run.request, self._parameters
        scale = parameters.scale_of_guiders(request)
        # One for each image, and on the CPU, whose numbers are the same everywhere.
        generators = [torch.Generator("cpu").manual_seed(wanted.seed) for wanted in part]
        pipe = own_pipeline(self._pipe, run.cuts, generators, guidance_scale=scale)
        try:
            output = pipe(
                **self._arguments(run, part),
                **steps.arguments(parameters.steps(request)),
                generator=generators,
            )
        finally:
            # Also after a failure: a step cache or an offloaded part would spoil the next run.
            pipe.maybe_free_model_hooks()
        width, height = parameters.size(request)
        arrays = np.asarray(output.images)
        if arrays.shape != (len(part), height, width, CHANNELS):
            raise BadOutput("the model made images of another shape than asked for")
        if not np.isfinite(arrays).all():
            raise BadOutput("the model made pixels that are not numbers")
        flags = _own_flags(output, len(part))
        return [
            GeneratedImage(_image(array), wanted.seed, flag)
            for array, wanted, flag in zip(arrays, part, flags, strict=True)
        ]

    def _arguments(self, run: ImageRun, part: Sequence[Wanted]) -> dict[str, Any]:
        if run.is_batch:
            return arguments_of_a_batch(self._parameters, [run.requests[w.place] for w in part])
        return {**self._parameters.arguments(run.request), "num_images_per_prompt": len(part)}

    def _checked(self, images: list[GeneratedImage]) -> list[GeneratedImage]:
        """The images with the flags of the safety checker, besides those of the model's own."""
        if self._checker is None:
            return images
        flags = self._checker.flags([made.image for made in images])
        return [
            GeneratedImage(made.image, made.seed, flagged=bool(made.flagged) or flag)
            for made, flag in zip(images, flags, strict=True)
        ]

    def _free(self) -> None:
        release(self._placement.device)
        with torch.inference_mode():
            self._undo.close()
            memory.restore_types(self._pipe, self._types)


def _text_to_image(request: Request) -> TextToImageRequest:
    if not isinstance(request, TextToImageRequest):
        raise TypeError("a request for another task")
    return request


def _seeds(request: TextToImageRequest) -> list[int]:
    first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
    return [(first + n) % SEEDS for n in range(request.num_images)]


def _own_flags(output: Any, images: int) -> list[bool | None]:
    flags = getattr(output, "nsfw_content_detected", None)
    if flags is None:
        return [None] * images
    if len(flags) != images:
        raise BadOutput("the model's safety checker did not judge each image")
    return [bool(flag) for flag in flags]


def _image(array: Any) -> "Image":
    return Pillow.fromarray((array * 255).round().astype(np.uint8))
