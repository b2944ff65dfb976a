"""Defaults of distilled weights, which need few steps.

diffusers has one default number of steps for each pipeline, for weights that need many. With it,
FLUX.1-schnell would take seven times as long as it should. The numbers here are those of the model
cards and of diffusers' documentation. Only weights whose configuration identifies them as distilled
are recognised. Most turbo and lightning weights have the configuration of their base model; for
those an operator sets MODEL_DEFAULTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.pipeline_loading import denoiser


@dataclass(frozen=True)
class Distilled:
    """Defaults of one kind of distilled weights.

    Attributes:
        steps: Denoising steps.
        guidance_scale: None: the pipeline's default.
        arguments: Keyword arguments that are always passed to the pipeline.
    """

    steps: int
    guidance_scale: float | None = None
    arguments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rule:
    """A configuration value that identifies distilled weights, and their defaults."""

    where: Literal["pipeline", "denoiser"]
    key: str
    defaults: Distilled
    value: bool = True


_RULES = {
    # FLUX.1-schnell, which reads no guidance scale and was trained on prompts of 256 tokens.
    "FluxPipeline": _Rule(
        where="denoiser",
        key="guidance_embeds",
        value=False,
        defaults=Distilled(4, arguments={"max_sequence_length": 256}),
    ),
    "Flux2KleinPipeline": _Rule("pipeline", "is_distilled", Distilled(4)),
    "HunyuanImagePipeline": _Rule("denoiser", "use_meanflow", Distilled(8)),
    "Krea2Pipeline": _Rule("pipeline", "is_distilled", Distilled(8, guidance_scale=0.0)),
}


def distilled(pipe: Any) -> Distilled | None:
    """Return the defaults of the pipeline's distilled weights; None for other weights."""
    rule = _RULES.get(type(pipe).__name__)
    if rule is None:
        return None
    config = config_of(denoiser(pipe) if rule.where == "denoiser" else pipe)
    return rule.defaults if bool(config.get(rule.key)) is rule.value else None
