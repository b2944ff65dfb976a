"""Loading a vision-language model of transformers with its processor."""

# mypy: allow-untyped-calls

from typing import Any

import accelerate
import huggingface_hub
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from consumer.ports import ModelUnavailable
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.faults import load_failure
from consumer.runners.source import Source
from consumer.runners.weights import see_that_none_were_invented, straight_to_the_device

# Never a path or an address of anything but the folder, and never code from it.
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}

# What transformers brings itself, or by one package, and the models' word for having it.
_ATTENTION = {
    "eager": None,
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
}


def download(model_id: str, revision: str | None, *, cached_only: bool) -> str:
    """Fetch a model from the hub: what transformers reads, and no second copy in other formats."""
    return huggingface_hub.snapshot_download(
        model_id,
        revision=revision,
        local_files_only=cached_only,
        allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
        ignore_patterns=["*/*"],
    )


def load_vision_language(
    source: Source, placement: Placement, config: ModelConfig
) -> tuple[Any, Any]:
    """A model that reads pictures and text and writes text, and its processor.

    Raises:
        ModelUnavailable: One clear line.
    """
    if not (source.folder / "config.json").is_file():
        raise ModelUnavailable(f"{source.id}: there is no config.json in it")
    try:
        model_class = _class_that_writes(source)
        _see_that_the_attention_is_here(config.attention, model_class)
        processor = _processor(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            dtype=placement.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **({"attn_implementation": config.attention} if config.attention else {}),
            **({"device_map": config.device_map} if config.device_map != "none" else {}),
            **straight_to_the_device(placement, config),
            **quantization.for_transformers(config, placement, source.folder, worth_it=0),
            **_LOCALLY,
        )
        model, info = loaded
        see_that_none_were_invented(info, source.id)
        _see_that_none_is_off_the_gpus(model, config)
        model.eval()
        _put_in_place(model, placement, config)
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises dozens of kinds
        failure = load_failure(error, name=source.id, folder=source.folder)
    else:
        return model, processor
    raise failure


def _class_that_writes(source: Source) -> type[Any]:
    config = AutoConfig.from_pretrained(source.folder, **_LOCALLY)
    classes: Any = AutoModelForImageTextToText._model_mapping  # noqa: SLF001 - no public way
    if type(config) not in classes:
        raise ModelUnavailable(
            f"{source.id}: {config.model_type} does not write texts about pictures"
        )
    found: type[Any] = classes[type(config)]
    return found


def _processor(source: Source) -> Any:
    processor = AutoProcessor.from_pretrained(source.folder, **_LOCALLY)
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ModelUnavailable(f"{source.id}: its processor has no {part.replace('_', ' ')}")
    return processor


def _see_that_the_attention_is_here(name: str, model_class: type[Any]) -> None:
    if not name:
        return
    # Any other name would be fetched from the hub and run.
    if name not in _ATTENTION:
        raise ModelUnavailable(f"MODEL_ATTENTION: must be one of {', '.join(_ATTENTION)}")
    if (having := _ATTENTION[name]) and not getattr(model_class, having):
        raise ModelUnavailable(f"MODEL_ATTENTION: {model_class.__name__} has no {name}")
    # Where its package is missing but `kernels` is there, it would be fetched from the hub too.
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelUnavailable("MODEL_ATTENTION: the package flash-attn is not installed")


def _see_that_none_is_off_the_gpus(model: Any, config: ModelConfig) -> None:
    if config.device_map != "none" and {"cpu", "disk"} & set(model.hf_device_map.values()):
        raise ModelUnavailable("MODEL_DEVICE_MAP: the model does not fit on the GPUs")


def _put_in_place(model: Any, placement: Placement, config: ModelConfig) -> None:
    if config.offload == "model":
        accelerate.cpu_offload_with_hook(model, placement.device)
    elif config.offload == "sequential":
        accelerate.cpu_offload(model, placement.device)
    elif config.quantization == "none" and config.device_map == "none":
        model.to(placement.device)  # a quantized one was put there while it was loaded
    if config.compile:
        _compile_the_layers(model)


def _compile_the_layers(model: Any) -> None:
    # What must not be split over devices are the layers that repeat. Their lengths change with
    # every request: dynamic, or each would be compiled anew.
    layers = set(model._no_split_modules or ())  # noqa: SLF001 - no public way
    repeated = [module for module in model.modules() if type(module).__name__ in layers]
    for module in repeated or [model]:
        module.compile(dynamic=True)
