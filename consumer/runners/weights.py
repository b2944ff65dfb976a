"""A model's weights: where they are read to, and that all came from its files.

The libraries go on without those that did not.
"""

from collections.abc import Mapping
from typing import Any

import torch

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement

_OWN_MEMORY = {"cuda"}  # devices to which main memory would be a detour; mps has no other


def direct_load_kwargs(placement: Placement, config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`, with which main memory need not hold all of the weights.

    Each goes from its file to the device; not where an option puts them in their places by itself.
    """
    placed = {config.offload, config.device_map, config.quantization}
    straight = placement.device.type in _OWN_MEMORY and placed == {"none"}
    return {"device_map": placement.device.type} if straight else {}


def require_no_new_weights(info: Mapping[str, Any], name: str) -> None:
    """Refuse a model of transformers that filled gaps with random weights.

    Args:
        info: What `from_pretrained(…, output_loading_info=True)` gave.
        name: What to call the model.

    Raises:
        ModelUnavailable: Tells how many, and one of them.
    """
    invented = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    _refuse(sorted(invented), name)


def require_all_weights(module: torch.nn.Module, name: str) -> None:
    """Refuse a model of diffusers that left gaps: such weights stay on the meta device.

    Raises:
        ModelUnavailable: Tells how many, and one of them.
    """
    weights = [*module.named_parameters(), *module.named_buffers()]
    _refuse([weight for weight, tensor in weights if tensor.is_meta], name)


def _refuse(missing: list[str], name: str) -> None:
    if missing:
        raise ModelUnavailable(f"{name}: {len(missing)} weights are missing, such as {missing[0]}")
