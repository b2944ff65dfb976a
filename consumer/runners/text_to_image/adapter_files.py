"""Files of LoRA adapters: which file a setting names, and whether diffusers reads all of it.

diffusers skips or misreads some formats without an error. A file of such a format is refused here,
before anything is loaded.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from consumer.ports import ModelUnavailable
from consumer.runners.config import ModelConfig
from generation_contracts.requests import AdapterName

SETTING = "MODEL_ADAPTERS"

_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

# What the trainers call the two matrices of a layer.
_HALVES = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)
_NAMED = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")  # a state dict that was saved as it was
_PEFT_PREFIX = "base_model.model."
_PEFT_CONFIG = "adapter_config.json"

# Kinds of adapters by what their keys contain. LoKr is not listed: diffusers loads it for some
# families, and raises for the others.
_NOT_LOADED = {
    "hada_w": "a LoHa adapter, which diffusers does not load",
    "lora_mid": "a LoCon adapter with a third matrix, which diffusers does not load",
    "oft_": "an OFT adapter, which diffusers does not load",
    "ia3_": "an IA3 adapter, which diffusers does not load",
    ".on_input": "an IA3 adapter, which diffusers does not load",
    "dora_scale": "a DoRA, which diffusers would apply as a plain LoRA; save it with PEFT",
}

# Ways of PEFT to start a training that subtract the adapter's first state from the model's weights.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def find_adapters(config: ModelConfig) -> dict[str, Path]:
    """The files of the configured adapters, by name; nothing is loaded yet.

    Raises:
        ModelUnavailable: A file is not there, or adapters do not go with another setting.
    """
    if not config.adapters:
        return {}
    if config.device_map != "none":
        raise ModelUnavailable(
            f"{SETTING}, MODEL_DEVICE_MAP: not tried together; set one of the two"
        )
    if config.quantization == "torchao-int4":
        raise ModelUnavailable(f"{SETTING}, MODEL_QUANTIZATION: peft cannot add to torchao-int4")
    return {name: _file(name, place) for name, place in config.adapters.items()}


def keys_of(file: Path) -> list[str]:
    """The names of the weights in a file."""
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def require_loadable(keys: Collection[str]) -> None:
    """Refuse a file of which diffusers would drop or misread a part.

    Args:
        keys: The names of its weights.

    Raises:
        ModelUnavailable: Says which kind of adapter it is, or what is wrong with its keys.
    """
    for sign, kind in _NOT_LOADED.items():
        if any(sign in key for key in keys):
            raise ModelUnavailable(f"it is {kind}")
    if named := next(filter(_NAMED.search, keys), None):
        raise ModelUnavailable(
            f"its keys have the name of an adapter in them, such as {named}: save it with "
            "save_lora_weights of diffusers or save_pretrained of PEFT"
        )
    present = frozenset(keys)
    for one, other in _HALVES:
        for half, missing in ((one, other), (other, one)):
            for key in present:
                if f"{half}.weight" in key and key.replace(half, missing) not in present:
                    raise ModelUnavailable(
                        f"it has matrices without their other half, such as {key}"
                    )


def is_of_peft(keys: Collection[str]) -> bool:
    """Whether `PeftModel.save_pretrained` wrote the file: diffusers does not read its keys."""
    return any(key.startswith(_PEFT_PREFIX) for key in keys)


def weights_from_peft(file: Path, part: str) -> dict[str, torch.Tensor]:
    """Read an adapter that PEFT saved, as diffusers takes it.

    Each matrix `lora_B` is multiplied by the scale of its layer, `lora_alpha / r` or, with
    `use_rslora`, `lora_alpha / sqrt(r)`: diffusers applies weights that come without a
    configuration with scale 1.

    Args:
        file: The weights; `adapter_config.json` is in the same folder.
        part: The name of the pipeline's part that is adapted.

    Raises:
        ModelUnavailable: The configuration is missing, or it is not of a LoRA for the model's own
            weights.
    """
    config = _peft_config(file.with_name(_PEFT_CONFIG))
    weights = {}
    for key, weight in load_file(file).items():
        module = key.removeprefix(_PEFT_PREFIX)
        if ".lora_B." in module:
            weight = weight.float() * _scale(config, module, rank=weight.shape[1])  # noqa: PLW2901
        weights[f"{part}.{module}"] = weight
    return weights


def _peft_config(file: Path) -> Any:
    if not file.is_file():
        raise ModelUnavailable(
            f"it was saved by PEFT and its {_PEFT_CONFIG} is missing, which has its scale"
        )
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


def _file(name: str, place: str) -> Path:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ModelUnavailable(
            f"{SETTING}: {name!r} is no name: up to 64 letters, digits, - and _"
        ) from None
    # Not resolved: in the hub's cache the file is a link to one whose name does not tell its kind.
    file = Path(place).expanduser().absolute()
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelUnavailable(
                f"{SETTING}: {name}: its folder has {len(files)} .safetensors files instead of one"
            )
        return files[0]
    if file.is_file() and file.suffix in _PICKLES:
        raise ModelUnavailable(
            f"{SETTING}: {name}: {file.suffix} files hold code and are not read: convert it to "
            ".safetensors"
        )
    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelUnavailable(f"{SETTING}: {name}: there is no such folder or .safetensors file")
    return file
