"""Weights that were distilled to need few steps, where their configuration tells that they were.

diffusers has one default number of steps for each pipeline, that of the weights which need many:
FLUX.1-schnell would take seven times as long as it should. What is here are the numbers that the
models' cards and diffusers' pages give. Most turbo and lightning weights have the configuration of
the weights that they were made of: for those an operator sets MODEL_DEFAULTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.pipeline_loading import denoiser


@dataclass(frozen=True)
class Distilled:
    """What such weights want.

    Attributes:
        steps: Denoising steps.
        guidance_scale: None: what their pipeline has.
        arguments: Keywords that their pipeline is always given.
    """

    steps: int
    guidance_scale: float | None = None
    arguments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sign:
    """A value in the configuration of a pipeline or of its denoiser, and what it means."""

    where: Literal["pipeline", "denoiser"]
    key: str
    means: Distilled
    value: bool = True


_SIGNS = {
    # FLUX.1-schnell, which reads no guidance scale and was trained on prompts of 256 tokens.
    "FluxPipeline": _Sign(
        where="denoiser",
        key="guidance_embeds",
        value=False,
        means=Distilled(4, arguments={"max_sequence_length": 256}),
    ),
    "Flux2KleinPipeline": _Sign("pipeline", "is_distilled", Distilled(4)),
    "HunyuanImagePipeline": _Sign("denoiser", "use_meanflow", Distilled(8)),
    "Krea2Pipeline": _Sign("pipeline", "is_distilled", Distilled(8, guidance_scale=0.0)),
}


def distilled(pipe: Any) -> Distilled | None:
    """What the pipeline's weights want; None where nothing says that they were distilled."""
    sign = _SIGNS.get(type(pipe).__name__)
    if sign is None:
        return None
    config = config_of(denoiser(pipe) if sign.where == "denoiser" else pipe)
    return sign.means if bool(config.get(sign.key)) is sign.value else None
