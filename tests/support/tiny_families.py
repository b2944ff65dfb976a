"""Tiny pipelines of every family with random weights, small enough for a CPU.

Each function makes one family. The fixtures of `tests/support/tiny_models.py` find a function by
its name, and its options make the variants. `full_size` sets the default and largest image sizes of
the published weights, if these sizes come from a configuration and not from the pipeline's code.
"""

# mypy: allow-untyped-calls

from typing import Any

import diffusers
from transformers import ByT5Tokenizer, Qwen3ForCausalLM, Qwen3Model

from tests.support.tiny_mistral import mistral_encoder, mistral_processor
from tests.support.tiny_parts import (
    LATENTS,
    MODEL,
    autoencoder,
    bert_encoder,
    bert_tokenizer,
    chat_tokenizer,
    clip_encoder,
    clip_tokenizer,
    qwen3_config,
    t5_encoder,
    t5_tokenizer,
    templated_tokenizer,
    vision_language_model,
)

_FULL_SIZE = 128  # latents, each side: 1024 pixels
_SMALL = 8  # latents, each side: 64 pixels


# -- Stable Diffusion -----------------------------------------------------------------------------


def stable_diffusion_3(
    *, t5: bool = True, full_size: bool = False, **of_the_transformer: Any
) -> Any:
    """Make images of 64x64 to 512x512 pixels, or with `full_size` 1024x1024 to 3072x3072."""
    patch = 2
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=_FULL_SIZE if full_size else _SMALL,
            patch_size=patch,
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * MODEL,
            caption_projection_dim=16,
            pooled_projection_dim=2 * MODEL,
            pos_embed_max_size=192 if full_size else 512 // 8 // patch,
            **of_the_transformer,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=2 * MODEL) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def stable_diffusion_35(*, full_size: bool = False) -> Any:
    """Use normalised attention, and dual attention in some layers, as the 3.5 weights do."""
    return stable_diffusion_3(full_size=full_size, qk_norm="rms_norm", dual_attention_layers=(0,))


def stable_diffusion_xl(*, full_size: bool = False) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=_FULL_SIZE if full_size else _SMALL,
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
        vae=autoencoder(quantized=True, force_upcast=True),
        text_encoder=clip_encoder(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
    )


# -- FLUX -----------------------------------------------------------------------------------------


def flux(*, reads_guidance: bool = True, blocks: int = 1) -> Any:
    """Make FLUX.1-dev, whose transformer reads the guidance scale, or FLUX.1-schnell."""
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENTS,
            num_layers=blocks,
            num_single_layers=blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=MODEL,
            pooled_projection_dim=MODEL,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=reads_guidance,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip_encoder(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def flux_2() -> Any:
    """Make FLUX.2-dev. Its text encoder is a multimodal Mistral."""
    layers = 30  # the pipeline reads the states of layers 10, 20 and 30
    processor = mistral_processor()
    return diffusers.Flux2Pipeline(
        transformer=_flux_2_transformer(reads_guidance=True),
        vae=autoencoder(kind=diffusers.AutoencoderKLFlux2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=mistral_encoder(processor.tokenizer, layers=layers),
        tokenizer=processor,
    )


def flux_2_klein(*, is_distilled: bool = False) -> Any:
    layers = 27  # the pipeline reads the states of layers 9, 18 and 27
    tokenizer = templated_tokenizer()
    return diffusers.Flux2KleinPipeline(
        transformer=_flux_2_transformer(reads_guidance=False),
        vae=autoencoder(kind=diffusers.AutoencoderKLFlux2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=Qwen3ForCausalLM(qwen3_config(tokenizer, layers=layers)).eval(),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


def _flux_2_transformer(*, reads_guidance: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * MODEL,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=reads_guidance,
    )


# -- Hunyuan --------------------------------------------------------------------------------------


def hunyuan_dit(*, full_size: bool = False) -> Any:
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=_FULL_SIZE if full_size else _SMALL,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=LATENTS,
            cross_attention_dim=MODEL,
            cross_attention_dim_t5=MODEL,
            pooled_projection_dim=16,
            hidden_size=24,
            activation_fn="gelu-approximate",
        ),
        vae=autoencoder(quantized=True),
        scheduler=diffusers.DDPMScheduler(),
        text_encoder=bert_encoder(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def hunyuan_image(*, is_distilled: bool = False) -> Any:
    """Make HunyuanImage 2.1 with guiders, or distilled: its transformer reads the scale."""
    tokenizer, glyphs = chat_tokenizer(), ByT5Tokenizer()
    guider = diffusers.AdaptiveProjectedMixGuidance
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_attention_heads=1,  # of 1,000 tokens each
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            guidance_embeds=is_distilled,
            use_meanflow=is_distilled,
            text_embed_dim=MODEL,
            text_embed_2_dim=MODEL,
            rope_axes_dim=(8, 8),
        ),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENTS,
            block_out_channels=(32,) * 6,
            layers_per_block=1,
            scaling_factor=0.75,
            spatial_compression_ratio=32,
            sample_size=64,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=vision_language_model(tokenizer, width=MODEL),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(words=len(glyphs)),
        tokenizer_2=glyphs,
        guider=None if is_distilled else guider(guidance_scale=3.5),
        ocr_guider=None if is_distilled else guider(guidance_scale=4.5),
    )


# -- Qwen, Z-Image, PixArt ------------------------------------------------------------------------


def qwen_image() -> Any:
    tokenizer = chat_tokenizer()
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * LATENTS,
            out_channels=LATENTS,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=MODEL,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=LATENTS,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * LATENTS,
            latents_std=[1.0] * LATENTS,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02
        ),
        text_encoder=vision_language_model(tokenizer, width=MODEL),
        tokenizer=tokenizer,
    )


def z_image() -> Any:
    tokenizer = templated_tokenizer()
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=LATENTS,
            dim=MODEL,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            qk_norm=True,
            cap_feat_dim=MODEL,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 64, 64],
        ),
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.12),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3Model(qwen3_config(tokenizer)).eval(),
        tokenizer=tokenizer,
    )


def pixart() -> Any:
    """Make a family with the older callback, which diffusers calls without a return value."""
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=_SMALL,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=LATENTS,
            out_channels=2 * LATENTS,
            cross_attention_dim=24,
            caption_channels=MODEL,
            use_additional_conditions=False,
        ),
        vae=autoencoder(quantized=True),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )
