"""Loading weights in four bits, where bitsandbytes is installed."""

# mypy: allow-untyped-calls

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from consumer.ports import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement

FOUR_BITS = "bitsandbytes-4bit"

_WORTH_IT = 2**30  # bytes of weights; a CLIP text encoder would lose precision and save nothing
_DENOISERS = ("transformer", "unet")


def see_that_it_can_be(config: ModelConfig, placement: Placement) -> None:
    """Refuse a quantization that cannot be had here, before anything is loaded.

    Raises:
        ModelUnavailable: Says which.
    """
    if config.quantization == "none":
        return
    if config.quantization != FOUR_BITS:
        raise ModelUnavailable(f"MODEL_QUANTIZATION: must be none or {FOUR_BITS}")
    if find_spec("bitsandbytes") is None:
        raise ModelUnavailable("MODEL_QUANTIZATION: the package bitsandbytes is not installed")
    if placement.device.type != "cuda":
        raise ModelUnavailable("MODEL_QUANTIZATION: needs the device cuda")


def for_transformers(
    config: ModelConfig, placement: Placement, folder: Path, *, worth_it: int = _WORTH_IT
) -> dict[str, Any]:
    """Arguments for `from_pretrained` of a model of transformers whose files are in a folder.

    Args:
        config: Whether to quantize.
        placement: Where it is put while it is loaded.
        folder: Of the model.
        worth_it: Bytes of weights below which the model is left as it is.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if config.quantization == "none" or size < worth_it:
        return {}
    four_bits = transformers.BitsAndBytesConfig(**_options(placement))
    return {"quantization_config": four_bits, "device_map": {"": placement.device}}


def for_diffusers(
    config: ModelConfig, placement: Placement, index: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments for `from_pretrained` of a pipeline: its denoiser is quantized."""
    if config.quantization == "none":
        return {}
    # Not at the top: a vision-language model has no use for diffusers, which takes seconds.
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    four_bits = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs=_options(placement),
        components_to_quantize=[name for name in _DENOISERS if name in index],
    )
    return {"quantization_config": four_bits}


def _options(placement: Placement) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": placement.dtype,
    }
