"""The text encoder of FLUX.2-dev with random weights: a multimodal Mistral."""

# mypy: allow-untyped-calls

from typing import Any

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerBase,
)

from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE
from tests.support.tiny_parts import MODEL, chat_tokenizer

_IMAGE_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_PATCH = 14  # pixels


def mistral_processor() -> PixtralProcessor:
    """Return a processor with a byte-level tokenizer."""
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=_PATCH, size={"longest_edge": 56}),
        tokenizer=chat_tokenizer(*_IMAGE_TOKENS),
        patch_size=_PATCH,
        chat_template=CHAT_TEMPLATE,
    )


def mistral_encoder(tokenizer: PreTrainedTokenizerBase, *, layers: int) -> Any:
    """Return a model for the processor's tokenizer."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": MODEL,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": MODEL,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "patch_size": _PATCH,
            "image_size": 56,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE_TOKENS[0]),
    )
    return Mistral3ForConditionalGeneration(config).eval()
