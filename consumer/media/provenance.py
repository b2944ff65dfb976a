"""Provenance: the metadata in an image's file about the generation of the image."""

import json
from collections.abc import Mapping

from consumer.media.ai_mark import software
from consumer.ports.model import GeneratedImage
from generation_contracts import ModelInfo, Request
from generation_contracts.events import ParameterValue


def provenance_of(
    made: GeneratedImage,
    *,
    request_id: str,
    request: Request,
    model: ModelInfo,
    parameters: Mapping[str, ParameterValue],
    with_prompt: bool,
) -> dict[str, str]:
    """Return names and values for the file of one image.

    They are equal in all runs of a request and contain no time, worker or attempt. An object's key
    contains the hash of its bytes, so a redelivered request produces the same key with the same
    versions of the software, if its file is not signed.

    Args:
        made: The generated image.
        request_id: The sender's request id, or the derived one.
        request: The request.
        model: The model.
        parameters: The parameters of the run.
        with_prompt: Whether the file contains the prompts, which every recipient can read.
    """
    values = {
        "software": software(),
        "request_id": request_id,
        "seed": str(made.seed),
        "model": model.id,
        "revision": model.revision,
        "libraries": None if model.libraries is None else _compact(model.libraries),
        "parameters": _compact(parameters),
        "flagged": None if made.flagged is None else json.dumps(made.flagged),
    }
    if with_prompt:
        values |= {name: getattr(request, name, None) for name in ("prompt", "negative_prompt")}
    return {name: value for name, value in values.items() if value is not None}


def _compact(values: Mapping[str, object]) -> str:
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"))
