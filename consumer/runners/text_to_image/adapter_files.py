"""Files of LoRA adapters: which file a setting names, and whether diffusers reads all of it.

diffusers skips or misreads some formats without an error. A file of such a format is refused here,
before anything is loaded.
"""

import re
from collections.abc import Collection
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from generation_contracts.requests import AdapterName

SETTING = "MODEL_ADAPTERS"

_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

# What the trainers call the two matrices of a layer.
_HALVES = (
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)

# Kinds of adapters by how a name between the dots of their keys begins. LoKr is not listed:
# diffusers loads it for some families, and raises for the others.
_NOT_LOADED = {
    "hada_w": "a LoHa adapter, which diffusers does not load",
    "lora_mid": "a LoCon adapter with a third matrix, which diffusers does not load",
    "oft_": "an OFT adapter, which diffusers does not load",
    "ia3_": "an IA3 adapter, which diffusers does not load",
    "on_input": "an IA3 adapter, which diffusers does not load",
    "dora_scale": "a DoRA, which diffusers would apply as a plain LoRA; save it with PEFT",
}


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
        if any(f".{sign}" in f".{key}" for key in keys):
            raise ModelUnavailable(f"it is {kind}")
    present = frozenset(keys)
    for one, other in _HALVES:
        for half, missing in ((one, other), (other, one)):
            # With or without `.weight`, and with the name of an adapter in front of it.
            matrix = re.compile(rf"{re.escape(half)}((\.[^.]+)?\.weight)?$")
            for key in present:
                if matrix.search(key) and key.replace(half, missing) not in present:
                    raise ModelUnavailable(
                        f"it has matrices without their other half, such as {key}"
                    )


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
