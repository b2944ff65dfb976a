"""Conversion of the keys of LoRA files to the keys of diffusers.

`lora_state_dict` of each family converts the keys that the family's trainers write. For keys of
some other programs it raises or leaves them unchanged; these keys are converted here.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from consumer.ports.model import ModelUnavailable
from consumer.runners.text_to_image.adapter_files import keys_of

log = structlog.get_logger()

# The suffix of an adapter's key, after the name of the layer.
_AFTER_A_LAYER = re.compile(r"([._](lora_|lora\.|lora_linear_layer\.)|\.lokr_).*")

# The name of an adapter in a key of an unconverted state dict, as in `lora_A.default.weight`.
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.(weight|bias)$)")

_PEFT_PREFIX = "base_model.model."
_PEFT_CONFIG = "adapter_config.json"

# Initialisations of PEFT that subtract the adapter's initial state from the model's weights.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def counted_conversion(pipe: Any, file: Path) -> Iterator[Collection[str]]:
    """Make `load_lora_weights` convert all keys of one file, and count the file's layers.

    The context replaces the pipeline's `lora_state_dict`. Passing a converted dict to
    `load_lora_weights` instead would lose the scales in the file's metadata.

    Args:
        pipe: The pipeline of the adapter.
        file: The adapter.

    Yields:
        The names of the file's layers in diffusers' form; filled by `load_lora_weights`.
    """
    convert = pipe.lora_state_dict
    part = "unet" if hasattr(pipe, "unet") else pipe.transformer_name
    layers: set[str] = set()

    def lora_state_dict(source: str, **options: Any) -> Any:
        found = _converted(convert, source, options, file, part)
        layers.update(
            _AFTER_A_LAYER.sub("", key) for key in _weights(found) if _AFTER_A_LAYER.search(key)
        )
        return found

    pipe.lora_state_dict = lora_state_dict
    try:
        yield layers
    finally:
        del pipe.lora_state_dict


def _converted(convert: Any, source: str, options: Mapping[str, Any], file: Path, part: str) -> Any:
    """Return what `lora_state_dict` returns for the first form of the keys that it converts."""
    if not _foreign(keys_of(file)):
        return convert(source, **options)
    metadata: tuple[Any, ...] = ()
    for form in _forms(source, file, part):
        try:
            found = convert(form, **options)
        except Exception as error:  # noqa: BLE001 - unknown keys raise many kinds
            log.info("adapter_keys_not_converted", error=type(error).__name__)
            continue
        # diffusers returns the file's metadata last, and None for a dict.
        metadata = metadata or found[-1:]
        found = (*found[:-1], *metadata)
        if not _foreign(_weights(found)):
            return found
    raise ModelUnavailable("its keys are not those of an adapter for this model")


def _forms(source: str, file: Path, part: str) -> Iterator[Any]:
    """Yield the file, and then its weights under keys that more families know."""
    weights = load_file(file)
    config = file.with_name(_PEFT_CONFIG)
    of_peft = any(key.startswith(_PEFT_PREFIX) for key in weights)
    if of_peft and config.is_file():
        weights = _scaled(weights, _peft_config(config))
        yield dict(weights)
    else:
        yield source
    weights = {_ADAPTER_NAME.sub("", key): weight for key, weight in weights.items()}
    yield dict(weights)
    if not of_peft:
        return
    if not config.is_file():
        raise ModelUnavailable(
            f"it was saved by PEFT and its {_PEFT_CONFIG} is missing, which has its scale"
        )
    yield {f"{part}.{key.removeprefix(_PEFT_PREFIX)}": weight for key, weight in weights.items()}


def _foreign(keys: Collection[str]) -> bool:
    return any(key.startswith(_PEFT_PREFIX) or _ADAPTER_NAME.search(key) for key in keys)


def _weights(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def _scaled(weights: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Multiply `lora_B` by the scale of its layer, its matrix and its bias.

    The scale is `lora_alpha / r` or, with `use_rslora`, `lora_alpha / sqrt(r)`: diffusers applies
    weights that come without a configuration with scale 1.
    """
    scaled = dict(weights)
    for key, weight in weights.items():
        if ".lora_B." not in key:
            continue
        matrix = weights.get(key.removesuffix("bias") + "weight" if key.endswith(".bias") else key)
        if matrix is None:
            raise ModelUnavailable(f"it has a bias without its matrix, such as {key}")
        module = key.removeprefix(_PEFT_PREFIX)
        scaled[key] = weight.float() * _scale(config, module, rank=matrix.shape[1])
    return scaled


def _peft_config(file: Path) -> Any:
    try:
        kind = json.loads(file.read_text())["peft_type"]
        config = PeftConfig.from_pretrained(str(file.parent))
    except (OSError, ValueError, TypeError, KeyError):
        raise ModelUnavailable(f"its {_PEFT_CONFIG} cannot be read") from None
    if kind != "LORA":
        raise ModelUnavailable(f"it is a {kind} adapter of PEFT; only LORA loads")
    start = str(getattr(config, "init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_THE_MODEL):
        raise ModelUnavailable(
            f"it was made with init_lora_weights={start}, which changes the model's own weights: "
            "convert it to a plain LoRA with PEFT"
        )
    return config


def _scale(config: Any, module: str, *, rank: int) -> float:
    pattern = get_pattern_key(config.alpha_pattern.keys(), module.partition(".lora_")[0])
    alpha = float(config.alpha_pattern.get(pattern, config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)
