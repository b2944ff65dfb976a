"""The demonstration model that makes pictures, and the parts that it is made of."""

# mypy: allow-untyped-calls

import string
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PICTURE = 64  # pixels, each side of the default picture
LARGEST = 512  # pixels, each side of the largest picture

# The printable stand-ins for the 256 bytes that byte-level tokenizers are made of.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def save(folder: Path) -> None:
    """Save the model with freshly drawn weights."""
    text_to_image().save_pretrained(folder, safe_serialization=True)


def text_to_image() -> Any:
    """A Stable Diffusion 3 with all its parts, 64x64 pixels by default, at most 512x512."""
    downscale, patch = 4, 2  # of the autoencoder and of the transformer
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=PICTURE // downscale,
            patch_size=patch,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=LARGEST // downscale // patch,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(latents=8, widths=(8, 16, 16), scaling_factor=1.0, shift_factor=0.0),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=64),
        tokenizer_3=t5_tokenizer(),
    )


def autoencoder(
    *, latents: int, widths: tuple[int, ...], quantized: bool = False, **options: Any
) -> AutoencoderKL:
    """An autoencoder that makes pictures smaller by two for each width but the first."""
    return AutoencoderKL(
        sample_size=PICTURE,
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


def clip_tokenizer() -> CLIPTokenizer:
    """Reads any text byte by byte, 77 tokens long."""
    words = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
    )


def clip_config() -> CLIPTextConfig:
    """The configuration of a CLIP text encoder for `clip_tokenizer`."""
    start = 2 * len(BYTES)
    return CLIPTextConfig(
        vocab_size=start + 2,
        bos_token_id=start,
        eos_token_id=start + 1,
        pad_token_id=start + 1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
    )


def clip_encoder() -> Any:
    """A CLIP text encoder with its projection."""
    return CLIPTextModelWithProjection(clip_config()).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Reads printable ASCII letter by letter, 512 tokens long."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = string.ascii_letters + string.digits + string.punctuation
    return T5Tokenizer(
        vocab=pieces + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512
    )


def t5_encoder(*, width: int = 32) -> Any:
    """A T5 encoder for `t5_tokenizer`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
