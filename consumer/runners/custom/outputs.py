"""Checks what a custom runner returns, and converts it to the outputs of the port."""

import json
import re
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image as PillowImage
from pydantic import JsonValue

from consumer.ports.model import (
    GeneratedFile,
    GeneratedImage,
    GeneratedJson,
    GeneratedOutput,
    GeneratedText,
    RunnerOutput,
)
from consumer.runners.custom.run_context import RunContext
from consumer.runners.faults import BadOutput
from generation_runner import File, Image, Json, Output, Text

_MEDIA_TYPE = re.compile(r"[a-z]+/[a-z0-9][a-z0-9.+-]*")
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")
_FORMATS = ("png", "webp", "jpeg")


def generated(made: Output | Sequence[Output], context: RunContext) -> RunnerOutput:
    """Return the outputs of a run.

    Raises:
        BadOutput: The runner returned something else than outputs, or none.
    """
    several: Sequence[Any] = made if isinstance(made, list | tuple) else [made]
    if not several:
        raise BadOutput("the runner returned no output")
    return RunnerOutput(
        outputs=tuple(_output(each, context.seed) for each in several),
        warnings=tuple(context.warnings),
        parameters={"seed": context.seed},
    )


def _output(made: Any, seed: int) -> GeneratedOutput:
    match made:
        case Image(PillowImage() as image, output_format) if output_format in _FORMATS:
            return GeneratedImage(image, seed, output_format=output_format)
        case File(data, media_type, extension):
            return _file(data, media_type, extension)
        case Json(value):
            return GeneratedJson(_json(value))
        case Text(str() as text):
            return GeneratedText(text, "stop", prompt_tokens=0, completion_tokens=0)
    # The type only: the value may quote the request.
    raise BadOutput(f"the runner returned {type(made).__name__}, which is no output")


def _file(data: bytes, media_type: str, extension: str) -> GeneratedFile:
    if not isinstance(data, bytes) or not data:
        raise BadOutput("the runner returned a file without bytes")
    if not _MEDIA_TYPE.fullmatch(str(media_type)) or not _EXTENSION.fullmatch(str(extension)):
        raise BadOutput("the runner returned a file with an unusable media type or extension")
    return GeneratedFile(data, media_type, extension)


def _json(value: Any) -> JsonValue:
    try:
        # NaN is no JSON, and a copy cannot be changed by the runner while it is published.
        copied: JsonValue = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise BadOutput("the runner returned a value that is no JSON") from None
    return copied
