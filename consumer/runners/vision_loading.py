"""Loading a vision-language model of transformers with its processor."""

# mypy: allow-untyped-calls

from typing import Any

import accelerate
import huggingface_hub
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
)

from consumer.ports import ModelUnavailable
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.faults import load_failure
from consumer.runners.source import Source
from consumer.runners.weights import see_that_none_were_invented

# Never a path or an address of anything but the folder, and never code from it.
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}


def download(model_id: str, revision: str | None) -> str:
    """Fetch a model from the hub: what transformers reads, and no second copy in other formats."""
    return huggingface_hub.snapshot_download(
        model_id,
        revision=revision,
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
    if config.offload == "group":
        raise ModelUnavailable("MODEL_OFFLOAD: group is for pipelines; take model or sequential")
    try:
        _see_that_it_writes(AutoConfig.from_pretrained(source.folder, **_LOCALLY), source.id)
        processor = _processor(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            dtype=placement.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **quantization.for_transformers(config, placement, source.folder, worth_it=0),
            **_LOCALLY,
        )
        model, info = loaded
        see_that_none_were_invented(info, source.id)
        model.eval()
        _put_in_place(model, placement, config)
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises dozens of kinds
        failure = load_failure(error, name=source.id, folder=source.folder)
    else:
        return model, processor
    raise failure


def _see_that_it_writes(config: PreTrainedConfig, name: str) -> None:
    if type(config) not in AutoModelForImageTextToText._model_mapping:  # noqa: SLF001 - no public way
        raise ModelUnavailable(f"{name}: {config.model_type} does not write texts about pictures")


def _processor(source: Source) -> Any:
    processor = AutoProcessor.from_pretrained(source.folder, **_LOCALLY)
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ModelUnavailable(f"{source.id}: its processor has no {part.replace('_', ' ')}")
    return processor


def _put_in_place(model: Any, placement: Placement, config: ModelConfig) -> None:
    if config.offload == "model":
        accelerate.cpu_offload_with_hook(model, placement.device)
    elif config.offload == "sequential":
        accelerate.cpu_offload(model, placement.device)
    elif config.quantization == "none":
        model.to(placement.device)  # a quantized one was put there while it was loaded
    if config.compile:
        model.compile(dynamic=True)
