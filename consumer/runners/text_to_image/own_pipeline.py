"""A pipeline for one run: it shares the weights with all others, and nothing that a run changes."""

# mypy: allow-untyped-calls

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance

from consumer.runners.text_to_image.schedulers import fresh_scheduler
from consumer.runners.text_to_image.truncation import TruncationTracker


def own_pipeline(
    shared: Any,
    cuts: TruncationTracker,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float | None,
) -> Any:
    """A shallow copy with its own state: a fresh scheduler and guider, watched tokenizers.

    Never one from `from_pipe`, which casts the shared weights.

    Args:
        shared: The pipeline; not changed.
        cuts: Notes the prompts that are cut.
        generators: One for each image of the run; the scheduler takes its noise from them.
        guidance_scale: For the guider, where the pipeline has one; None: the guider's own.
    """
    pipe = copy.copy(shared)
    parts: dict[str, Any] = shared.components
    for name, part in parts.items():
        if isinstance(part, SchedulerMixin):
            setattr(pipe, name, fresh_scheduler(part, generators))
        elif isinstance(part, BaseGuidance):
            given = guidance_scale is not None and name == "guider"
            scale = {"guidance_scale": guidance_scale} if given else {}
            setattr(pipe, name, part.new(**scale))
        elif (watched := cuts.watched(name, part)) is not part:
            setattr(pipe, name, watched)
    return pipe
