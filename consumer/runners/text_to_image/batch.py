"""Several requests in one call of a pipeline: which go together, and what the call is given.

Each image of a batch has a prompt, a negative prompt and a generator of its own. A list of
prompts never goes with `num_images_per_prompt`: HunyuanDiT, HunyuanImage and Qwen-Image then repeat
the masks of the prompts in another order than the prompts themselves (diffusers 0.42), and most of
the images are others.

An image of a batch is the one that its request would get alone, but for rounding: matrices of
another shape are multiplied in another order. How much that is, in values of 0 to 255:

- float32: at most 1, in at most 4 of the 12,288 values of an image of 64x64 (40 images of each
  family, tiny models of random weights; half or more of the images are the same to the byte);
- bfloat16: up to 12, in up to 45% of the values, with the same models; as much as between an image
  of a request for one and the same image of a request for several;
- float64, before decoding: 1e-15 of 4, where a mask in the wrong order makes 1e-2 to 1. HunyuanDiT
  computes a part in float32: 1e-6 of 1. The length of the neighbours' prompts makes no difference.

That was measured for the families of `MEASURED` and for no other. tests/integration/test_batches.py
has bars for float32.
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
_OWN = ("prompt", "negative_prompt")  # what each image of a call has for itself


class BatchKeys:
    """Says which requests can be made in one call of a pipeline.

    Args:
        pipe: The pipeline; not changed.
        parameters: What it takes.
        config: How it was loaded.
    """

    def __init__(self, pipe: Any, parameters: Parameters, config: ModelConfig) -> None:
        self._parameters = parameters
        self._family = type(pipe).__name__
        self._possible = self._family in MEASURED and _rows_are_independent(self._family, config)

    def key(self, request: TextToImageRequest) -> Hashable | None:
        """Equal for requests that go together; None for one that runs alone.

        A preview is made of the first image of a run: it has no place in a batch.
        """
        if not self._possible or request.preview:
            return None
        arguments = self._parameters.arguments(request)
        shared = sorted((name, value) for name, value in arguments.items() if name not in _OWN)
        return (
            tuple(shared),
            tuple(name for name in _OWN if name in arguments),
            self._parameters.scale(request),  # a guider's is no argument
            request.num_images,
            tuple(sorted((name, weight) for name, weight in request.adapters.items() if weight)),
            self._quotes(arguments),
        )

    def _quotes(self, arguments: dict[str, Any]) -> tuple[bool, ...]:
        """Which of the texts have words in quotes, where that makes a difference to others.

        HunyuanImage reads the words in quotes by an encoder of their own, and where one prompt of a
        call has some it guides all of its images by another guider.
        """
        if self._family != "HunyuanImagePipeline":
            return ()
        texts = (arguments.get(name) for name in _OWN)
        return tuple(text is not None and extract_glyph_text(text) is not None for text in texts)


def _rows_are_independent(family: str, config: ModelConfig) -> bool:
    """Whether what the images of a call have in common is the weights only."""
    # The cache looks at the change of all images together, and skips blocks for all or none.
    if config.step_cache:
        return False
    # Columns with a large value in any row are multiplied in 16 bits, for all rows.
    if config.quantization == "bitsandbytes-8bit":
        return False
    # Prompts of different lengths need a mask here, one prompt does not: there are backends of
    # attention that do the one and refuse the other.
    return not (config.attention and family == "QwenImagePipeline")


def arguments_of_a_batch(
    parameters: Parameters, requests: Sequence[TextToImageRequest]
) -> dict[str, Any]:
    """Keywords for one call, but for the generators and the callback.

    Args:
        parameters: Of the pipeline.
        requests: One for each image, all with the same key; one that wants several comes several
            times.
    """
    each = [parameters.arguments(request) for request in requests]
    own = {name: [given[name] for given in each] for name in _OWN if name in each[0]}
    return {**each[0], **own, "num_images_per_prompt": 1}
