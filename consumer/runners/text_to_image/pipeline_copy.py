"""The copy of a pipeline for one run: it shares the weights and has its own mutable state."""

# mypy: allow-untyped-calls

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance

from consumer.runners.text_to_image.schedulers import fresh_scheduler
from consumer.runners.text_to_image.truncation import TruncationTracker


def copy_pipeline(
    shared: Any,
    truncation: TruncationTracker,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float | None,
) -> Any:
    """Return a shallow copy with a new scheduler, a new guider and tracked tokenizers.

    `from_pipe` of diffusers is not used, because it casts the shared weights.

    Args:
        shared: The pipeline; not changed.
        truncation: Records the prompts that are truncated.
        generators: One for each image of the run; the source of the scheduler's noise.
        guidance_scale: For the guider, where the pipeline has one; None: the guider's default.
    """
    pipe = copy.copy(shared)
    parts: dict[str, Any] = shared.components
    for name, part in parts.items():
        if isinstance(part, SchedulerMixin):
            setattr(pipe, name, fresh_scheduler(part, generators))
        elif isinstance(part, BaseGuidance):
            has_scale = guidance_scale is not None and name == "guider"
            scale = {"guidance_scale": guidance_scale} if has_scale else {}
            setattr(pipe, name, part.new(**scale))
        elif (tracked := truncation.tracked(name, part)) is not part:
            setattr(pipe, name, tracked)
    return pipe
