"""Image to text: Qwen2-VL to Qwen3-VL and what else AutoModelForImageTextToText loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from PIL import Image
from PIL.Image import Image as PILImage
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from consumer.ports import (
    GeneratedText,
    Interrupted,
    IsCancelled,
    ModelDescription,
    ModelUnavailable,
    OnPreview,
    OnStep,
    OnText,
    RunnerOutput,
    UnsupportedParameter,
)
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import BadOutput, StoppedAtStep, load_failure, translated
from consumer.runners.image_to_text.control_tokens import ControlTokens
from consumer.runners.image_to_text.deltas import Deltas, written_text
from consumer.runners.image_to_text.pictures import PictureBudget
from consumer.runners.image_to_text.sampling import Sampling, defaults_of
from consumer.runners.image_to_text.vision_loading import download, load_vision_language
from consumer.runners.options import see_that_they_fit
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
_FEWER_PIXELS = "the pictures were read at half their pixels"
_ANY_SIZE = (64, 64)  # pixels
_CACHE_ELSEWHERE = "the cache of keys and values was kept in main memory"


def load(config: ModelConfig) -> "VisionLanguageModel":
    """Load the configured model.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    see_that_they_fit(Task.IMAGE_TO_TEXT, config, placement)
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
        loaded.see_that_it_reads_pictures()
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - families lack what they like, and templates raise
        failure = load_failure(error, name=info.id)
    else:
        return loaded
    raise failure


class VisionLanguageModel:
    """A loaded model; see `consumer.ports.Runner` for what its methods promise.

    Args:
        model: The model of transformers.
        processor: Its processor, with a tokenizer and a chat template.
        placement: Where it was put.
        info: What it is called.
        config: How pictures are read, and what a request gets that says nothing.

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
        self._budget = PictureBudget.of(processor.image_processor, config.max_image_pixels)
        self._control = ControlTokens(processor)
        self._context = int(model.config.get_text_config().max_position_embeddings)  # tokens
        self._ends = _end_tokens(model.generation_config, processor.tokenizer)
        system = {"system"} if _has_system(processor) else set()
        self._description = ModelDescription(
            info=info,
            parameters=frozenset(_PARAMETERS | system),
            defaults=defaults_of(model.generation_config, config.defaults),
        )

    @property
    def description(self) -> ModelDescription:
        """What the model is and takes."""
        return self._description

    def see_that_it_reads_pictures(self) -> None:
        """Prepare a question about a picture as a run does, without the model.

        Raises:
            ModelUnavailable: The chat template leaves pictures out.
            Exception: Whatever the template and the processor raise.
        """
        if self._chat("x", None, pictures=1) == self._chat("x", None, pictures=0):
            name = self._description.info.id
            raise ModelUnavailable(f"{name}: its chat template has no place for pictures")
        self._inputs(("x", None), self._budget.fit([Image.new("RGB", _ANY_SIZE)]))

    def check(self, request: Request) -> None:
        """See whether the model can do what is asked."""
        asked = _image_to_text(request)
        if asked.system is not None and "system" not in self._description.parameters:
            family = self._description.info.family
            raise UnsupportedParameter("system", f"system: {family} does not have it")
        if not self._control.strip(asked.prompt).strip():
            raise UnsupportedParameter("prompt", "prompt: nothing but control tokens")

    def run(
        self,
        request: Request,
        images: Sequence[PILImage],
        *,
        on_step: OnStep,
        cancelled: IsCancelled,
        on_text: OnText | None,
        on_preview: OnPreview | None,  # noqa: ARG002 - of the port; there is no picture
        save_memory: bool,
    ) -> RunnerOutput:
        """Write the text of one request."""
        if cancelled():
            raise Interrupted("stopped before the first token")
        asked = _image_to_text(request)
        deltas = None if on_text is None else Deltas(self._processor.tokenizer, on_text)
        savings = self._savings() if save_memory else ()
        return translated(
            lambda: self._write(asked, images, on_step, cancelled, deltas=deltas, savings=savings),
            free=lambda: release(self._placement.device),
            saved=savings,
        )

    def close(self) -> None:
        """Give the device's memory back."""
        del self._model
        release(self._placement.device)

    def _write(
        self,
        request: ImageToTextRequest,
        images: Sequence[PILImage],
        on_step: OnStep,
        cancelled: IsCancelled,
        *,
        deltas: Deltas | None,
        savings: tuple[str, ...],
    ) -> RunnerOutput:
        warnings = [f"memory was short: {saving}" for saving in savings]
        budget = self._budget
        if _FEWER_PIXELS in savings:
            budget = replace(budget, most=max(budget.most // 2, budget.least))
        said = self._cleaned(request)
        if said != (request.prompt, request.system):
            warnings.append("control tokens of the model were taken out of the text")
        inputs = self._inputs(said, budget.fit(images))
        most = self._most_new_tokens(request, inputs["input_ids"].shape[1])
        if request.max_new_tokens is not None and most < request.max_new_tokens:
            warnings.append(f"max_new_tokens: the model's context has room for {most} only")
        watch = _Watch(inputs["input_ids"].shape[1], most, on_step, cancelled)
        sampling = Sampling.of(request, self._description.defaults)
        cache = {"cache_implementation": "offloaded"} if _CACHE_ELSEWHERE in savings else {}
        written = self._generate(sampling, {**inputs, **cache}, watch, deltas)
        text = self._text(written, watch, sampling)
        if deltas is not None:
            deltas.finish(text.text)
        return RunnerOutput(
            text=text,
            warnings=tuple(warnings),
            parameters={"max_new_tokens": most, **sampling.parameters},
        )

    def _savings(self) -> tuple[str, ...]:
        """What a run can do with less memory, in words for the sender."""
        # Other families make every picture the same size, whatever they are given.
        fewer = (_FEWER_PIXELS,) if self._budget.patch is not None else ()
        return (*fewer, _CACHE_ELSEWHERE) if self._placement.device.type == "cuda" else fewer

    def _cleaned(self, request: ImageToTextRequest) -> tuple[str, str | None]:
        system = None if request.system is None else self._control.strip(request.system)
        return self._control.strip(request.prompt), system

    def _inputs(self, said: tuple[str, str | None], images: list[PILImage]) -> Any:
        """The tensors for the model, on its device: the chat in tokens and the pictures in patches.

        Args:
            said: The prompt and the system prompt, without control tokens.
            images: Within the budget.
        """
        text = self._chat(*said, pictures=len(images))
        # Where the template writes the first token itself, the tokenizer must not do so again.
        first = self._processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if first and text.startswith(first) else {}
        inputs = self._processor(text=[text], images=images, return_tensors="pt", **more)
        return inputs.to(self._placement.device, dtype=self._placement.dtype)

    def _chat(self, prompt: str, system: str | None, *, pictures: int) -> str:
        """The chat as the template writes it; of the pictures it sees how many there are."""
        places: list[dict[str, str]] = [{"type": "image"}] * pictures
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*places, {"type": "text", "text": prompt}]}
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def _most_new_tokens(self, request: ImageToTextRequest, prompt_tokens: int) -> int:
        room = self._context - prompt_tokens
        if room < 1:
            raise UnsupportedParameter(
                "prompt",
                f"prompt: {prompt_tokens} tokens with its pictures, of {self._context} at most",
            )
        wanted = request.max_new_tokens or self._description.defaults["max_new_tokens"]
        return min(int(wanted or 1), room)

    def _generate(
        self, sampling: Sampling, inputs: Any, watch: "_Watch", deltas: Deltas | None
    ) -> list[int]:
        """The tokens that the model wrote, without the prompt's."""
        if sampling.seed is not None:
            # There is no generator argument; one thread for each model makes the global one safe.
            torch.manual_seed(sampling.seed)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs,
                    **sampling.options,
                    max_new_tokens=watch.most,
                    stopping_criteria=StoppingCriteriaList([watch]),
                    logits_processor=LogitsProcessorList([_Numbers()]),
                    streamer=deltas,
                )
        finally:
            _wait_in_main_memory(self._model)
        if watch.stopped:
            raise StoppedAtStep
        written: list[int] = tokens[0, watch.prompt_tokens :].tolist()
        return written

    def _text(self, written: list[int], watch: "_Watch", sampling: Sampling) -> GeneratedText:
        return GeneratedText(
            text=written_text(self._processor.tokenizer, written),
            finish_reason="stop" if written and written[-1] in self._ends else "length",
            prompt_tokens=watch.prompt_tokens,
            completion_tokens=len(written),
            seed=sampling.seed,
        )


@dataclass
class _Watch(StoppingCriteria):
    """Tells each token, and stops at the very one after which it is cancelled."""

    prompt_tokens: int
    most: int
    on_step: Callable[[int, int], None]
    cancelled: Callable[[], bool]
    stopped: bool = False

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        self.on_step(input_ids.shape[1] - self.prompt_tokens, self.most)
        self.stopped = self.stopped or self.cancelled()
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)


class _Numbers(LogitsProcessor):
    """Refuses scores that are not numbers.

    Greedy decoding would make gibberish of them, and sampling on cuda ends the process's device.
    """

    def __call__(self, _: Any, scores: Any) -> Any:
        if torch.isnan(scores).any():
            raise BadOutput("the model made scores that are not numbers")
        return scores


def _wait_in_main_memory(model: Any) -> None:
    # With MODEL_OFFLOAD=model it came to the device with the first token.
    hook = getattr(model, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        model.to("cpu")


def _end_tokens(generation: Any, tokenizer: Any) -> frozenset[int]:
    ends = generation.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [ends])


def _has_system(processor: Any) -> bool:
    mark = "a system message"
    messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a prompt"}]
    try:
        return mark in processor.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - templates raise what they like at a role they lack
        return False


def _image_to_text(request: Request) -> ImageToTextRequest:
    if not isinstance(request, ImageToTextRequest):
        raise TypeError("a request for another task")
    return request
