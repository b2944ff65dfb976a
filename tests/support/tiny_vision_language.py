"""Saves a tiny Qwen2.5-VL with random weights and its processor."""

# mypy: allow-untyped-calls

import string
from pathlib import Path

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE
from tests.support.tiny_parts import chat_tokenizer, vision_language_model

NEW_TOKENS = 48  # default number of tokens of a text


def save(folder: Path) -> None:
    """Save a model whose texts are printable ASCII and always have the maximum length."""
    tokenizer = chat_tokenizer()
    model = vision_language_model(tokenizer)
    model.generation_config = _generation(tokenizer)
    model.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_budget()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=_budget()),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def _generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    # Without suppressed tokens random weights would generate control characters and broken UTF-8,
    # and end at any token.
    plain = set(string.ascii_letters + string.digits + string.punctuation + "Ġ")  # Ġ: the blank
    end, padding = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[end, padding],
        pad_token_id=padding,
        suppress_tokens=[
            number for token, number in tokenizer.get_vocab().items() if token not in plain
        ],
    )


def _budget() -> dict[str, int]:
    tile = 28 * 28  # pixels of one token
    return {"shortest_edge": 4 * tile, "longest_edge": 256 * tile}
