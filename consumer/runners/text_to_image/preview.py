"""Previews of an image during its run: small JPEG files at intervals.

Between two steps of a flow-matching scheduler the latents move along a straight line. Its end point
is the model's current estimate of the image. The estimate is scaled down before it is decoded, and
decoded so rarely that a run takes at most 5 % longer.
"""

import io
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

SIDE = 256  # pixels, of the longer side
QUALITY = 75  # of the JPEG
MIN_INTERVAL = 0.5  # seconds between two previews
MAX_SHARE = 0.05  # of the run's time
_PACKED = 3  # dimensions of FLUX.1's latents: image, patch, channels


def allows_previews(pipe: Any) -> bool:
    """Return whether latents give the estimate and an `AutoencoderKL` decodes it."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    vae: Any = getattr(pipe, "vae", None)
    ordinary = (type(scheduler), type(vae)) == (FlowMatchEulerDiscreteScheduler, AutoencoderKL)
    return (
        ordinary
        and not scheduler.config.get("stochastic_sampling")
        and vae.config.get("shift_factor") is not None
        and getattr(pipe, "_offload_device", None) is None
    )


class Preview:
    """Generates previews of the first image of one run.

    Args:
        on_preview: Called in the inference thread with each preview, a JPEG file.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
    """

    def __init__(self, on_preview: Callable[[bytes], None], width: int, height: int) -> None:
        self._on_preview = on_preview
        self._size = (width, height)
        self._before: torch.Tensor | None = None
        self._next = 0.0

    def step(self, pipe: Any, index: int, latents: torch.Tensor) -> None:
        """Take the latents after a step, and report a preview if the interval has passed.

        Args:
            pipe: The pipeline of the run.
            index: Index of the step, from 0.
            latents: Shape (images, channels, height, width), or packed (images, patches, channels).
        """
        before, self._before = self._before, latents[:1].clone()
        sigmas = pipe.scheduler.sigmas
        if before is None or index + 1 >= len(sigmas) - 1 or time.monotonic() < self._next:
            return
        # On a GPU this waits for the end of the step, so that its time is not counted below.
        now, earlier = float(sigmas[index + 1]), float(sigmas[index])
        began = time.monotonic()
        estimate = latents[:1] - now * (latents[:1] - before) / (now - earlier)
        self._on_preview(self._jpeg(pipe, estimate))
        cost = time.monotonic() - began
        self._next = began + max(MIN_INTERVAL, cost / MAX_SHARE)

    def _jpeg(self, pipe: Any, latents: torch.Tensor) -> bytes:
        vae = pipe.vae
        if latents.ndim == _PACKED:
            width, height = self._size
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)  # noqa: SLF001
        longest = SIDE // (2 ** (len(vae.config.block_out_channels) - 1))
        shrink = longest / max(latents.shape[-2:])
        if shrink < 1:
            latents = torch.nn.functional.interpolate(latents, scale_factor=shrink, mode="area")
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents, return_dict=False)[0][0].float()
        array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=QUALITY)
        return file.getvalue()
