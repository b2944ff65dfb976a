"""Loading weights in eight or four bits: bitsandbytes, torchao, or a transformer stored as GGUF.

The denoiser is quantized always, a text encoder only if it is large; the autoencoder never, for
it is small and makes the image.
"""

# mypy: allow-untyped-calls

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement

_PACKAGES = {
    "bitsandbytes-4bit": "bitsandbytes",
    "bitsandbytes-8bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
    "gguf": "gguf",
}
_ON_CUDA = {"bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int4"}

_WORTH_IT = 2**30  # bytes of weights; a CLIP text encoder would lose precision and save nothing
_DENOISERS = ("transformer", "unet")
_INT4_GROUP = 128  # weights with one scale; torchao's own default


def require_quantization(config: ModelConfig, placement: Placement) -> None:
    """Refuse a quantization that cannot be had here, before anything is loaded.

    Raises:
        ModelUnavailable: Says which.
    """
    kind = config.quantization
    if kind == "none":
        return
    if find_spec(_PACKAGES[kind]) is None:
        raise ModelUnavailable(
            f"MODEL_QUANTIZATION: the package {_PACKAGES[kind]} is not installed"
        )
    if kind in _ON_CUDA and placement.device.type != "cuda":
        raise ModelUnavailable(f"MODEL_QUANTIZATION: {kind} needs the device cuda")
    if kind == "torchao-int4" and placement.dtype != torch.bfloat16:
        raise ModelUnavailable("MODEL_QUANTIZATION, MODEL_DTYPE: torchao-int4 needs bfloat16")
    if kind == "gguf" and not Path(config.model_id or "?").expanduser().is_dir():
        raise ModelUnavailable("MODEL_QUANTIZATION, MODEL_ID: gguf needs a folder with the model")


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
    kind = config.quantization
    if kind in {"none", "gguf"} or size < worth_it:
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
    """Arguments for `from_pretrained` of a pipeline: its denoiser is quantized while it is read."""
    kind = config.quantization
    if kind in {"none", "gguf"}:
        return {}
    # Not at the top: a vision-language model has no use for diffusers, which takes seconds.
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
    # The libraries' configurations for torchao have different arguments, so that diffusers takes
    # them by part only.
    mapping: dict[str, Any] = {name: TorchAoConfig(_torchao(kind)) for name in denoisers}
    how = PipelineQuantizationConfig(quant_mapping=mapping)
    arguments: dict[str, Any] = {"quantization_config": how}
    if placement.device.type == "cuda" and config.offload == "none":
        arguments["device_map"] = "cuda"  # int4 is packed by the device; int8 is faster there
    return arguments


def denoiser_from_gguf(
    config: ModelConfig, placement: Placement, folder: Path, index: Mapping[str, Any]
) -> dict[str, Any]:
    """The denoiser by its name, read from the one .gguf file in its own folder.

    The file lies beside the denoiser's config.json, where its safetensors would be; its weights
    are named as diffusers names them or as the family's authors did.

    Raises:
        ModelUnavailable: There is no such file, or diffusers cannot read one for this family.
    """
    if config.quantization != "gguf":
        return {}
    import diffusers

    name = next((name for name in _DENOISERS if name in index), _DENOISERS[0])
    class_name = index.get(name, (None, None))[-1]
    read_from = getattr(getattr(diffusers, str(class_name), None), "from_single_file", None)
    if read_from is None:
        raise ModelUnavailable(f"MODEL_QUANTIZATION: gguf is not for {name} of {class_name}")
    files = sorted((folder / name).glob("*.gguf"))
    if len(files) != 1:
        raise ModelUnavailable(
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
    except (IndexError, KeyError):  # what diffusers' renaming of weights raises at one it lacks
        raise ModelUnavailable(
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
    # The one packing whose kernels come with torch.
    return Int4WeightOnlyConfig(group_size=_INT4_GROUP, int4_packing_format="tile_packed_to_4d")
