"""A model's weights: direct loading to the device, and checks that no weight is missing.

The libraries do not raise if weights are missing from a model's files.
"""

from collections.abc import Mapping
from typing import Any

import torch

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement

_OWN_MEMORY = {"cuda"}  # devices with separate memory; mps shares the main memory


def direct_load_kwargs(placement: Placement, config: ModelConfig) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that load weights directly to the device.

    Main memory then never has all of the weights. Empty where an option places the weights.
    """
    placed = {config.offload, config.device_map, config.quantization}
    direct = placement.device.type in _OWN_MEMORY and placed == {"none"}
    return {"device_map": placement.device.type} if direct else {}


def require_no_new_weights(info: Mapping[str, Any], name: str) -> None:
    """Refuse a model of transformers whose missing weights were filled with random values.

    Args:
        info: The loading info of `from_pretrained(…, output_loading_info=True)`.
        name: The model's name in messages.

    Raises:
        ModelUnavailable: Says how many weights are missing, and names one.
    """
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    _refuse(sorted(missing), name)


def require_all_weights(module: torch.nn.Module, name: str) -> None:
    """Refuse a model of diffusers with missing weights, which stay on the meta device.

    Raises:
        ModelUnavailable: Says how many weights are missing, and names one.
    """
    weights = [*module.named_parameters(), *module.named_buffers()]
    _refuse([weight for weight, tensor in weights if tensor.is_meta], name)


def _refuse(missing: list[str], name: str) -> None:
    if missing:
        raise ModelUnavailable(f"{name}: {len(missing)} weights are missing, such as {missing[0]}")
