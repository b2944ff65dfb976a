"""Files of LoRA adapters: lookup by the setting, and refusal of formats that diffusers misreads.

diffusers skips or misreads some formats without an error. Such a file is refused here, before
anything is loaded.
"""

import re
from collections.abc import Collection
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners.config import ModelConfig
from generation_contracts.fields import AdapterName

SETTING = "MODEL_ADAPTERS"

_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

# The names that trainers give the two matrices of a layer.
_HALVES = (
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)

# Unsupported kinds of adapters, by the beginning of a component of their keys. LoKr is not listed,
# because diffusers loads it for some families and raises for the others.
_NOT_LOADED = {
    "hada_w": "a LoHa adapter, which diffusers does not load",
    "lora_mid": "a LoCon adapter with a third matrix, which diffusers does not load",
    "oft_": "an OFT adapter, which diffusers does not load",
    "ia3_": "an IA3 adapter, which diffusers does not load",
    "on_input": "an IA3 adapter, which diffusers does not load",
    "dora_scale": "a DoRA, which diffusers would apply as a plain LoRA; save it with PEFT",
}


def find_adapters(config: ModelConfig) -> dict[str, Path]:
    """Return the files of the configured adapters by name, without loading them.

    Raises:
        ModelMisconfigured: A file is missing, or adapters cannot be combined with another setting.
    """
    if not config.adapters:
        return {}
    if config.device_map != "none":
        raise ModelMisconfigured(
            f"{SETTING}, MODEL_DEVICE_MAP: the combination is not tested; set one of the two"
        )
    if config.quantization == "torchao-int4":
        raise ModelMisconfigured(f"{SETTING}, MODEL_QUANTIZATION: peft cannot add to torchao-int4")
    return {name: _file(name, path) for name, path in config.adapters.items()}


def keys_of(file: Path) -> list[str]:
    """Return the names of the weights in a file."""
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def require_loadable(keys: Collection[str]) -> None:
    """Refuse a file that diffusers would drop or misread in part.

    Args:
        keys: The names of the file's weights.

    Raises:
        ModelUnavailable: Names the kind of adapter, or a key without its counterpart.
    """
    for sign, kind in _NOT_LOADED.items():
        if any(f".{sign}" in f".{key}" for key in keys):
            raise ModelUnavailable(f"it is {kind}")
    present = frozenset(keys)
    for one, other in _HALVES:
        for half, missing in ((one, other), (other, one)):
            # With or without `.weight`, which can follow the name of an adapter.
            matrix = re.compile(rf"{re.escape(half)}((\.[^.]+)?\.weight)?$")
            for key in present:
                if matrix.search(key) and key.replace(half, missing) not in present:
                    raise ModelUnavailable(
                        f"it has matrices without their other half, such as {key}"
                    )


def _file(name: str, path: str) -> Path:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ModelMisconfigured(
            f"{SETTING}: {name!r} is no name: up to 64 letters, digits, - and _"
        ) from None
    # Not resolved: in the hub's cache the file is a link to a file without a suffix.
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelMisconfigured(
                f"{SETTING}: {name}: its folder has {len(files)} .safetensors files instead of "
                f"one: {file}"
            )
        return files[0]
    if file.is_file() and file.suffix in _PICKLES:
        raise ModelMisconfigured(
            f"{SETTING}: {name}: {file.suffix} files hold code and are not read: convert it to "
            f".safetensors: {file}"
        )
    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelMisconfigured(
            f"{SETTING}: {name}: there is no such folder or .safetensors file: {file}"
        )
    return file
