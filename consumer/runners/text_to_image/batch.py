"""Batches: which requests share one call of a pipeline, and the arguments of that call.

Each image of a batch has its prompt, negative prompt and generator. A list of prompts is never
combined with `num_images_per_prompt`: HunyuanDiT, HunyuanImage and Qwen-Image then repeat the masks
in another order than the prompts (diffusers 0.42), and most of the images are wrong.

An image of a batch differs from the image of a single run by rounding only: matrices of another
shape are multiplied in another order. Measured differences, in pixel values of 0 to 255:

- float32: at most 1, in at most 4 of the 12,288 values of a 64x64 image. 40 images of each family
  with tiny models of random weights; at least half of the images are identical.
- bfloat16: up to 12, in up to 45 % of the values, with the same models. The difference between an
  image of a request for one and of a request for several is as large.
- float64, before decoding: 1e-15 of 4. A mask in the wrong order gives 1e-2 to 1. HunyuanDiT
  computes a part in float32: 1e-6 of 1. The lengths of the other prompts have no influence.

Only the families in `MEASURED` were measured. tests/integration/test_batches.py has limits for
float32.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

from consumer.runners.config import ModelConfig
from consumer.runners.text_to_image.parameters import Parameters
from generation_contracts import TextToImageRequest

MEASURED = frozenset(
    {
        "Flux2KleinPipeline",
        "Flux2Pipeline",
        "FluxPipeline",
        "HunyuanDiTPipeline",
        "HunyuanImagePipeline",
        "PixArtSigmaPipeline",
        "QwenImagePipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionXLPipeline",
        "ZImagePipeline",
    }
)
_PER_IMAGE = ("prompt", "negative_prompt")  # arguments that differ between the images of a call


class BatchKeys:
    """Computes which requests can share one call of a pipeline.

    Args:
        pipe: The pipeline; not changed.
        parameters: The parameters of the pipeline.
        config: The configuration that the pipeline was loaded with.
    """

    def __init__(self, pipe: Any, parameters: Parameters, config: ModelConfig) -> None:
        self._parameters = parameters
        self._family = type(pipe).__name__
        self._possible = self._family in MEASURED and _rows_are_independent(self._family, config)

    def key(self, request: TextToImageRequest) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: the request runs alone.

        A request with previews runs alone, because previews show only the first image of a run.
        """
        if not self._possible or request.preview:
            return None
        arguments = self._parameters.arguments(request)
        shared = [(name, value) for name, value in arguments.items() if name not in _PER_IMAGE]
        return (
            tuple(sorted(shared)),
            tuple(name for name in _PER_IMAGE if name in arguments),
            self._parameters.scale(request),  # a guider's scale is not among the arguments
            request.num_images,
            tuple(sorted((name, weight) for name, weight in request.adapters.items() if weight)),
            self._have_quotes(arguments),
        )

    def _have_quotes(self, arguments: dict[str, Any]) -> tuple[bool, ...]:
        """Return which texts have words in quotes, for families where that affects other images.

        HunyuanImage encodes words in quotes separately. If one prompt of a call has such words,
        another guider is used for all images of the call.
        """
        if self._family != "HunyuanImagePipeline":
            return ()
        texts = (arguments.get(name) for name in _PER_IMAGE)
        return tuple(text is not None and extract_glyph_text(text) is not None for text in texts)


def _rows_are_independent(family: str, config: ModelConfig) -> bool:
    """Return whether the images of a call share nothing but the weights."""
    # The step cache compares the change of all images together and skips blocks for all or none.
    if config.step_cache:
        return False
    # A column with a large value in any row is multiplied in 16 bits for all rows.
    if config.quantization == "bitsandbytes-8bit":
        return False
    # Prompts of different lengths need an attention mask, a single prompt does not. Some attention
    # backends do not support masks.
    return not (config.attention and family == "QwenImagePipeline")


def batch_arguments(
    parameters: Parameters, requests: Sequence[TextToImageRequest]
) -> dict[str, Any]:
    """Return keyword arguments for one call, without the generators and the callback.

    Args:
        parameters: The parameters of the pipeline.
        requests: One entry for each image, all with the same key; a request for several images is
            repeated.
    """
    each = [parameters.arguments(request) for request in requests]
    texts = {name: [given[name] for given in each] for name in _PER_IMAGE if name in each[0]}
    return {**each[0], **texts, "num_images_per_prompt": 1}
