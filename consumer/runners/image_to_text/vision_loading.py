"""Loading of a vision-language model of transformers and its processor."""

# mypy: allow-untyped-calls

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from consumer.ports.model import ModelUnavailable
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.faults import load_failure
from consumer.runners.image_to_text import generation_settings
from consumer.runners.source import Source
from consumer.runners.vocabulary import require_vocabulary
from consumer.runners.weights import direct_load_kwargs, require_no_new_weights

# Nothing is read from outside the folder, and no code in the folder is run.
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}

# Attention implementations that need at most one package, and the model attribute for support.
ATTENTION = {
    "eager": None,
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
}

# The top-level keys of a config.json that name one; transformers ignores them elsewhere.
_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation")

# The files that transformers reads.
_READ = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")

# The beginning of a file whose content Git LFS has not downloaded.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

_NUMBER = re.compile(r"\.\d+\.")


def download(model_id: str, revision: str | None, *, cached_only: bool) -> str:
    """Download the files of a model that transformers reads, and return its folder."""
    return huggingface_hub.snapshot_download(
        model_id,
        revision=revision,
        local_files_only=cached_only,
        allow_patterns=[*_READ],
        ignore_patterns=["*/*"],
    )


def load_vision_language(
    source: Source, placement: Placement, config: ModelConfig
) -> tuple[Any, Any]:
    """Load a model that generates text from images and text, and its processor.

    Raises:
        ModelUnavailable: The model or an option cannot be used; the message is one line.
    """
    if not (source.folder / "config.json").is_file():
        raise ModelUnavailable(f"{source.id}: there is no config.json in it")
    try:
        _require_fetched(source)
        model_class = _model_class(source)
        _require_files(source)
        settings = generation_settings.load_settings(source.folder, source.id)
        _require_attention(config, model_class, source)
        processor = _processor(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            dtype=placement.dtype,
            use_safetensors=True,
            output_loading_info=True,
            generation_config=generation_settings.prepared(settings, processor, source.id),
            **({"attn_implementation": config.attention} if config.attention else {}),
            **({"device_map": config.device_map} if config.device_map != "none" else {}),
            **direct_load_kwargs(placement, config),
            **quantization.for_transformers(config, placement, source.folder, min_bytes=0),
            **_LOCALLY,
        )
        model, info = loaded
        require_no_new_weights(info, source.id)
        _require_every_layer(info["unexpected_keys"], model, source.id)
        _require_known_quantization(model, source.id)
        _require_embeddings(model, processor, source.id)
        _require_all_on_gpus(model, config)
        model.eval()
        _move_to_device(model, placement, config)
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises dozens of kinds
        failure = _failure(error, source)
    else:
        return model, processor
    raise failure


def _require_fetched(source: Source) -> None:
    """Refuse a folder with a Git LFS pointer instead of a file that transformers reads."""
    for pattern in _READ:
        for file in sorted(source.folder.glob(pattern)):
            if file.is_file() and _is_lfs_pointer(file):
                raise ModelUnavailable(
                    f"{source.id}: {file.name} is a Git LFS pointer: run git lfs pull"
                )


def _require_files(source: Source) -> None:
    """Refuse a folder without the processor configuration or without weights.

    The messages of transformers for these missing files are misleading.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((source.folder / name).is_file() for name in names):
        raise ModelUnavailable(f"{source.id}: there is no {names[0]} in it")
    if not any(source.folder.glob("*.safetensors")):
        raise ModelUnavailable(f"{source.id}: there are no weights in safetensors files in it")


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_LFS_POINTER)) == _LFS_POINTER


def _failure(error: Exception, source: Source) -> ModelUnavailable:
    if "trust_remote_code" in str(error):
        return ModelUnavailable(
            f"{source.id}: cannot be loaded: it needs code from its own folder; only architectures"
            " of transformers are loaded, and code that comes with a model is never run"
        )
    return load_failure(error, name=source.id, folder=source.folder)


def _require_every_layer(unused: Iterable[str], model: Any, name: str) -> None:
    """Refuse files with more layers than config.json, because the model would skip the last ones.

    Other unused weights belong to parts that transformers does not implement.
    """
    shapes = {_NUMBER.sub(".N.", key) for key in model.state_dict()}
    layers = sorted(key for key in unused if _NUMBER.sub(".N.", key) in shapes)
    if layers:
        raise ModelUnavailable(
            f"{name}: config.json has no place for {len(layers)} weights, such as {layers[0]}"
        )


def _require_known_quantization(model: Any, name: str) -> None:
    """Refuse quantized weights that transformers would load as plain numbers."""
    how = getattr(model.config, "quantization_config", None)
    if how is not None and getattr(model, "hf_quantizer", None) is None:
        method = how.get("quant_method") if isinstance(how, dict) else type(how).__name__
        raise ModelUnavailable(f"{name}: its quantization {method} is not one of transformers")


def _require_embeddings(model: Any, processor: Any, name: str) -> None:
    """Refuse a tokenizer with tokens for which the model has no embeddings.

    On cuda, such a token makes the device unusable for the process. Image tokens are allowed,
    because they are replaced before the lookup.
    """
    image_tokens = {
        getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")
    }
    highest = max(set(processor.tokenizer.get_vocab().values()) - image_tokens)
    embeddings = model.get_input_embeddings()
    # Some families store the embeddings of added tokens in a second tensor.
    rows = embeddings.num_embeddings + getattr(embeddings, "num_additional_embeddings", 0)
    if highest >= rows:
        raise ModelUnavailable(
            f"{name}: its tokenizer has tokens up to number {highest},"
            f" its embeddings end at {rows - 1}"
        )


def _model_class(source: Source) -> type[Any]:
    config = AutoConfig.from_pretrained(source.folder, **_LOCALLY)
    classes: Any = AutoModelForImageTextToText._model_mapping  # noqa: SLF001 - no public way
    if type(config) not in classes:
        raise ModelUnavailable(
            f"{source.id}: {config.model_type} does not generate text from images"
        )
    found: type[Any] = classes[type(config)]
    return found


def _processor(source: Source) -> Any:
    processor = AutoProcessor.from_pretrained(source.folder, **_LOCALLY)
    if getattr(processor, "chat_template", None) is None:
        # Fine-tuning of the text part alone saves the template with the tokenizer.
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ModelUnavailable(f"{source.id}: its processor has no {part.replace('_', ' ')}")
    require_vocabulary(processor.tokenizer, source.id)
    return processor


def _require_attention(config: ModelConfig, model_class: type[Any], source: Source) -> None:
    if config.attention:
        _require_one_attention("MODEL_ATTENTION", config.attention, model_class)
        return
    named = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    for key in _ATTENTION_KEYS:
        value = named.get(key)  # one name, or one for each part
        for name in value.values() if isinstance(value, dict) else (value,):
            if isinstance(name, str):
                _require_one_attention(f"{source.id}: config.json: {key}", name, model_class)


def _require_one_attention(setting: str, name: str, model_class: type[Any]) -> None:
    # transformers would download any other name from the hub and run it.
    if name not in ATTENTION:
        raise ModelUnavailable(f"{setting}: must be one of {', '.join(ATTENTION)}")
    if (flag := ATTENTION[name]) and not getattr(model_class, flag):
        raise ModelUnavailable(f"{setting}: {model_class.__name__} has no {name}")
    # Without its package, but with `kernels`, transformers would download it from the hub too.
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelUnavailable(f"{setting}: the package flash-attn is not installed")


def _require_all_on_gpus(model: Any, config: ModelConfig) -> None:
    if config.device_map != "none" and {"cpu", "disk"} & set(model.hf_device_map.values()):
        raise ModelUnavailable("MODEL_DEVICE_MAP: the model does not fit on the GPUs")


def _move_to_device(model: Any, placement: Placement, config: ModelConfig) -> None:
    if config.offload == "model":
        accelerate.cpu_offload_with_hook(model, placement.device)
    elif config.offload == "sequential":
        accelerate.cpu_offload(model, placement.device)
    elif config.quantization == "none" and config.device_map == "none":
        model.to(placement.device)  # a quantized model was loaded to the device
    if config.compile:
        _compile_layers(model)


def _compile_layers(model: Any) -> None:
    # The modules that must not be split over devices are the repeated layers. Their input length
    # changes with every request; without `dynamic`, each length would be compiled separately.
    layers = set(model._no_split_modules or ())  # noqa: SLF001 - no public way
    repeated = [module for module in model.modules() if type(module).__name__ in layers]
    for module in repeated or [model]:
        module.compile(dynamic=True)
