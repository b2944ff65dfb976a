"""Tiny pipelines of further families with random weights: FLUX.1, HunyuanDiT, SDXL, PixArt.

Real classes of diffusers and transformers, small enough for a CPU, made of the demonstration
model's parts. Importing this file costs the import of diffusers: `tests/tiny_models.py` does it in
its fixtures.
"""

# mypy: allow-untyped-calls

import string
from typing import Any

import diffusers
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextModel

from consumer.runners.demonstration.pictures import (
    autoencoder,
    clip_config,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    text_to_image,
)

LATENTS = 4
WIDTHS = (4, 8, 8, 8)  # of the autoencoders: pictures become smaller by eight, as in the large ones


def stable_diffusion_3() -> Any:
    return text_to_image()


def flux(*, reads_guidance: bool = True, blocks: int = 1) -> Any:
    """FLUX.1-dev, whose weights read the guidance scale, or FLUX.1-schnell, whose do not."""
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENTS,
            num_layers=blocks,
            num_single_layers=blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=reads_guidance,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(latents=LATENTS, widths=WIDTHS, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def hunyuan_dit() -> Any:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = BertTokenizer(vocab={p: n for n, p in enumerate(pieces)}, model_max_length=77)
    encoder = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=LATENTS,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            hidden_size=24,
            activation_fn="gelu-approximate",
        ),
        vae=autoencoder(latents=LATENTS, widths=WIDTHS, quantized=True),
        scheduler=diffusers.DDPMScheduler(),
        text_encoder=BertModel(encoder).eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            in_channels=LATENTS,
            out_channels=LATENTS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=1,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        vae=autoencoder(latents=LATENTS, widths=WIDTHS, quantized=True, force_upcast=True),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
    )


def pixart() -> Any:
    """A family with the old callback, which is told of steps but returns nothing."""
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=LATENTS,
            out_channels=2 * LATENTS,
            cross_attention_dim=24,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        vae=autoencoder(latents=LATENTS, widths=WIDTHS, quantized=True),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )
