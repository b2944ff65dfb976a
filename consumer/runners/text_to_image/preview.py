"""Previews: what an image looks like while it is made, small and now and then.

Between two steps of a flow-matching scheduler the latents move along a straight way; where it would
end is the model's present estimate of the image. It is made small before it is decoded, and it is
decoded so rarely that a run takes at most a twentieth longer.
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
PAUSE = 0.5  # seconds between two previews at least
MOST_OF_THE_RUN = 0.05  # of its time
_PACKED = 3  # dimensions: image, patch, channels; as FLUX.1 has them


def allows_previews(pipe: Any) -> bool:
    """Whether the estimate can be read off the latents and decoded by an ordinary autoencoder."""
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
    """Makes previews of the first image of one run.

    Args:
        on_preview: Told each of them, in the inference thread.
        width: Of the image, in pixels.
        height: The same.
    """

    def __init__(self, on_preview: Callable[[bytes], None], width: int, height: int) -> None:
        self._on_preview = on_preview
        self._size = (width, height)
        self._before: torch.Tensor | None = None
        self._next = 0.0

    def step(self, pipe: Any, index: int, latents: torch.Tensor) -> None:
        """Look at the latents after a step, and tell a preview if it is time for one."""
        before, self._before = self._before, latents[:1].clone()
        sigmas = pipe.scheduler.sigmas
        if before is None or index + 1 >= len(sigmas) - 1 or time.monotonic() < self._next:
            return
        # On a GPU this waits for the step, whose time is not the preview's.
        now, earlier = float(sigmas[index + 1]), float(sigmas[index])
        began = time.monotonic()
        estimate = latents[:1] - now * (latents[:1] - before) / (now - earlier)
        self._on_preview(self._jpeg(pipe, estimate))
        cost = time.monotonic() - began
        self._next = began + max(PAUSE, cost / MOST_OF_THE_RUN)

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
