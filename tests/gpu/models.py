"""Models with random weights, built on the device, and the daemon's runners around them.

Published weights cannot be downloaded everywhere, and their values have no influence on time and
memory: only the sizes of FLUX.1-dev and of Qwen2.5-VL-7B matter here. The tokenizers have few
words, which are all in the models' vocabularies.
"""

# mypy: allow-untyped-calls

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from consumer.runners import ModelConfig
from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE
from consumer.runners.device import Placement
from consumer.runners.image_to_text.vision_language import VisionLanguageModel
from consumer.runners.text_to_image.adapters import Adapters
from consumer.runners.text_to_image.batch import BatchKeys
from consumer.runners.text_to_image.diffusion import DiffusionModel
from consumer.runners.text_to_image.memory_guard import FreeBytes, free_bytes
from consumer.runners.text_to_image.parameters import Parameters
from generation_contracts import ModelInfo
from tests.support.tiny_families import flux as tiny_flux
from tests.support.tiny_parts import (
    chat_tokenizer,
    clip_tokenizer,
    t5_tokenizer,
    vision_language_model,
)

_VOCABULARY = 32_128  # of T5
_TILE = 28  # pixels, the side of an image token of Qwen2.5-VL


@dataclass(frozen=True)
class FluxSize:
    """The sizes that differ between FLUX.1-dev and a smaller model of the same width.

    Attributes:
        double: Blocks with separate weights for text and image.
        single: Blocks with common weights.
        t5_layers: Layers of the large text encoder.
    """

    double: int
    single: int
    t5_layers: int


FLUX_DEV = FluxSize(double=19, single=38, t5_layers=24)  # 12 and 4.8 billion weights
FLUX_SHORT = FluxSize(double=2, single=4, t5_layers=6)  # 1.3 and 1.2 billion


@dataclass(frozen=True)
class QwenSize:
    """The sizes that differ between Qwen2.5-VL-7B and a smaller model of the same width."""

    layers: int
    vision_layers: int
    vocabulary: int


QWEN_7B = QwenSize(layers=28, vision_layers=32, vocabulary=152_064)
QWEN_SHORT = QwenSize(layers=3, vision_layers=8, vocabulary=8_192)


def placement_of(device: str) -> Placement:
    """Return the device with the dtype that MODEL_DTYPE=auto chooses for it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Placement(torch.device(device), dtype)


def flux(size: FluxSize | None, placement: Placement) -> Any:
    """Build a FLUX.1-dev pipeline on the device; None: one with few weights."""
    with _weights_on(placement):
        pipe = tiny_flux() if size is None else _flux(size)
    pipe.to(placement.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusion_model(
    pipe: Any, placement: Placement, *, free: FreeBytes = free_bytes
) -> DiffusionModel:
    """Return the daemon's model around a pipeline, as `diffusion.load` does."""
    info = _info("random", type(pipe).__name__.removesuffix("Pipeline"), placement)
    parameters = Parameters(pipe, info)
    return DiffusionModel(
        pipe,
        placement,
        parameters,
        Adapters(pipe, {}),
        None,
        keys=BatchKeys(pipe, parameters, ModelConfig()),
        movable=placement.device.type != "cpu",
        free=free,
    )


def qwen(size: QwenSize | None, placement: Placement) -> tuple[Any, Any]:
    """Build a Qwen2.5-VL on the device, and its processor; None: one with few weights."""
    tokenizer = chat_tokenizer()
    with _weights_on(placement):
        model = vision_language_model(tokenizer) if size is None else _qwen(size, tokenizer)
    model.to(placement.device).eval()
    token: Any = tokenizer.convert_tokens_to_ids
    end, padding = token("<|im_end|>"), token("<|endoftext|>")
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        eos_token_id=[end, padding],
        pad_token_id=padding,
        suppress_tokens=sorted(tokenizer.all_special_ids),  # each text has its full length
    )
    budget = {"shortest_edge": 4 * _TILE**2, "longest_edge": 16_384 * _TILE**2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=budget),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=budget),
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def vision_model(model: Any, processor: Any, placement: Placement) -> VisionLanguageModel:
    """Return the daemon's model around a model of transformers, as `vision_language.load` does."""
    info = _info("random", model.config.model_type, placement)
    return VisionLanguageModel(model, processor, placement, info, ModelConfig())


def _info(name: str, family: str, placement: Placement) -> ModelInfo:
    return ModelInfo(
        id=name, family=family, dtype=placement.dtype_name, device=placement.device.type
    )


@contextmanager
def _weights_on(placement: Placement) -> Iterator[None]:
    """Create the weights of the block on the device and with its dtype."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(placement.dtype)
    try:
        with placement.device:
            yield
    finally:
        torch.set_default_dtype(before)


def _flux(size: FluxSize) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=size.double,
            num_single_layers=size.single,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKL(
            sample_size=1024,
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=_clip_large(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5_xxl(size.t5_layers),
        tokenizer_2=t5_tokenizer(),
    )


def _clip_large() -> Any:
    words = len(clip_tokenizer())  # the last two are the start and the end
    config = CLIPTextConfig(
        vocab_size=words,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        projection_dim=768,
    )
    return CLIPTextModel(config).eval()


def _t5_xxl(layers: int) -> Any:
    config = T5Config(
        vocab_size=_VOCABULARY,
        d_model=4096,
        d_kv=64,
        d_ff=10_240,
        num_layers=layers,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def _qwen(size: QwenSize, tokenizer: Any) -> Any:
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": size.layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 128_000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": list(range(7, size.vision_layers, 8)),
        },
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)
