"""Where a model computes and in which type, and giving the device's memory back."""

import gc
from dataclasses import dataclass

import torch

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Placement:
    """A device and the type of the weights, for torch."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The type as events tell it, for example `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def place(config: ModelConfig) -> Placement:
    """Choose the device and the type.

    The type is always a real `torch.dtype`: diffusers takes the strings "float16" and "auto"
    without a word and loads float32. `auto` is bfloat16 on cuda, because float16 overflows in FLUX
    and others and gives black images, and float32 elsewhere, because few CPUs compute in half
    precision faster than in float32, and on mps not every operation exists in it.

    Raises:
        ModelUnavailable: The device is not there, or offloading has nothing to do.
    """
    device = torch.device(_device(config.device))
    if config.offload != "none" and device.type == "cpu":
        raise ModelUnavailable("MODEL_OFFLOAD: the device is cpu, there is nothing to offload from")
    if config.dtype == "auto":
        return Placement(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Placement(device, _DTYPES[config.dtype])


def release(device: torch.device) -> None:
    """Collect garbage and give the memory that torch has kept back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _device(wanted: str) -> str:
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise ModelUnavailable(f"MODEL_DEVICE: there is no {wanted} device for this process")
    return wanted
