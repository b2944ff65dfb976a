"""How a pipeline is guided towards the prompt, read off its `__call__` and its configuration.

Guidance has three names in diffusers and one in the requests, `guidance_scale`:

- `guidance_scale`, most families; a negative prompt counts only above 1, of Z-Image above 0.
- `true_cfg_scale` with `guidance_scale` for weights that were distilled to read it (FLUX.1-dev):
  the request's is the distilled one. A negative prompt would need the other scale as well, which
  requests do not have: refused.
- `true_cfg_scale` where the weights do not read a scale (Qwen-Image, FLUX.1-schnell): the request's
  is this one. It acts only against a negative prompt, so where there is none a blank is given, as
  Qwen-Image's card does.
- `distilled_guidance_scale` of HunyuanImage's distilled weights; its others have a `guider`.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Literal

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.pipeline_loading import denoiser

GuidanceName = Literal["guidance_scale", "true_cfg_scale", "distilled_guidance_scale", "guider"]

_CERTAINLY = 2.0  # a scale at which every pipeline compares that ever does


@dataclass(frozen=True)
class Guidance:
    """How a pipeline is guided.

    Attributes:
        name: What it calls the request's `guidance_scale`; None: it has none.
        default: Its own scale.
        negative: Whether it reads a negative prompt.
    """

    name: GuidanceName | None
    default: float | None
    negative: bool

    @classmethod
    def of(cls, pipe: Any, known: Mapping[str, Parameter]) -> "Guidance":
        """The guidance of a pipeline whose `__call__` has these parameters."""
        reads_scale = bool(config_of(denoiser(pipe)).get("guidance_embeds"))
        takes_negative = "negative_prompt" in known
        if "distilled_guidance_scale" in known:
            return cls._of_hunyuan_image(pipe, known, reads_scale=reads_scale)
        if "true_cfg_scale" in known:
            name: GuidanceName = "guidance_scale" if reads_scale else "true_cfg_scale"
            return cls(name, known[name].default, negative=takes_negative and not reads_scale)
        if "guidance_scale" not in known or _ignores_it(pipe):
            return cls(None, None, negative=takes_negative)
        # Weights that read the scale themselves never compare with a negative prompt.
        negative = takes_negative and guides(pipe, _CERTAINLY)
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
        """Keywords for the pipeline; a guider is no keyword, it is given its scale when made."""
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


def guides(pipe: Any, scale: float) -> bool:
    """Whether the pipeline compares with a negative prompt at this scale, by its own rule."""
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        return scale > 1
    probe = copy.copy(pipe)
    probe._guidance_scale = scale  # noqa: SLF001 - where each pipeline keeps its argument
    return bool(probe.do_classifier_free_guidance)


def _ignores_it(pipe: Any) -> bool:
    # FLUX.2 klein, distilled; the distilled Krea 2 does compare when a scale is given.
    return bool(config_of(pipe).get("is_distilled")) and not guides(pipe, _CERTAINLY)
