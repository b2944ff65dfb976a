"""Conversion of prompts with images to a model's input tensors, by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consumer.runners.device import Placement

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Chat:
    """A prompt about images.

    Attributes:
        prompt: Without control tokens.
        system: The system prompt, without control tokens; None: there is none.
        images: Resized to the budget of the model.
    """

    prompt: str
    system: str | None
    images: "Sequence[Image]"


class Chats:
    """Creates the inputs of a model.

    Args:
        processor: The model's processor, with a tokenizer and a chat template.
        placement: The device and dtype of the model.
        resize: Whether the image processor resizes images; False if they have the final size.
    """

    def __init__(self, processor: Any, placement: Placement, *, resize: bool) -> None:
        self._processor = processor
        self._placement = placement
        self._images = {} if resize else {"do_resize": False}

    def supports_images(self) -> bool:
        """Return whether the template has a place for images."""
        return self._render("x", None, images=1) != self._render("x", None, images=0)

    def supports_system(self) -> bool:
        """Return whether the template supports system messages."""
        mark = "a system message"
        messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a prompt"}]
        try:
            return mark in self._processor.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001 - templates raise any kind for an unsupported role
            return False

    def inputs(self, chats: Sequence[Chat]) -> Any:
        """Return the tensors for the model on its device, with a row for each chat."""
        texts = [self._render(c.prompt, c.system, images=len(c.images)) for c in chats]
        # If the template writes the first token, the tokenizer must not add it again.
        first = self._processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        # Set for a single chat too. Otherwise the values of a tokenizer_config.json apply, which
        # can truncate image tokens or pad each chat to a fixed length.
        text: dict[str, Any] = {"truncation": False, "padding": len(texts) > 1}
        if len(texts) > 1:
            # The generated text starts at the same position in all rows.
            text["padding_side"] = "left"
        images = [image for chat in chats for image in chat.images]
        inputs = self._processor(
            text=texts,
            images=images,
            return_tensors="pt",
            **text,
            **more,
            **self._images,
        )
        return inputs.to(self._placement.device, dtype=self._placement.dtype)

    def image_tokens(self, inputs: Any) -> list[int]:
        """Return the number of image tokens of each row; 0 if the processor names no such token."""
        token = getattr(self._processor, "image_token_id", None)
        tokens: list[int] = (
            (inputs["input_ids"] == (-1 if token is None else token)).sum(1).tolist()
        )
        return tokens

    def _render(self, prompt: str, system: str | None, *, images: int) -> str:
        """Render the chat by the template, with a placeholder for each image."""
        places: list[dict[str, str]] = [{"type": "image"}] * images
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*places, {"type": "text", "text": prompt}]}
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text


def prompt_tokens(inputs: Any) -> list[int]:
    """Return the number of tokens of each row's prompt, without padding."""
    rows, longest = inputs["input_ids"].shape
    if rows == 1:
        return [longest]
    tokens: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return tokens


def end_of_turn(processor: Any) -> int | None:
    """Find the control token that the chat template writes after an assistant message.

    Args:
        processor: A processor with a tokenizer and a chat template.

    Returns:
        The token id; None if the template writes none, or does not support such messages.
    """
    answer = "an answer"
    text = [{"type": "text", "text": answer}]
    for content in (answer, text):  # templates support either or both
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            written = processor.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001, S112 - templates raise any kind for such messages
            continue
        _, found, behind = written.rpartition(answer)
        tokens = processor.tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
        if tokens and tokens[0] in processor.tokenizer.all_special_ids:
            return int(tokens[0])
    return None
