"""A lower bound of the memory for decoding, to detect before a run that it is not available.

Only decoding is estimated. It needs the most memory, because all images of a request are decoded at
once at full size, and a run that fails there has wasted all its steps. The lower bound in bytes:

    images x width x height x 3 x channels x bytes of one value

Stable Diffusion 3, SDXL, FLUX.1, FLUX.2, HunyuanDiT and Z-Image have the same kind of autoencoder.
In its last block, at the full size of the image, three tensors are alive at once. They have as many
channels as the input of that block: 256 in all these models, 1.5 GiB for a megapixel in 16 bits.
A count of the live storages while diffusers 0.42 decodes gives 3.01 tensors; a test repeats it.

Memory of the device's libraries is not included, and nothing was measured on a GPU. If less than
the bound is free, the run would fail. If more is free, the run can still fail; it is then repeated
with the measures that save memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder

FreeBytes = Callable[[torch.device], int | None]

_ALIVE = 3  # tensors: the input of the last block's first layer, normalised, and activated


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is available to a run, in bytes; None where that is unknown."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def min_decode_bytes(pipe: Any, *, images: int, width: int, height: int) -> int | None:
    """Return the bytes that decoding needs at least, with the pipeline's current settings.

    Args:
        pipe: The pipeline.
        images: Number of images of one call.
        width: In pixels.
        height: In pixels.

    Returns:
        None where no estimate is possible: another kind of autoencoder, decoding in tiles, or
        parts that are distributed over several devices.
    """
    vae: Any = getattr(pipe, "vae", None)
    decoder = getattr(vae, "decoder", None)
    if not isinstance(decoder, Decoder) or pipe.hf_device_map is not None:
        return None
    if getattr(vae, "use_tiling", False):
        return None
    at_once = 1 if getattr(vae, "use_slicing", False) else images
    last: Any = decoder.up_blocks[-1]
    channels = int(last.resnets[0].in_channels)
    bytes_of_one = int(vae.dtype.itemsize)
    return at_once * width * height * _ALIVE * channels * bytes_of_one
