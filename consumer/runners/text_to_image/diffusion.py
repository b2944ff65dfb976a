"""The text-to-image model: any pipeline that diffusers loads from a model_index.json."""

# mypy: allow-untyped-calls

import secrets
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from consumer.runners.config import ModelConfig, SafetyPolicy
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import BadOutput, translate_failures
from consumer.runners.libraries import versions_of
from consumer.runners.source import locate_model
from consumer.runners.text_to_image import memory
from consumer.runners.text_to_image.adapter_files import find_adapters
from consumer.runners.text_to_image.adapters import Adapters
from consumer.runners.text_to_image.batch import BatchKeys, batch_arguments
from consumer.runners.text_to_image.image_run import BatchMembers, ImageRun, PlannedImage
from consumer.runners.text_to_image.memory_guard import FreeBytes, free_bytes, min_decode_bytes
from consumer.runners.text_to_image.parameters import Parameters
from consumer.runners.text_to_image.pipeline_copy import copy_pipeline
from consumer.runners.text_to_image.pipeline_loading import STEP_CALLBACK, download, load_pipeline
from consumer.runners.text_to_image.preview import Preview
from consumer.runners.text_to_image.probe_reasons import probe_reasons
from consumer.runners.text_to_image.safety import SafetyChecker, load_checker
from consumer.runners.text_to_image.step_callback import StepCallback
from consumer.runners.text_to_image.truncation import TruncationTracker
from generation_contracts import ModelInfo, Request, Task, TextToImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = 2**32  # the number of seeds; image n has seed + n, modulo this
CHANNELS = 3  # red, green, blue


def load(config: ModelConfig) -> "DiffusionModel":
    """Load the configured pipeline, its adapters and the safety checker.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    options.validate_options(Task.TEXT_TO_IMAGE, config, placement)
    files = find_adapters(config)
    checker = load_checker(config, placement.device)
    with locate_model(Task.TEXT_TO_IMAGE, config, download) as source:
        pipe = load_pipeline(source, placement, config)
        adapters = Adapters(pipe, files)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=type(pipe).__name__.removesuffix("Pipeline"),
        dtype=placement.dtype_name,
        device=placement.device.type,
        libraries=versions_of("diffusers", "torch", "transformers"),
    )
    parameters = Parameters(pipe, info, config.defaults, adapters=files)
    # Parts that are quantized or distributed over several devices cannot be moved.
    fixed = config.quantization != "none" or config.device_map != "none"
    model = DiffusionModel(
        pipe,
        placement,
        parameters,
        adapters,
        checker,
        keys=BatchKeys(pipe, parameters, config),
        movable=placement.device.type != "cpu" and config.offload == "none" and not fixed,
        policy=config.safety_policy,
    )
    if reasons := probe_reasons(pipe):
        first_run.probe_once(model, Task.TEXT_TO_IMAGE, (f"{source.id}: {', '.join(reasons)}",))
    return model


class DiffusionModel:
    """A loaded pipeline; see `consumer.ports.model.Runner` for the contract of its methods.

    Args:
        pipe: The pipeline whose weights all runs share. Each run uses a shallow copy.
        placement: The device and dtype of the pipeline.
        parameters: The parameters that the pipeline accepts.
        adapters: The loaded adapters; each run activates those of its request.
        checker: Flags images; None: images are not checked.
        keys: Computes the batch key of a request.
        movable: Whether parts can be moved to main memory for a run that needs the memory.
        policy: What happens to a flagged image.
        free: Returns the device memory that is available to a run, in bytes.
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
        policy: SafetyPolicy = "flag",
        free: FreeBytes = free_bytes,
    ) -> None:
        self._pipe = pipe
        self._placement = placement
        self._parameters = parameters
        self._adapters = adapters
        self._keys = keys
        self._checker = checker
        self._dtypes = memory.dtypes_of(pipe)
        self._undo = ExitStack()  # restores what a run changed to save memory
        self._movable = movable
        self._policy = policy
        self._free_bytes = free

    @property
    def description(self) -> ModelDescription:
        """The pipeline and the parameters that it accepts."""
        return self._parameters.description

    def check(self, request: Request) -> None:
        """Validate a request against the pipeline, without running it.

        Raises:
            UnsupportedParameter: Names the field.
        """
        self._parameters.check(_text_to_image(request))

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """Generate the images of one request or of a batch.

        The module `batch` documents how far images of a batch differ from those of single runs.

        Raises:
            OutOfMemory: Also before a batch starts, where its images cannot be decoded together.
            Interrupted, UnsupportedParameter, DeviceLost, ModelError: See the port.
        """
        members = BatchMembers(runs)
        if members.all_cancelled():
            raise Interrupted("stopped before the first step")
        requests = [_text_to_image(run.request) for run in runs]
        planned = [
            PlannedImage(position, seed)
            for position in members.active
            for seed in _seeds(requests[position])
        ]
        prompts = len(planned) if len(members.active) > 1 else 1
        run = ImageRun(members, requests, planned, TruncationTracker(prompts))
        outputs = translate_failures(
            lambda: self._generate(run, save_memory=save_memory), free=self._free, saved=run.saved
        )
        return [outputs.get(position) for position in range(len(runs))]

    def batch_key(self, request: Request) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: the request runs alone."""
        return self._keys.key(_text_to_image(request))

    def close(self) -> None:
        """Release the device memory of the weights."""
        del self._pipe, self._parameters, self._adapters, self._keys  # each refers to the weights
        release(self._placement.device)

    def _generate(self, run: ImageRun, *, save_memory: bool) -> dict[int, RunnerOutput]:
        images: dict[int, list[GeneratedImage]] = {}
        with torch.inference_mode():
            parts = [run.planned]
            if save_memory or self._cannot_decode(run):
                parts = self._save_memory(run, move=save_memory and self._movable)
            with self._adapters.active(run.request.adapters):
                for number, part in enumerate(parts):
                    steps = StepCallback(
                        run.members.report,
                        run.members.all_cancelled,
                        on_step_end=self._parameters.accepts(STEP_CALLBACK),
                        run=number,
                        runs=len(parts),
                        preview=self._preview(run, number),
                    )
                    generated = self._run_pipeline(run, part, steps)
                    for image, planned in zip(generated, part, strict=True):
                        images.setdefault(planned.position, []).append(image)
            self._undo.close()
        return {
            position: self._output(run, position, images[position])
            for position in run.members.active
        }

    def _output(self, run: ImageRun, position: int, images: list[GeneratedImage]) -> RunnerOutput:
        warnings = run.truncation.warnings(run.prompt_index(position))
        warnings += self._adapters.warnings(run.requests[position].adapters)
        if blanked := sum(image.flagged is True for image in images):
            warnings += (f"the model's safety checker blanked images: {blanked}",)
        if run.saved:
            warnings += (f"memory was short: {', '.join(run.saved)}",)
        checked = self._checked(images)
        if self._policy == "blank":
            if more := sum(image.flagged is True for image in checked) - blanked:
                warnings += (f"the worker's safety checker blanked images: {more}",)
            checked = [_blanked(image) for image in checked]
        refused = self._policy == "fail" and any(image.flagged for image in checked)
        return RunnerOutput(
            outputs=() if refused else tuple(checked),
            refused=refused,
            warnings=warnings,
            parameters=self._parameters.resolved(run.requests[position], run.seeds(position)),
        )

    def _preview(self, run: ImageRun, number: int) -> Preview | None:
        # Previews show the first image only, need additional memory, and are not checked.
        unchecked = self._policy != "flag"
        if not run.request.preview or number or run.saved or unchecked:
            return None
        return Preview(run.members.preview, *self._parameters.size(run.request))

    def _cannot_decode(self, run: ImageRun) -> bool:
        width, height = self._parameters.size(run.request)
        needed = min_decode_bytes(self._pipe, images=len(run.planned), width=width, height=height)
        free = self._free_bytes(self._placement.device)
        return needed is not None and free is not None and free < needed

    def _save_memory(self, run: ImageRun, *, move: bool) -> list[Sequence[PlannedImage]]:
        if run.is_batch:
            # Single runs are faster than one batch that is decoded in tiles. On this error the
            # caller reruns the requests one by one.
            raise MemoryError("so many images cannot be decoded at once")
        if len(run.planned) > 1:
            run.saved.append("made one image at a time")
        run.saved += memory.save(self._undo, self._pipe, self._placement.device, offload=move)
        return [[planned] for planned in run.planned]

    def _run_pipeline(
        self, run: ImageRun, part: Sequence[PlannedImage], steps: StepCallback
    ) -> list[GeneratedImage]:
        request, parameters = run.request, self._parameters
        scale = parameters.guider_scale(request)
        # One generator for each image, on the CPU: its numbers do not depend on the device.
        generators = [torch.Generator("cpu").manual_seed(planned.seed) for planned in part]
        pipe = copy_pipeline(self._pipe, run.truncation, generators, guidance_scale=scale)
        try:
            output = pipe(
                **self._arguments(run, part),
                **steps.arguments(parameters.steps(request)),
                generator=generators,
            )
        finally:
            # Also after a failure: a step cache or an offloaded part would affect the next run.
            pipe.maybe_free_model_hooks()
        width, height = parameters.size(request)
        arrays = np.asarray(output.images)
        if arrays.shape != (len(part), height, width, CHANNELS):
            raise BadOutput("the model made images of another shape than requested")
        if not np.isfinite(arrays).all():
            raise BadOutput("the model made pixels that are not numbers")
        flags = _pipeline_flags(output, len(part))
        return [
            GeneratedImage(_image(array), planned.seed, flag)
            for array, planned, flag in zip(arrays, part, flags, strict=True)
        ]

    def _arguments(self, run: ImageRun, part: Sequence[PlannedImage]) -> dict[str, Any]:
        if run.is_batch:
            requests = [run.requests[planned.position] for planned in part]
            return batch_arguments(self._parameters, requests)
        return {**self._parameters.arguments(run.request), "num_images_per_prompt": len(part)}

    def _checked(self, images: list[GeneratedImage]) -> list[GeneratedImage]:
        """Add the flags of the operator's safety checker to those of the pipeline."""
        if self._checker is None:
            return images
        flags = self._checker.flags([generated.image for generated in images])
        return [
            GeneratedImage(generated.image, generated.seed, flagged=bool(generated.flagged) or flag)
            for generated, flag in zip(images, flags, strict=True)
        ]

    def _free(self) -> None:
        release(self._placement.device)
        with torch.inference_mode():
            self._undo.close()
            memory.restore_dtypes(self._pipe, self._dtypes)


def _text_to_image(request: Request) -> TextToImageRequest:
    if not isinstance(request, TextToImageRequest):
        raise TypeError("a request for another task")
    return request


def _seeds(request: TextToImageRequest) -> list[int]:
    first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
    return [(first + n) % SEEDS for n in range(request.num_images)]


def _pipeline_flags(output: Any, images: int) -> list[bool | None]:
    flags = getattr(output, "nsfw_content_detected", None)
    if flags is None:
        return [None] * images
    if len(flags) != images:
        raise BadOutput("the model's safety checker did not return one flag for each image")
    return [bool(flag) for flag in flags]


def _blanked(generated: GeneratedImage) -> GeneratedImage:
    """Return the image in black if it is flagged."""
    if not generated.flagged:
        return generated
    return replace(generated, image=Pillow.new("RGB", generated.image.size))


def _image(array: Any) -> "Image":
    return Pillow.fromarray((array * 255).round().astype(np.uint8))
