"""The text encoders of the text-to-image model: two small CLIP encoders and a T5 of zeros."""

# mypy: allow-untyped-calls

import string
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from consumer.runners.demonstration.training.words import BYTES, merges, vocabulary

TEXT_WIDTH = 64  # width of each of the two text encoders
TOKENS = 32  # tokens of a prompt
_TEXT_LAYERS = 3


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Return a tokenizer with a token for each word of the sentences, and for each byte."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    joined = merges((s.lower() for s in texts), split, end_of_word="</w>")
    pieces = vocabulary(joined, [*BYTES, *(f"{byte}</w>" for byte in BYTES)])
    pieces["<|startoftext|>"] = len(pieces)
    pieces["<|endoftext|>"] = len(pieces)
    return CLIPTokenizer(vocab=pieces, merges=joined, model_max_length=TOKENS)


def text_encoder(tokenizer: CLIPTokenizer) -> Any:
    """Create a CLIP text encoder with initial weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_attention_heads=4,
            num_hidden_layers=_TEXT_LAYERS,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=TOKENS,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer with one token for each printable ASCII character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = string.ascii_letters + string.digits + string.punctuation
    return T5Tokenizer(
        vocab=pieces + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512
    )


def zero_t5() -> Any:
    """Create a T5 whose output is always zero, as the pipeline uses for a missing text encoder.

    A pipeline that is saved without its third text encoder needs an extra argument to load.
    """
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=2 * TEXT_WIDTH,
            d_kv=8,
            d_ff=8,
            num_layers=1,
            num_heads=1,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model.eval()
