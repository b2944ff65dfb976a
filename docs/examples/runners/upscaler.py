"""A runner that enlarges images: `MODEL_RUNNER=upscaler:Upscaler`. Needs scikit-image."""

import numpy as np
from PIL import Image as PillowImage
from pydantic import Field
from skimage.filters import unsharp_mask
from skimage.transform import rescale

from generation_runner import Context, Image, Output, Parameters, Runner


class UpscalerParameters(Parameters):
    """How an image is enlarged."""

    factor: int = Field(default=2, ge=2, le=4)
    sharpen: bool = False


class Upscaler(Runner[UpscalerParameters]):
    """Bicubic interpolation, and an unsharp mask if the sender wants one."""

    parameters = UpscalerParameters
    min_images = max_images = 1
    name = "upscaler"
    version = "1.0"

    def run(self, parameters: UpscalerParameters, context: Context) -> Output:
        """Enlarge the image, one channel for each step."""
        pixels = np.asarray(context.images[0]) / 255
        channels = []
        for number in range(3):
            channels.append(rescale(pixels[..., number], parameters.factor, order=3))
            context.step(number + 1, 3)
        enlarged = np.stack(channels, axis=-1)
        if parameters.sharpen:
            enlarged = unsharp_mask(enlarged, radius=parameters.factor, channel_axis=-1)
        return Image(PillowImage.fromarray(np.uint8(enlarged.clip(0, 1) * 255 + 0.5)))
