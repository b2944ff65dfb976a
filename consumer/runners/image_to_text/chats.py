"""Chats with pictures, as the template of a model writes them, in tokens and patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consumer.runners.device import Placement

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Chat:
    """What is asked about pictures.

    Attributes:
        prompt: Without control tokens.
        system: The system prompt, the same.
        images: Within the budget of the model.
    """

    prompt: str
    system: str | None
    images: "Sequence[Image]"


class Chats:
    """Makes the inputs of a model.

    Args:
        processor: Of the model, with a tokenizer and a chat template.
        placement: Where the model is.
    """

    def __init__(self, processor: Any, placement: Placement) -> None:
        self._processor = processor
        self._placement = placement

    def have_pictures(self) -> bool:
        """Whether the template has a place for them."""
        return self._written("x", None, pictures=1) != self._written("x", None, pictures=0)

    def have_system(self) -> bool:
        """Whether the template takes system messages."""
        mark = "a system message"
        messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a prompt"}]
        try:
            return mark in self._processor.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001 - templates raise what they like at a role they lack
            return False

    def inputs(self, chats: Sequence[Chat]) -> Any:
        """The tensors for the model, on its device, with a row for each chat."""
        texts = [self._written(c.prompt, c.system, pictures=len(c.images)) for c in chats]
        # Where the template writes the first token itself, the tokenizer must not do so again.
        first = self._processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        # What is written begins where the prompts end: at the same place in all rows.
        padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
        images = [image for chat in chats for image in chat.images]
        inputs = self._processor(text=texts, images=images, return_tensors="pt", **more, **padding)
        return inputs.to(self._placement.device, dtype=self._placement.dtype)

    def _written(self, prompt: str, system: str | None, *, pictures: int) -> str:
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


def prompt_tokens(inputs: Any) -> list[int]:
    """How many tokens the prompt of each row has, without the padding."""
    rows, longest = inputs["input_ids"].shape
    if rows == 1:
        return [longest]
    tokens: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return tokens
