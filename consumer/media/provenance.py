"""Provenance: what the file of an image says of how it was made."""

import functools
import json
from collections.abc import Mapping
from importlib.metadata import version

from consumer.ports.model import GeneratedImage
from generation_contracts import ModelInfo, TextToImageRequest
from generation_contracts.events import ParameterValue

SOFTWARE = "generation-consumer"  # the distribution


def provenance_of(
    made: GeneratedImage,
    *,
    request_id: str,
    request: TextToImageRequest,
    model: ModelInfo,
    parameters: Mapping[str, ParameterValue],
    with_prompt: bool,
) -> dict[str, str]:
    """Names and values for the file of one image.

    Nothing in them differs between two runs of the same request: an object's key contains the hash
    of its bytes, and a redelivery is to find its object. So there is no time, worker or attempt.

    Args:
        made: The image.
        request_id: The sender's, or the derived one.
        request: What was asked for.
        model: What made it.
        parameters: What it was made with.
        with_prompt: Whether the prompts may be in the file, for whoever gets the image.
    """
    said = {
        "software": _software(),
        "request_id": request_id,
        "seed": str(made.seed),
        "model": model.id,
        "revision": model.revision,
        "parameters": json.dumps(dict(parameters), sort_keys=True, separators=(",", ":")),
        "flagged": None if made.flagged is None else json.dumps(made.flagged),
    }
    if with_prompt:
        said |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return {name: value for name, value in said.items() if value is not None}


@functools.cache  # it reads the distribution's files
def _software() -> str:
    return f"{SOFTWARE} {version(SOFTWARE)}"
