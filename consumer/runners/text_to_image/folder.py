"""Checks of a pipeline's folder before loading: classes of its parts, variants of its weights."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers

from consumer.ports.model import ModelUnavailable

_LIBRARIES = frozenset({"diffusers", "transformers"})
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
_PREFERRED = "fp16"  # the variant that most folders have


def require_known_classes(index: Mapping[str, Any], name: str) -> None:
    """Refuse a part whose class is not of diffusers or transformers: remote code is not run.

    Args:
        index: The pipeline's model_index.json.
        name: The pipeline's name in messages.

    Raises:
        ModelUnavailable: Names the part and its class.
    """
    for part, library, class_name in _parts(index):
        # A class can also be in a module of diffusers' pipelines, as most safety checkers are.
        if library not in _LIBRARIES and not hasattr(diffusers.pipelines, library):
            raise ModelUnavailable(
                f"{name}: {part}: {library}.{class_name} is not in diffusers or transformers, "
                "and code that comes with a model is not run"
            )


def variants(folder: Path, index: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the variant, such as `fp16`, of each part that has weights of variants only.

    Args:
        folder: The pipeline's folder.
        index: Its model_index.json.
        name: The pipeline's name in messages.

    Raises:
        ModelUnavailable: A part has pickled weights only.
    """
    found = {}
    for part, _, _ in _parts(index):
        files = [file.name for file in (folder / part).glob("*")]
        names = [match["variant"] for match in map(_WEIGHTS.fullmatch, files) if match]
        if names and None not in names:
            found[part] = _PREFERRED if _PREFERRED in names else min(names)
        if not names and any(file.endswith((".bin", ".ckpt", ".pt")) for file in files):
            raise ModelUnavailable(
                f"{name}: {part}: its weights are pickled, which can hold code and is not read: "
                "convert them to .safetensors"
            )
    return found


def _parts(index: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for part, entry in index.items():
        if isinstance(entry, list) and entry and isinstance(entry[0], str):
            yield part, entry[0], entry[-1]
