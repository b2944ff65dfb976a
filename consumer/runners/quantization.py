"""Quantized weights in eight or four bits: bitsandbytes, torchao, or a transformer in GGUF.

The denoiser is always quantized, and a text encoder if it is large. The autoencoder is never
quantized, because it is small and its precision affects the pixels directly.
"""

# mypy: allow-untyped-calls

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from consumer.ports.model import ModelMisconfigured
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.setting_errors import QUANTIZATION_PACKAGES

_ON_CUDA = {"bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int4"}

_MIN_BYTES = 2**30  # of weights; a CLIP text encoder would lose precision and save little memory
_DENOISERS = ("transformer", "unet")
_INT4_GROUP = 128  # weights that share one scale; torchao's default


def require_quantization(config: ModelConfig, placement: Placement) -> None:
    """Refuse a quantization that is not available here, before anything is loaded.

    Raises:
        ModelUnavailable: Says what the quantization needs.
    """
    kind = config.quantization
    if kind == "none":
        return
    if find_spec(QUANTIZATION_PACKAGES[kind]) is None:
        raise ModelMisconfigured(
            f"MODEL_QUANTIZATION: the package {QUANTIZATION_PACKAGES[kind]} is not installed"
        )
    if kind in _ON_CUDA and placement.device.type != "cuda":
        raise ModelMisconfigured(f"MODEL_QUANTIZATION: {kind} needs the device cuda")
    if kind == "torchao-int4" and placement.dtype != torch.bfloat16:
        raise ModelMisconfigured("MODEL_QUANTIZATION, MODEL_DTYPE: torchao-int4 needs bfloat16")
    if kind == "gguf" and not Path(config.model_id or "?").expanduser().is_dir():
        raise ModelMisconfigured("MODEL_QUANTIZATION, MODEL_ID: gguf needs a folder with the model")


def for_transformers(
    config: ModelConfig, placement: Placement, folder: Path, *, min_bytes: int = _MIN_BYTES
) -> dict[str, Any]:
    """Arguments for `from_pretrained` of a model of transformers whose files are in a folder.

    Args:
        config: Whether to quantize.
        placement: Where it is put while it is loaded.
        config: The configuration of the model.
        placement: The device and dtype.
        folder: The model's folder.
        min_bytes: Size of the weights in bytes, below which the model is not quantized.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    kind = config.quantization
    if kind in {"none", "gguf"} or size < min_bytes:
        return {}
    if kind.startswith("bitsandbytes"):
        how: Any = transformers.BitsAndBytesConfig(**_bitsandbytes(kind, placement))
    else:
        how = transformers.TorchAoConfig(_torchao(kind))
    if config.device_map != "none":
        return {"quantization_config": how}
    return {"quantization_config": how, "device_map": {"": placement.device}}


def for_diffusers(
    config: ModelConfig, placement: Placement, index: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments for `from_pretrained` of a pipeline that quantize its denoiser."""
    kind = config.quantization
    if kind in {"none", "gguf"}:
        return {}
    # Not at module level: the import takes seconds, and vision-language models do not need it.
    from diffusers import TorchAoConfig
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    denoisers = [name for name in _DENOISERS if name in index]
    if kind.startswith("bitsandbytes"):
        how = PipelineQuantizationConfig(
            quant_backend=kind.replace("-", "_"),
            quant_kwargs=_bitsandbytes(kind, placement),
            components_to_quantize=denoisers,
        )
        return {"quantization_config": how}
    # The torchao configurations of the two libraries have different arguments, so diffusers accepts
    # them only for each part.
    mapping: dict[str, Any] = {name: TorchAoConfig(_torchao(kind)) for name in denoisers}
    how = PipelineQuantizationConfig(quant_mapping=mapping)
    arguments: dict[str, Any] = {"quantization_config": how}
    if placement.device.type == "cuda" and config.offload == "none":
        arguments["device_map"] = (
            "cuda"  # int4 is packed on the device; int8 is quantized faster there
        )
    return arguments


def denoiser_from_gguf(
    config: ModelConfig, placement: Placement, folder: Path, index: Mapping[str, Any]
) -> dict[str, Any]:
    """Load the denoiser from the only .gguf file in its folder, and return it by its name.

    The file is next to the denoiser's config.json, in place of its safetensors files. Its weights
    have the names of diffusers or those of the family's authors.

    Raises:
        ModelUnavailable: There is not exactly one such file, or diffusers cannot read it.
    """
    if config.quantization != "gguf":
        return {}
    import diffusers

    name = next((name for name in _DENOISERS if name in index), _DENOISERS[0])
    class_name = index.get(name, (None, None))[-1]
    read_from = getattr(getattr(diffusers, str(class_name), None), "from_single_file", None)
    if read_from is None:
        raise ModelMisconfigured(f"MODEL_QUANTIZATION: gguf is not for {name} of {class_name}")
    files = sorted((folder / name).glob("*.gguf"))
    if len(files) != 1:
        raise ModelMisconfigured(
            f"MODEL_QUANTIZATION: gguf needs one .gguf file in {name}, there are {len(files)}"
        )
    try:
        model = read_from(
            str(files[0]),
            config=str(folder),
            subfolder=name,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=placement.dtype),
            dtype=placement.dtype,
            local_files_only=True,
        )
    except (IndexError, KeyError):  # raised when diffusers renames weights and one is missing
        raise ModelMisconfigured(
            f"MODEL_QUANTIZATION: the weights in the .gguf file are not those of {class_name}"
        ) from None
    return {name: model}


def _bitsandbytes(kind: str, placement: Placement) -> dict[str, Any]:
    if kind.endswith("8bit"):
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": placement.dtype,
    }


def _torchao(kind: str) -> Any:
    from torchao.quantization import (  # type: ignore[import-untyped]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    if kind == "torchao-int8":
        return Int8WeightOnlyConfig()
    # The only packing whose kernels are part of torch.
    return Int4WeightOnlyConfig(group_size=_INT4_GROUP, int4_packing_format="tile_packed_to_4d")
