"""Saves tiny vision-language models of several families with random weights.

The models generate any bytes, including broken UTF-8, but no control token, so their texts always
have the maximum length. This module imports transformers, so the tests import it in fixtures.
"""

# mypy: allow-untyped-calls

from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE
from tests.support.tiny_parts import chat_tokenizer

CONTEXT = 4_096  # tokens
WIDTH = 64
_QUARTER = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}

# The template of the published LLaVA, with an additional first token as in other families.
_LLAVA_TEMPLATE = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + ' ' -}}
    {%- else -%}
        {{- 'USER: ' -}}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}{{- '<image>\n' -}}{%- endif -%}
        {%- endfor -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def qwen2_vl(folder: Path) -> None:
    tokenizer = chat_tokenizer()
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=_ROPE), vision_config=vision, **_ids(tokenizer)
    )
    _save(Qwen2VLForConditionalGeneration(config), tokenizer, folder)
    size = _budget(28)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    """Save a Qwen3-VL. Its patches are larger than those of Qwen2-VL."""
    tokenizer = chat_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    rope = {**_ROPE, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope, head_dim=16),
        vision_config=vision,
        **_ids(tokenizer),
    )
    _save(Qwen3VLForConditionalGeneration(config), tokenizer, folder)
    size = _budget(32)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, patch_size=16),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def llava(folder: Path) -> None:
    """Save a LLaVA: a family with one image size and a tokenizer of word pieces."""
    tokenizer = _pieces()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    _save(LlavaForConditionalGeneration(config), tokenizer, folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    ).save_pretrained(folder)


def _pieces() -> Any:
    """Return a tokenizer of word pieces with and without a leading blank, and of all bytes."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *".:?"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    words += [*letters, *(f"▁{letter}" for letter in letters)]
    return LlamaTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        pad_token="</s>",
        extra_special_tokens=["<image>"],
        add_bos_token=True,
        model_max_length=CONTEXT,
    )


def _text(tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_QUARTER,
        **more,
    }


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    token: Any = tokenizer.convert_tokens_to_ids
    return {
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
    }


def _budget(tile: int) -> dict[str, int]:
    """Return the pixel budget for images of 4 to 256 tokens with `tile` pixels per side."""
    return {"shortest_edge": 4 * tile**2, "longest_edge": 256 * tile**2}


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        max_new_tokens=48,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(tokenizer.all_special_ids),
    )
    model.eval().save_pretrained(folder)
