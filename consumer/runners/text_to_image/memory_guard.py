"""Seeing before a run that its images cannot be decoded in the memory that is free.

Only decoding is judged: there the images are largest, all of a request at once, and a run that
fails there has made all its steps for nothing. The least that it needs, in bytes:

    images x width x height x 3 x channels x bytes of one value

The autoencoders of Stable Diffusion 3, SDXL, FLUX.1 and .2, HunyuanDiT and Z-Image are of one kind:
in their last block, at the full size of the image, three tensors are alive at once with as many
channels as come into that block (256 in all of them: 1.5 GiB for a megapixel in 16 bits). A count
of the storages that are alive while diffusers 0.42 decodes gives 3.01 for it; a test counts again.
What the device's libraries need besides is not in it, and none of it was measured on a GPU: so the
estimate is a lower bound. Where not even that is free the run could only fail; where it is, the run
may still, and is then made again with what saves memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder

FreeBytes = Callable[[torch.device], int | None]

_ALIVE = 3  # tensors: the input of the last block's first layer, it normalised, and it activated


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that a run can have; None where that cannot be told."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


def least_to_decode(pipe: Any, *, images: int, width: int, height: int) -> int | None:
    """The bytes that decoding needs at least, as the pipeline is set now.

    Args:
        pipe: The pipeline.
        images: Of one batch.
        width: In pixels.
        height: In pixels.

    Returns:
        None where no estimate is possible: another kind of autoencoder, one that decodes in tiles,
        or parts that are shared out over several devices.
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
