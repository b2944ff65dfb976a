"""Image to text: Qwen2-VL to Qwen3-VL and what else AutoModelForImageTextToText loads."""

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
from consumer.runners.faults import StoppedAtStep, load_failure, translated
from consumer.runners.image_to_text.batch import BatchKeys
from consumer.runners.image_to_text.chats import Chat, Chats, prompt_tokens
from consumer.runners.image_to_text.control_tokens import ControlTokens
from consumer.runners.image_to_text.deltas import Deltas, written_text
from consumer.runners.image_to_text.image_budget import ImageBudget
from consumer.runners.image_to_text.rows import Numbers, Row, Rows
from consumer.runners.image_to_text.sampling import Sampling, defaults_of
from consumer.runners.image_to_text.vision_loading import download, load_vision_language
from consumer.runners.options import options_needing_probe, validate_options
from consumer.runners.source import located
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
_UNREAD = "s3://first-run/image.png"  # a request names its images; a run gets them decoded
_CACHE_ELSEWHERE = "the cache of keys and values was kept in main memory"


def load(config: ModelConfig) -> "VisionLanguageModel":
    """Load the configured model.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    validate_options(Task.IMAGE_TO_TEXT, config, placement)
    with located(Task.IMAGE_TO_TEXT, config, download) as source:
        model, processor = load_vision_language(source, placement, config)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=model.config.model_type,
        dtype=placement.dtype_name,
        device=placement.device.type,
    )
    try:
        loaded = VisionLanguageModel(model, processor, placement, info, config)
        loaded.require_image_input()
        if not options_needing_probe(
            config
        ):  # else the first run follows, and names those settings
            loaded.require_output()
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - families lack what they like, and templates raise
        failure = load_failure(error, name=info.id)
    else:
        return loaded
    raise failure


class VisionLanguageModel:
    """A loaded model; see `consumer.ports.model.Runner` for what its methods promise.

    Args:
        model: The model of transformers.
        processor: Its processor, with a tokenizer and a chat template.
        placement: Where it was put.
        info: What it is called.
        config: How images are read, and what a request gets that says nothing.

    Raises:
        ModelUnavailable: It cannot be used, or a setting is not for it.
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
            raise ModelUnavailable(f"{info.id}: {info.family} has a decoder of its own for texts")
        self._model = model
        self._processor = processor
        self._placement = placement
        self._budget = ImageBudget.of(processor.image_processor, config.max_image_pixels)
        self._control = ControlTokens(processor)
        self._context = int(model.config.get_text_config().max_position_embeddings)  # tokens
        self._ends = frozenset(model.generation_config.eos_token_id)
        self._keys = BatchKeys(model, processor.tokenizer, config)
        self._chats = Chats(processor, placement, resize=not self._budget.is_exact)
        system = {"system"} if self._chats.have_system() else set()
        self._description = ModelDescription(
            info=info,
            parameters=frozenset(_PARAMETERS | system),
            defaults=defaults_of(model.generation_config, config.defaults),
        )

    @property
    def description(self) -> ModelDescription:
        """What the model is and takes."""
        return self._description

    def require_image_input(self) -> None:
        """Prepare a question about an image as a run does, without the model.

        Raises:
            ModelUnavailable: The chat template leaves images out.
            Exception: Whatever the template and the processor raise.
        """
        if not self._chats.have_images():
            name = self._description.info.id
            raise ModelUnavailable(f"{name}: its chat template has no place for images")
        self._inputs(("x", None), self._budget.fit([Image.new("RGB", _ANY_SIZE)]))

    def require_output(self) -> None:
        """Write two tokens about an image, greedily and by chance, as requests do.

        What the parts of a model do not say of each other shows nowhere else: sizes of patches that
        differ, a token for images that is another one for the tokenizer, a default that `generate`
        refuses.

        Raises:
            Exception: Whatever the model raises.
        """
        is_greedy = self._description.defaults["temperature"] == 0
        for temperature in (None, 1.0 if is_greedy else 0.0):
            request = ImageToTextRequest(
                prompt="x", images=(_UNREAD,), max_new_tokens=2, temperature=temperature, seed=0
            )
            image = Image.new("RGB", _ANY_SIZE)
            self._write([first_run.unattended(request, [image])], savings=())

    def check(self, request: Request) -> None:
        """See whether the model can do what is asked."""
        asked = _image_to_text(request)
        if asked.system is not None and "system" not in self._description.parameters:
            family = self._description.info.family
            raise UnsupportedParameter("system", f"system: {family} does not have it")
        if not self._control.strip(asked.prompt).strip():
            raise UnsupportedParameter("prompt", "prompt: nothing but control tokens")

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """Write the text of one request, or of several.

        Texts of a batch equal those of single runs as far as `batch` says. A text that has ended
        has no more steps: its request is neither reported to nor polled while the others go on.
        """
        active = {place: run for place, run in enumerate(runs) if not run.cancelled()}
        if not active:
            raise Interrupted("stopped before the first token")
        savings = self._savings() if save_memory else ()
        written = translated(
            lambda: self._write([*active.values()], savings=savings),
            free=lambda: release(self._placement.device),
            saved=savings,
        )
        outputs = dict(zip(active, written, strict=True))
        return [outputs.get(place) for place in range(len(runs))]

    def batch_key(self, request: Request) -> Hashable | None:
        """What requests have in common that can be written together; None: this one runs alone."""
        asked = _image_to_text(request)
        return self._keys.key(asked, Sampling.of(asked, self._description.defaults))

    def close(self) -> None:
        """Give the device's memory back."""
        del self._model
        release(self._placement.device)

    def _write(
        self, runs: Sequence[RunRequest], *, savings: tuple[str, ...]
    ) -> list[RunnerOutput | None]:
        asked = [self._asked(run, savings) for run in runs]
        inputs = self._chats.inputs([one.chat for one in asked])
        counts = zip(prompt_tokens(inputs), self._chats.image_tokens(inputs), strict=True)
        rows = [
            self._row(run, one, tokens, of_images)
            for run, one, (tokens, of_images) in zip(runs, asked, counts, strict=True)
        ]
        cache = {"cache_implementation": "offloaded"} if _CACHE_ELSEWHERE in savings else {}
        deltas = self._deltas(runs[0], asked[0].request)
        written = self._generate(asked[0].sampling, {**inputs, **cache}, rows, deltas)
        outputs = [
            None if row.is_cancelled else self._output(one, row, tokens)
            for one, row, tokens in zip(asked, rows, written, strict=True)
        ]
        if deltas is not None and (output := outputs[0]) is not None and output.text is not None:
            deltas.finish(output.text.text)
        return outputs

    def _deltas(self, run: RunRequest, request: ImageToTextRequest) -> Deltas | None:
        # A text that is streamed is written alone.
        return Deltas(self._processor.tokenizer, run.progress.text) if request.stream else None

    def _asked(self, run: RunRequest, savings: tuple[str, ...]) -> "_Asked":
        request = _image_to_text(run.request)
        budget = self._budget
        if _FEWER_PIXELS in savings:
            budget = replace(budget, most=max(budget.most // 2, budget.least))
        warnings = [f"memory was short: {saving}" for saving in savings]
        said = self._cleaned(request)
        if said != (request.prompt, request.system):
            warnings.append("control tokens of the model were taken out of the text")
        chat = Chat(*said, budget.fit(run.images))
        sampling = Sampling.of(request, self._description.defaults)
        return _Asked(request, chat, sampling, warnings)

    def _row(self, run: RunRequest, asked: "_Asked", tokens: int, of_images: int) -> Row:
        if of_images >= self._context:
            raise UnsupportedParameter(
                "images", f"images: {of_images} tokens, of {self._context} at most with the prompt"
            )
        most = self._most_new_tokens(asked.request, tokens)
        wanted = asked.request.max_new_tokens
        if wanted is not None and most < wanted:
            line = f"max_new_tokens: the model's context has room for {most} only"
            asked.warnings.append(line)
        return Row(run, tokens, most)

    def _output(self, asked: "_Asked", row: Row, tokens: list[int]) -> RunnerOutput:
        text = GeneratedText(
            text=written_text(self._processor.tokenizer, tokens),
            finish_reason="stop" if tokens and tokens[-1] in self._ends else "length",
            prompt_tokens=row.prompt_tokens,
            completion_tokens=len(tokens),
            seed=asked.sampling.seed,
        )
        return RunnerOutput(
            text=text,
            warnings=tuple(asked.warnings),
            parameters={"max_new_tokens": row.most, **asked.sampling.parameters},
        )

    def _savings(self) -> tuple[str, ...]:
        """What a run can do with less memory, in words for the sender."""
        # Other families make every image the same size, whatever they are given.
        fewer = (_FEWER_PIXELS,) if self._budget.patch is not None else ()
        return (*fewer, _CACHE_ELSEWHERE) if self._placement.device.type == "cuda" else fewer

    def _cleaned(self, request: ImageToTextRequest) -> tuple[str, str | None]:
        system = None if request.system is None else self._control.strip(request.system)
        return self._control.strip(request.prompt), system

    def _inputs(self, said: tuple[str, str | None], images: Sequence[PILImage]) -> Any:
        """The tensors for one chat."""
        return self._chats.inputs([Chat(*said, images)])

    def _most_new_tokens(self, request: ImageToTextRequest, prompt_tokens: int) -> int:
        room = self._context - prompt_tokens
        if room < 1:
            raise UnsupportedParameter(
                "prompt",
                f"prompt: {prompt_tokens} tokens with its images, of {self._context} at most",
            )
        wanted = request.max_new_tokens or self._description.defaults["max_new_tokens"]
        return min(int(wanted or 1), room)

    def _generate(
        self, sampling: Sampling, inputs: Any, rows: Sequence[Row], deltas: Deltas | None
    ) -> list[list[int]]:
        """The tokens that the model wrote in each row, without the prompt's and the padding."""
        if sampling.seed is not None:
            # There is no generator argument; one thread for each model makes the global one safe.
            torch.manual_seed(sampling.seed)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs,
                    **sampling.options,
                    max_new_tokens=max(row.most for row in rows),
                    stopping_criteria=StoppingCriteriaList([Rows(rows, self._ends)]),
                    logits_processor=LogitsProcessorList([Numbers()]),
                    streamer=deltas,
                )
        finally:
            _wait_in_main_memory(self._model)
        if all(row.is_cancelled for row in rows):
            raise StoppedAtStep
        written: list[list[int]] = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [of_one[: row.tokens] for of_one, row in zip(written, rows, strict=True)]


@dataclass
class _Asked:
    """What one request asks for, ready for the model."""

    request: ImageToTextRequest
    chat: Chat
    sampling: Sampling
    warnings: list[str]


def _wait_in_main_memory(model: Any) -> None:
    # With MODEL_OFFLOAD=model it came to the device with the first token.
    hook = getattr(model, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        model.to("cpu")


def _image_to_text(request: Request) -> ImageToTextRequest:
    if not isinstance(request, ImageToTextRequest):
        raise TypeError("a request for another task")
    return request
