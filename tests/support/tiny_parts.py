"""Components of tiny models with random weights: tokenizers, text encoders and autoencoders.

They are classes of diffusers and transformers, small enough for a CPU. This module imports both
libraries, so the fixtures of `tests/support/tiny_models.py` import it late.
"""

# mypy: allow-untyped-calls

import string
from typing import Any

from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE, CONTROL_TOKENS

LATENTS = 4
WIDTHS = (4, 8, 8, 8)  # channels of the autoencoders; the compression is 8, as in published ones
MODEL = 32  # hidden size of most encoders

# The printable characters that byte-level tokenizers use for the 256 bytes.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def autoencoder(
    *,
    kind: type[Any] = AutoencoderKL,
    latents: int = LATENTS,
    widths: tuple[int, ...] = WIDTHS,
    quantized: bool = False,
    **options: Any,
) -> Any:
    """Return an autoencoder that halves the image size for each width except the first."""
    return kind(
        sample_size=64,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        use_quant_conv=quantized,
        use_post_quant_conv=quantized,
        **options,
    )


# -- CLIP, T5 and BERT ----------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-level tokenizer with at most 77 tokens."""
    words = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
    )


def clip_config() -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder for `clip_tokenizer`."""
    start = 2 * len(BYTES)
    return CLIPTextConfig(
        vocab_size=start + 2,
        bos_token_id=start,
        eos_token_id=start + 1,
        pad_token_id=start + 1,
        hidden_size=MODEL,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=MODEL,
    )


def clip_encoder(*, projection: bool = True) -> Any:
    """Return a CLIP text encoder, with or without its projection."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(clip_config()).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Return a character-level tokenizer of printable ASCII with at most 512 tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = string.ascii_letters + string.digits + string.punctuation
    return T5Tokenizer(
        vocab=pieces + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512
    )


def t5_encoder(*, width: int = MODEL, words: int | None = None) -> Any:
    """Return a T5 encoder for `t5_tokenizer`, or for a tokenizer with `words` tokens."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words or len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def bert_tokenizer() -> BertTokenizer:
    """Return a character-level tokenizer of lower-case ASCII with at most 77 tokens."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return BertTokenizer(vocab={p: n for n, p in enumerate(pieces)}, model_max_length=77)


def bert_encoder() -> Any:
    """Return a BERT for `bert_tokenizer`."""
    return BertModel(
        BertConfig(
            vocab_size=len(bert_tokenizer()),
            hidden_size=MODEL,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).eval()


# -- language models ------------------------------------------------------------------------------


def chat_tokenizer(*more: str, template: str | None = None) -> Qwen2Tokenizer:
    """Return a byte-level tokenizer with the control tokens of Qwen2.5-VL and additional tokens."""
    tokenizer = Qwen2Tokenizer(
        vocab={byte: number for number, byte in enumerate(BYTES)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[*CONTROL_TOKENS, *more],
        model_max_length=32_768,
    )
    tokenizer.chat_template = template
    return tokenizer


def templated_tokenizer() -> Qwen2Tokenizer:
    """Return a chat tokenizer with the chat template, as in Qwen3."""
    return chat_tokenizer(template=CHAT_TEMPLATE)


def qwen3_config(tokenizer: PreTrainedTokenizerBase, *, layers: int = 2) -> Qwen3Config:
    """Return the configuration of a Qwen3 for a chat tokenizer."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=MODEL,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )


def vision_language_model(
    tokenizer: PreTrainedTokenizerBase, *, width: int = 64, context: int = 32_768
) -> Any:
    """Return a Qwen2.5-VL with two layers each for text and vision; `width` is 64 or 32."""
    token: Any = tokenizer.convert_tokens_to_ids
    half = width // 4 // 2  # half the dimension of an attention head
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": MODEL,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
