"""The device and dtype of a model, and the release of device memory."""

import gc
from dataclasses import dataclass

import torch

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners.config import ModelConfig

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Placement:
    """A device and the dtype of the weights."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype's name in events, for example `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def place(config: ModelConfig) -> Placement:
    """Choose the device and the dtype.

    The dtype is always a `torch.dtype`: diffusers silently loads float32 for the strings "float16"
    and "auto". `auto` is bfloat16 on cuda, because float16 overflows in FLUX and other models and
    gives black images. Elsewhere it is float32: few CPUs are faster in half precision, and mps
    lacks some operations in it.

    Raises:
        ModelMisconfigured: Offloading is set for a CPU.
        ModelUnavailable: The device is not available; it may have failed.
    """
    device = torch.device(_device(config.device))
    if config.offload != "none" and device.type == "cpu":
        raise ModelMisconfigured(
            "MODEL_OFFLOAD: the device is cpu, there is nothing to offload from"
        )
    if config.dtype == "auto":
        return Placement(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Placement(device, _DTYPES[config.dtype])


def release(device: torch.device) -> None:
    """Collect garbage and free the device memory that torch has cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _device(name: str) -> str:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(each for each, is_available in available.items() if is_available)
    if not available[name]:
        raise ModelUnavailable(f"MODEL_DEVICE: there is no {name} device for this process")
    return name
