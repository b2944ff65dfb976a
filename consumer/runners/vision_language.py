"""Image to text: Qwen2.5-VL, Qwen2-VL and what else AutoModelForImageTextToText loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import CpuOffload
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
    OnStep,
    RunnerOutput,
    UnsupportedParameter,
)
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.control_tokens import ControlTokens
from consumer.runners.device import Placement, place, release
from consumer.runners.faults import BadOutput, StoppedAtStep, translated
from consumer.runners.pictures import PictureBudget
from consumer.runners.sampling import Sampling, defaults_of
from consumer.runners.source import located
from consumer.runners.vision_loading import download, load_vision_language
from generation_contracts import ImageToTextRequest, ModelInfo, Request, Task

if TYPE_CHECKING:
    from PIL.Image import Image

_PARAMETERS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
}
_REFUSED = {
    "stream": "this worker does not send a text in parts",
    "then": "this worker starts no further steps",
}


def load(config: ModelConfig) -> "VisionLanguageModel":
    """Load the configured model.

    Raises:
        ModelUnavailable: With one clear line.
    """
    placement = place(config)
    quantization.see_that_it_can_be(config, placement)
    with located(Task.IMAGE_TO_TEXT, config, download) as source:
        model, processor = load_vision_language(source, placement, config)
    info = ModelInfo(
        id=source.id,
        revision=source.revision,
        family=model.config.model_type,
        dtype=placement.dtype_name,
        device=placement.device.type,
    )
    return VisionLanguageModel(model, processor, placement, info, config.max_image_pixels)


class VisionLanguageModel:
    """A loaded model; see `consumer.ports.Runner` for what its methods promise.

    Args:
        model: The model of transformers.
        processor: Its processor, with a tokenizer and a chat template.
        placement: Where it was put.
        info: What it is called.
        max_image_pixels: An input picture larger than this is made smaller.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        placement: Placement,
        info: ModelInfo,
        max_image_pixels: int,
    ) -> None:
        self._model = model
        self._processor = processor
        self._placement = placement
        self._budget = PictureBudget.of(processor.image_processor, max_image_pixels)
        self._control = ControlTokens(processor)
        self._context = int(model.config.get_text_config().max_position_embeddings)  # tokens
        self._ends = _end_tokens(model.generation_config, processor.tokenizer)
        system = {"system"} if _has_system(processor) else set()
        self._description = ModelDescription(
            info=info,
            parameters=frozenset(_PARAMETERS | system),
            defaults=defaults_of(model.generation_config),
        )

    @property
    def description(self) -> ModelDescription:
        """What the model is and takes."""
        return self._description

    def check(self, request: Request) -> None:
        """See whether the model can do what is asked."""
        asked = _image_to_text(request)
        for name, reason in _REFUSED.items():
            if getattr(asked, name):
                raise UnsupportedParameter(name, f"{name}: {reason}")
        if asked.system is not None and "system" not in self._description.parameters:
            family = self._description.info.family
            raise UnsupportedParameter("system", f"system: {family} does not have it")
        if not self._control.strip(asked.prompt).strip():
            raise UnsupportedParameter("prompt", "prompt: nothing but control tokens")

    def run(
        self,
        request: Request,
        images: Sequence["Image"],
        *,
        on_step: OnStep,
        cancelled: IsCancelled,
        save_memory: bool,
    ) -> RunnerOutput:
        """Write the text of one request."""
        if cancelled():
            raise Interrupted("stopped before the first token")
        asked = _image_to_text(request)
        return translated(
            lambda: self._write(asked, images, on_step, cancelled, save_memory=save_memory),
            free=lambda: release(self._placement.device),
        )

    def close(self) -> None:
        """Give the device's memory back."""
        del self._model
        release(self._placement.device)

    def _write(
        self,
        request: ImageToTextRequest,
        images: Sequence["Image"],
        on_step: OnStep,
        cancelled: IsCancelled,
        *,
        save_memory: bool,
    ) -> RunnerOutput:
        warnings = []
        budget = self._budget
        if save_memory:
            budget = replace(budget, most=max(budget.most // 2, budget.least))
            warnings.append("memory was short: the pictures were read at half their pixels")
        if self._cleaned(request) != (request.prompt, request.system):
            warnings.append("control tokens of the model were taken out of the text")
        inputs = self._inputs(request, budget.fit(images))
        most = self._most_new_tokens(request, inputs["input_ids"].shape[1])
        if request.max_new_tokens is not None and most < request.max_new_tokens:
            warnings.append(f"max_new_tokens: the model's context has room for {most} only")
        watch = _Watch(inputs["input_ids"].shape[1], most, on_step, cancelled)
        written = self._generate(request, inputs, watch, most, offload_cache=save_memory)
        return RunnerOutput(text=self._text(written, watch), warnings=tuple(warnings))

    def _cleaned(self, request: ImageToTextRequest) -> tuple[str, str | None]:
        system = None if request.system is None else self._control.strip(request.system)
        return self._control.strip(request.prompt), system

    def _inputs(self, request: ImageToTextRequest, images: "list[Image]") -> Any:
        """The tensors for the model, on its device: the chat in tokens and the pictures in patches.

        The template sees that there are pictures, not the pictures: what it gives is text only.
        """
        prompt, system = self._cleaned(request)
        places: list[dict[str, str]] = [{"type": "image"} for _ in images]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*places, {"type": "text", "text": prompt}]}
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        inputs = self._processor(text=[text], images=images, return_tensors="pt")
        return inputs.to(self._placement.device, dtype=self._placement.dtype)

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
        self,
        request: ImageToTextRequest,
        inputs: Any,
        watch: "_Watch",
        most: int,
        *,
        offload_cache: bool,
    ) -> list[int]:
        """The tokens that the model wrote, without the prompt's."""
        sampling = Sampling.of(request, self._description.defaults)
        if sampling.seed is not None:
            # There is no generator argument; one thread for each model makes the global one safe.
            torch.manual_seed(sampling.seed)
        options = dict(sampling.options)
        if offload_cache and self._placement.device.type == "cuda":
            options["cache_implementation"] = "offloaded"
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs,
                    **options,
                    max_new_tokens=most,
                    stopping_criteria=StoppingCriteriaList([watch]),
                    logits_processor=LogitsProcessorList([_Numbers()]),
                )
        finally:
            _wait_in_main_memory(self._model)
        if watch.stopped:
            raise StoppedAtStep
        written: list[int] = tokens[0, watch.prompt_tokens :].tolist()
        return written

    def _text(self, written: list[int], watch: "_Watch") -> GeneratedText:
        text: str = self._processor.tokenizer.decode(
            written, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return GeneratedText(
            text=text,
            finish_reason="stop" if written and written[-1] in self._ends else "length",
            prompt_tokens=watch.prompt_tokens,
            completion_tokens=len(written),
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
