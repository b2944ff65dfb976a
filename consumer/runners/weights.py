"""Seeing that a model's weights all came from its files: the libraries go on without them."""

from collections.abc import Mapping
from typing import Any

import torch

from consumer.ports import ModelUnavailable


def see_that_none_were_invented(info: Mapping[str, Any], name: str) -> None:
    """Refuse a model of transformers that filled gaps with random weights.

    Args:
        info: What `from_pretrained(…, output_loading_info=True)` gave.
        name: What to call the model.

    Raises:
        ModelUnavailable: Tells how many, and one of them.
    """
    invented = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    _refuse(sorted(invented), name)


def see_that_none_are_missing(module: torch.nn.Module, name: str) -> None:
    """Refuse a model of diffusers that left gaps: such weights stay on the meta device.

    Raises:
        ModelUnavailable: Tells how many, and one of them.
    """
    weights = [*module.named_parameters(), *module.named_buffers()]
    _refuse([weight for weight, tensor in weights if tensor.is_meta], name)


def _refuse(missing: list[str], name: str) -> None:
    if missing:
        raise ModelUnavailable(f"{name}: {len(missing)} weights are missing, such as {missing[0]}")
