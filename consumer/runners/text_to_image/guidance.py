"""The guidance of a pipeline, derived from the signature of `__call__` and the configuration.

Requests have one field, `guidance_scale`. diffusers has several parameters for it:

- `guidance_scale` in most families. A negative prompt has an effect only above 1, for Z-Image
  above 0.
- `guidance_scale` next to `true_cfg_scale`, for weights that are distilled to read the scale
  (FLUX.1-dev): the request sets `guidance_scale`. A negative prompt is refused, because it would
  need the other scale, which requests do not have.
- `true_cfg_scale` for weights that do not read a scale (Qwen-Image, FLUX.1-schnell): the request
  sets `true_cfg_scale`. It has an effect only with a negative prompt. Without one, a blank prompt
  is passed, as Qwen-Image's model card does.
- `distilled_guidance_scale` for HunyuanImage's distilled weights; its other weights have a
  `guider`.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Literal

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.pipeline_loading import denoiser

GuidanceName = Literal["guidance_scale", "true_cfg_scale", "distilled_guidance_scale", "guider"]

_HIGH_SCALE = 2.0  # classifier-free guidance is on at this scale, in pipelines that have it


@dataclass(frozen=True)
class Guidance:
    """The guidance parameters of a pipeline.

    Attributes:
        name: The parameter that takes the request's `guidance_scale`; None: there is none.
        default: The pipeline's default scale.
        negative: Whether the pipeline reads a negative prompt.
    """

    name: GuidanceName | None
    default: float | None
    negative: bool

    @classmethod
    def of(cls, pipe: Any, known: Mapping[str, Parameter]) -> "Guidance":
        """Derive the guidance of a pipeline whose `__call__` has these parameters."""
        reads_scale = bool(config_of(denoiser(pipe)).get("guidance_embeds"))
        takes_negative = "negative_prompt" in known
        if "distilled_guidance_scale" in known:
            return cls._of_hunyuan_image(pipe, known, reads_scale=reads_scale)
        if "true_cfg_scale" in known:
            name: GuidanceName = "guidance_scale" if reads_scale else "true_cfg_scale"
            return cls(name, known[name].default, negative=takes_negative and not reads_scale)
        if "guidance_scale" not in known or _ignores_scale(pipe):
            return cls(None, None, negative=takes_negative)
        # Weights that read the scale have no classifier-free guidance.
        negative = takes_negative and has_cfg(pipe, _HIGH_SCALE)
        return cls("guidance_scale", known["guidance_scale"].default, negative=negative)

    @classmethod
    def _of_hunyuan_image(
        cls, pipe: Any, known: Mapping[str, Parameter], *, reads_scale: bool
    ) -> "Guidance":
        guider = getattr(pipe, "guider", None)
        if reads_scale:
            name: GuidanceName = "distilled_guidance_scale"
            return cls(name, known[name].default, negative=guider is not None)
        scale = config_of(guider).get("guidance_scale")
        if scale is None:
            return cls(None, None, negative=False)
        return cls("guider", scale, negative=True)

    def arguments(self, scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
        """Return keyword arguments for the pipeline.

        A guider's scale is not among them: the guider gets it when it is created.
        """
        arguments: dict[str, Any] = {}
        if self.negative and negative_prompt and negative_prompt.strip():
            arguments["negative_prompt"] = negative_prompt
        if scale is None or self.name in _NO_KEYWORD:
            return arguments
        arguments[str(self.name)] = scale
        if self.name == "true_cfg_scale" and self.negative and scale > 1:
            arguments.setdefault("negative_prompt", " ")
        return arguments


_NO_KEYWORD: Collection[GuidanceName | None] = (None, "guider")


def has_cfg(pipe: Any, scale: float) -> bool:
    """Return whether the pipeline uses classifier-free guidance at this scale, by its own rule."""
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        return scale > 1
    probe = copy.copy(pipe)
    probe._guidance_scale = scale  # noqa: SLF001 - each pipeline stores its argument there
    return bool(probe.do_classifier_free_guidance)


def _ignores_scale(pipe: Any) -> bool:
    # FLUX.2 klein, distilled. The distilled Krea 2 does use a scale that is passed.
    return bool(config_of(pipe).get("is_distilled")) and not has_cfg(pipe, _HIGH_SCALE)
