"""The demonstration model that writes texts about pictures, and the parts that it is made of."""

# mypy: allow-untyped-calls

import string
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

NEW_TOKENS = 48  # the most that a text has, unless the request says more

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML with the places of the pictures, as Qwen2.5-VL wants it.
CHAT_TEMPLATE = r"""
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def save(folder: Path) -> None:
    """A Qwen2.5-VL whose texts are printable ASCII, with its processor."""
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


def chat_tokenizer() -> Qwen2Tokenizer:
    """Reads any text byte by byte, with the control tokens of Qwen2.5-VL."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={byte: number for number, byte in enumerate(alphabet)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CONTROL_TOKENS),
        model_max_length=32_768,
    )


def vision_language_model(tokenizer: PreTrainedTokenizerBase, *, context: int = 32_768) -> Any:
    """A Qwen2.5-VL of two layers each for text and vision."""
    token: Any = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],  # half of a head: 64 / 4 / 2
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    # Random weights would write control characters and broken UTF-8 as readily as letters.
    plain = set(string.ascii_letters + string.digits + string.punctuation + "Ġ")  # Ġ: the blank
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[end, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        suppress_tokens=[
            number
            for token, number in tokenizer.get_vocab().items()
            if token not in plain and number != end
        ],
    )


def _budget() -> dict[str, int]:
    tile = 28 * 28  # pixels of one token
    return {"shortest_edge": 4 * tile, "longest_edge": 256 * tile}
