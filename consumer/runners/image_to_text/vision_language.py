"""The image-to-text model: any model that AutoModelForImageTextToText loads, such as Qwen3-VL."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from PIL import Image
from PIL.Image import Image as PILImage
from transformers import LogitsProcessorList, StoppingCriteriaList

from consumer.ports.model import (
    GeneratedText,
    Interrupted,
    ModelDescription,
    ModelUnavailable,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.runners import first_run
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import StoppedAtStep, load_failure, translate_failures
from consumer.runners.image_to_text.batch import BatchKeys
from consumer.runners.image_to_text.chats import Chat, Chats, prompt_tokens
from consumer.runners.image_to_text.control_tokens import ControlTokens
from consumer.runners.image_to_text.deltas import Deltas, decode_text
from consumer.runners.image_to_text.image_budget import ImageBudget
from consumer.runners.image_to_text.rows import Row, RowStopping, ValidScores
from consumer.runners.image_to_text.sampling import Sampling, defaults_of
from consumer.runners.image_to_text.spec import PLACEHOLDER
from consumer.runners.image_to_text.vision_loading import download, load_vision_language
from consumer.runners.libraries import versions_of
from consumer.runners.options import options_needing_probe, validate_options
from consumer.runners.source import locate_model
from generation_contracts import ImageToTextRequest, ModelInfo, Request, Task

_PARAMETERS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
}
_FEWER_PIXELS = "the images were read at half their pixels"
_ANY_SIZE = (64, 64)  # pixels
_OFFLOADED_CACHE = "the cache of keys and values was kept in main memory"


def load(config: ModelConfig) -> "VisionLanguageModel":
    """Load the configured model.

    Raises:
        ModelUnavailable: The model or a setting cannot be used; the message is one line.
    """
    placement = place(config)
    validate_options(Task.IMAGE_TO_TEXT, config, placement)
    with locate_model(Task.IMAGE_TO_TEXT, config, download) as source:
        model, processor = load_vision_language(source, placement, config)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=model.config.model_type,
        dtype=placement.dtype_name,
        device=placement.device.type,
        libraries=versions_of("torch", "transformers"),
    )
    try:
        loaded = VisionLanguageModel(model, processor, placement, info, config)
        loaded.require_image_input()
        # With such options, the probe run that follows names the settings in its message.
        if not options_needing_probe(config):
            loaded.require_output()
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - families differ, and templates raise any kind
        failure = load_failure(error, name=info.id)
    else:
        return loaded
    raise failure


class VisionLanguageModel:
    """A loaded model; see `consumer.ports.model.Runner` for the contract of its methods.

    Args:
        model: The model of transformers.
        processor: Its processor, with a tokenizer and a chat template.
        placement: The device and dtype of the model.
        info: Identifies the model in the description.
        config: The image budget and the defaults of requests.

    Raises:
        ModelUnavailable: The model cannot be used, or does not support a setting.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        placement: Placement,
        info: ModelInfo,
        config: ModelConfig,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ModelUnavailable(f"{info.id}: {info.family} is an encoder-decoder model")
        self._model = model
        self._processor = processor
        self._placement = placement
        self._budget = ImageBudget.of(processor.image_processor, config.max_image_pixels)
        self._control = ControlTokens(processor)
        self._context = int(model.config.get_text_config().max_position_embeddings)  # tokens
        self._ends = frozenset(model.generation_config.eos_token_id)
        self._keys = BatchKeys(model, processor.tokenizer, config)
        self._chats = Chats(processor, placement, resize=not self._budget.is_exact)
        system = {"system"} if self._chats.supports_system() else set()
        self._description = ModelDescription(
            info=info,
            parameters=frozenset(_PARAMETERS | system),
            defaults=defaults_of(model.generation_config, config.defaults),
        )

    @property
    def description(self) -> ModelDescription:
        """The model and the parameters that it accepts."""
        return self._description

    def require_image_input(self) -> None:
        """Prepare a prompt with an image as a run does, without running the model.

        Raises:
            ModelUnavailable: The chat template ignores images.
            Exception: What the template and the processor raise.
        """
        if not self._chats.supports_images():
            name = self._description.info.id
            raise ModelUnavailable(f"{name}: its chat template has no place for images")
        self._inputs(("x", None), self._budget.fit([Image.new("RGB", _ANY_SIZE)]))

    def require_output(self) -> None:
        """Generate two tokens about an image, once greedy and once sampled.

        Some errors show only in a run: different patch sizes in the parts of a model, an image
        token that is another token of the tokenizer, a default that `generate` refuses.

        Raises:
            Exception: What the model raises.
        """
        is_greedy = self._description.defaults["temperature"] == 0
        for temperature in (None, 1.0 if is_greedy else 0.0):
            request = ImageToTextRequest(
                prompt="x",
                images=(PLACEHOLDER,),
                max_new_tokens=2,
                temperature=temperature,
                seed=0,
            )
            image = Image.new("RGB", _ANY_SIZE)
            self._generate([first_run.probe_request(request, [image])], savings=())

    def check(self, request: Request) -> None:
        """Validate a request against the model, without running it.

        Raises:
            UnsupportedParameter: Names the field.
        """
        checked = _image_to_text(request)
        if checked.system is not None and "system" not in self._description.parameters:
            family = self._description.info.family
            raise UnsupportedParameter("system", f"system: {family} does not have it")
        if not self._control.strip(checked.prompt).strip():
            raise UnsupportedParameter("prompt", "prompt: nothing but control tokens")

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """Generate the text of one request or of a batch.

        The module `batch` documents how far texts of a batch differ from those of single runs. A
        request gets no more progress and is not polled once its text has ended.
        """
        active = {position: run for position, run in enumerate(runs) if not run.cancelled()}
        if not active:
            raise Interrupted("stopped before the first token")
        savings = self._savings() if save_memory else ()
        generated = translate_failures(
            lambda: self._generate([*active.values()], savings=savings),
            free=lambda: release(self._placement.device),
            saved=savings,
        )
        outputs = dict(zip(active, generated, strict=True))
        return [outputs.get(position) for position in range(len(runs))]

    def batch_key(self, request: Request) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: the request runs alone."""
        checked = _image_to_text(request)
        return self._keys.key(checked, Sampling.of(checked, self._description.defaults))

    def close(self) -> None:
        """Release the device memory of the weights."""
        del self._model
        release(self._placement.device)

    def _generate(
        self, runs: Sequence[RunRequest], *, savings: tuple[str, ...]
    ) -> list[RunnerOutput | None]:
        prepared = [self._prepare(run, savings) for run in runs]
        inputs = self._chats.inputs([each.chat for each in prepared])
        counts = zip(prompt_tokens(inputs), self._chats.image_tokens(inputs), strict=True)
        rows = [
            self._row(run, each, tokens, image_tokens)
            for run, each, (tokens, image_tokens) in zip(runs, prepared, counts, strict=True)
        ]
        cache = {"cache_implementation": "offloaded"} if _OFFLOADED_CACHE in savings else {}
        deltas = self._deltas(runs[0], prepared[0].request)
        generated = self._run_model(prepared[0].sampling, {**inputs, **cache}, rows, deltas)
        outputs = [
            None if row.is_cancelled else self._output(each, row, tokens)
            for each, row, tokens in zip(prepared, rows, generated, strict=True)
        ]
        if deltas is not None and (output := outputs[0]) is not None and output.text is not None:
            deltas.finish(output.text.text)
        return outputs

    def _deltas(self, run: RunRequest, request: ImageToTextRequest) -> Deltas | None:
        # A streamed request is never in a batch.
        return Deltas(self._processor.tokenizer, run.progress.text) if request.stream else None

    def _prepare(self, run: RunRequest, savings: tuple[str, ...]) -> "_Prepared":
        request = _image_to_text(run.request)
        budget = self._budget
        if _FEWER_PIXELS in savings:
            budget = replace(budget, most=max(budget.most // 2, budget.least))
        warnings = [f"memory was short: {saving}" for saving in savings]
        texts = self._stripped(request)
        if texts != (request.prompt, request.system):
            warnings.append("control tokens of the model were removed from the text")
        chat = Chat(*texts, budget.fit(run.images))
        sampling = Sampling.of(request, self._description.defaults)
        return _Prepared(request, chat, sampling, warnings)

    def _row(self, run: RunRequest, prepared: "_Prepared", tokens: int, image_tokens: int) -> Row:
        if image_tokens >= self._context:
            raise UnsupportedParameter(
                "images",
                f"images: {image_tokens} tokens, of {self._context} at most with the prompt",
            )
        most = self._max_new_tokens(prepared.request, tokens)
        requested = prepared.request.max_new_tokens
        if requested is not None and most < requested:
            line = f"max_new_tokens: the model's context has room for {most} only"
            prepared.warnings.append(line)
        return Row(run, tokens, most)

    def _output(self, prepared: "_Prepared", row: Row, tokens: list[int]) -> RunnerOutput:
        text = GeneratedText(
            text=decode_text(self._processor.tokenizer, tokens),
            finish_reason="stop" if tokens and tokens[-1] in self._ends else "length",
            prompt_tokens=row.prompt_tokens,
            completion_tokens=len(tokens),
            seed=prepared.sampling.seed,
        )
        return RunnerOutput(
            outputs=(text,),
            warnings=tuple(prepared.warnings),
            parameters={"max_new_tokens": row.most, **prepared.sampling.parameters},
        )

    def _savings(self) -> tuple[str, ...]:
        """Return the measures that reduce the memory of a run, as text for the sender."""
        # Other families resize every image to one size.
        fewer = (_FEWER_PIXELS,) if self._budget.patch is not None else ()
        return (*fewer, _OFFLOADED_CACHE) if self._placement.device.type == "cuda" else fewer

    def _stripped(self, request: ImageToTextRequest) -> tuple[str, str | None]:
        system = None if request.system is None else self._control.strip(request.system)
        return self._control.strip(request.prompt), system

    def _inputs(self, texts: tuple[str, str | None], images: Sequence[PILImage]) -> Any:
        """Return the tensors for one chat."""
        return self._chats.inputs([Chat(*texts, images)])

    def _max_new_tokens(self, request: ImageToTextRequest, prompt_tokens: int) -> int:
        room = self._context - prompt_tokens
        if room < 1:
            raise UnsupportedParameter(
                "prompt",
                f"prompt: {prompt_tokens} tokens with its images, of {self._context} at most",
            )
        requested = request.max_new_tokens or self._description.defaults["max_new_tokens"]
        return min(int(requested or 1), room)

    def _run_model(
        self, sampling: Sampling, inputs: Any, rows: Sequence[Row], deltas: Deltas | None
    ) -> list[list[int]]:
        """Return the generated tokens of each row, without the prompt and the padding."""
        if sampling.seed is not None:
            # `generate` has no generator argument. The global one is safe, because only the
            # inference thread uses it.
            torch.manual_seed(sampling.seed)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs,
                    **sampling.options,
                    max_new_tokens=max(row.most for row in rows),
                    stopping_criteria=StoppingCriteriaList([RowStopping(rows, self._ends)]),
                    logits_processor=LogitsProcessorList([ValidScores()]),
                    streamer=deltas,
                )
        finally:
            _move_to_main_memory(self._model)
        if all(row.is_cancelled for row in rows):
            raise StoppedAtStep
        generated: list[list[int]] = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [each[: row.tokens] for each, row in zip(generated, rows, strict=True)]


@dataclass
class _Prepared:
    """One request, prepared for the model."""

    request: ImageToTextRequest
    chat: Chat
    sampling: Sampling
    warnings: list[str]


def _move_to_main_memory(model: Any) -> None:
    # With MODEL_OFFLOAD=model, the first token moved the model to the device.
    hook = getattr(model, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        model.to("cpu")


def _image_to_text(request: Request) -> ImageToTextRequest:
    if not isinstance(request, ImageToTextRequest):
        raise TypeError("a request for another task")
    return request
