"""Chats with images, as the template of a model writes them, in tokens and patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consumer.runners.device import Placement

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Chat:
    """What is asked about images.

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
        resize: Whether the image processor resizes images; not where they have their size already.
    """

    def __init__(self, processor: Any, placement: Placement, *, resize: bool) -> None:
        self._processor = processor
        self._placement = placement
        self._images = {} if resize else {"do_resize": False}

    def have_images(self) -> bool:
        """Whether the template has a place for them."""
        return self._written("x", None, images=1) != self._written("x", None, images=0)

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
        texts = [self._written(c.prompt, c.system, images=len(c.images)) for c in chats]
        # Where the template writes the first token itself, the tokenizer must not do so again.
        first = self._processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        # Said for a single chat too. The processor takes the values of a tokenizer_config.json
        # otherwise: it cuts the places of images out of a chat, or pads each chat to one length.
        text: dict[str, Any] = {"truncation": False, "padding": len(texts) > 1}
        if len(texts) > 1:
            # What is written begins where the prompts end: at the same place in all rows.
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
        """How many tokens of each row stand for images; none where the processor does not say."""
        token = getattr(self._processor, "image_token_id", None)
        tokens: list[int] = (
            (inputs["input_ids"] == (-1 if token is None else token)).sum(1).tolist()
        )
        return tokens

    def _written(self, prompt: str, system: str | None, *, images: int) -> str:
        """The chat as the template writes it; it contains one place for each image."""
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
    """How many tokens the prompt of each row has, without the padding."""
    rows, longest = inputs["input_ids"].shape
    if rows == 1:
        return [longest]
    tokens: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return tokens


def end_of_turn(processor: Any) -> int | None:
    """Find the control token that the chat template writes behind what the assistant says.

    Args:
        processor: With a tokenizer and a chat template.

    Returns:
        The token's number; None where the template writes none, or does not take such messages.
    """
    answer = "an answer"
    text = [{"type": "text", "text": answer}]
    for content in (answer, text):  # templates take either or both
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            written = processor.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001, S112 - templates raise what they like at such messages
            continue
        _, found, behind = written.rpartition(answer)
        tokens = processor.tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
        if tokens and tokens[0] in processor.tokenizer.all_special_ids:
            return int(tokens[0])
    return None
