"""What a pipeline takes, read off its `__call__`, and requests measured by it.

`**kwargs` of a pipeline do not count: SDXL swallows what it does not know. Guidance has three names
in diffusers and one in the requests, `guidance_scale`:

- `guidance_scale`, most families; a negative prompt counts only above 1.
- `true_cfg_scale` with `guidance_scale` for weights that were distilled to read it (FLUX.1-dev):
  the request's is the distilled one. A negative prompt would need the other scale as well, which
  requests do not have: refused.
- `true_cfg_scale` where the weights do not read a scale (Qwen-Image, FLUX.1-schnell): the request's
  is this one. It acts only against a negative prompt, so an empty one is given when the request has
  a scale and no negative prompt.
- `distilled_guidance_scale` of HunyuanImage's distilled weights; its others have a `guider`.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.embeddings import PatchEmbed

from consumer.ports import ModelDescription, UnsupportedParameter
from consumer.runners.pipeline_loading import denoiser
from generation_contracts import ModelInfo, TextToImageRequest

# Enough for the largest default among the families, 2048x2048 of HunyuanImage. A request can ask
# for eight pictures of this size at most, so memory is bounded whatever is asked.
MAX_PIXELS = 2048 * 2048

_SIDE = 1024  # pixels; where a pipeline has its default size in its code only (Z-Image)
_STEPS = 50  # where a pipeline has no default: the one most often used in diffusers

_ALWAYS = {"width", "height", "num_inference_steps", "num_images", "seed", "output_format"}
_NOT_OF_THIS_WORKER = {
    "preview": "this worker sends no previews",
    "then": "this worker starts no further steps",
}

GuidanceName = Literal["guidance_scale", "true_cfg_scale", "distilled_guidance_scale", "guider"]


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


class Parameters:
    """The parameters of one loaded pipeline.

    Args:
        pipe: The pipeline; never changed.
        info: Goes into the description.
    """

    def __init__(self, pipe: Any, info: ModelInfo) -> None:
        self._pipe = pipe
        self._known = inspect.signature(type(pipe).__call__).parameters
        self.guidance = _guidance(pipe, self._known)
        self.description = self._describe(info)
        self._max_side = _max_side(pipe)

    def check(self, request: TextToImageRequest) -> None:
        """See whether the pipeline can do what is asked.

        Raises:
            UnsupportedParameter: Names the first field that it cannot.
        """
        for name in sorted(request.model_fields_set & _optional_fields()):
            asked = getattr(request, name)
            if asked == type(request).model_fields[name].get_default(call_default_factory=True):
                continue
            if name in _NOT_OF_THIS_WORKER:
                raise UnsupportedParameter(name, f"{name}: {_NOT_OF_THIS_WORKER[name]}")
            if name not in self.description.parameters and not _says_nothing(asked):
                raise UnsupportedParameter(name, f"{name}: {self._family} does not have it")
        self._check_size(request)
        self._check_negative_prompt(request)

    def takes(self, name: str) -> bool:
        """Whether the pipeline's `__call__` has a parameter of this name."""
        return name in self._known

    def size(self, request: TextToImageRequest) -> tuple[int, int]:
        """Width and height of the pictures in pixels."""
        defaults = self.description.defaults
        return request.width or _int(defaults["width"]), request.height or _int(defaults["height"])

    def steps(self, request: TextToImageRequest) -> int:
        """How many denoising steps are asked for."""
        defaults = self.description.defaults
        return request.num_inference_steps or _int(defaults["num_inference_steps"])

    def arguments(self, request: TextToImageRequest) -> dict[str, Any]:
        """Keywords for the pipeline, but for the generators and the callback.

        The size is always given, so that a default is what the description says; pictures come back
        as arrays, in which a NaN can still be seen.
        """
        width, height = self.size(request)
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "width": width,
            "height": height,
            "num_inference_steps": self.steps(request),
            "output_type": "np",
        }
        if self.guidance.negative and not _says_nothing(request.negative_prompt):
            arguments["negative_prompt"] = request.negative_prompt
        if request.guidance_scale is not None and self.guidance.name not in {None, "guider"}:
            arguments[str(self.guidance.name)] = request.guidance_scale
            if self.guidance.name == "true_cfg_scale" and self.guidance.negative:
                arguments.setdefault("negative_prompt", " ")
        if self.takes("use_resolution_binning"):
            # It would turn 64x64 into 1024x1024 and cut the rest off.
            arguments["use_resolution_binning"] = False
        return arguments

    @property
    def _family(self) -> str:
        return self.description.info.family

    def _check_size(self, request: TextToImageRequest) -> None:
        multiple = self.description.size_multiple or 1
        width, height = self.size(request)
        for name, side in (("width", width), ("height", height)):
            if getattr(request, name) is None:
                continue
            if side % multiple:
                raise UnsupportedParameter(name, f"{name}: must be a multiple of {multiple}")
            if self._max_side is not None and side > self._max_side:
                raise UnsupportedParameter(name, f"{name}: must be at most {self._max_side}")
        if width * height > MAX_PIXELS:
            name = "height" if request.width is None else "width"
            raise UnsupportedParameter(
                name, f"{name}: width times height must be at most {MAX_PIXELS} pixels"
            )

    def _check_negative_prompt(self, request: TextToImageRequest) -> None:
        if _says_nothing(request.negative_prompt) or self.guidance.name == "guider":
            return
        scale = request.guidance_scale
        scale = self.guidance.default if scale is None else scale
        if scale is not None and not _guides(self._pipe, scale):
            raise UnsupportedParameter(
                "negative_prompt", "negative_prompt: has an effect only with guidance_scale above 1"
            )

    def _describe(self, info: ModelInfo) -> ModelDescription:
        names = set(_ALWAYS)
        if self.guidance.name is not None:
            names.add("guidance_scale")
        if self.guidance.negative:
            names.add("negative_prompt")
        return ModelDescription(
            info=info,
            parameters=frozenset(names),
            defaults={
                "width": _default_side(self._pipe, self._known, "width"),
                "height": _default_side(self._pipe, self._known, "height"),
                "num_inference_steps": self._known["num_inference_steps"].default or _STEPS,
                "guidance_scale": self.guidance.default,
                "num_images": 1,
                "output_format": "png",
            },
            size_multiple=_size_multiple(self._pipe),
            max_pixels=MAX_PIXELS,
        )


def _optional_fields() -> set[str]:
    fields = TextToImageRequest.model_fields
    addressing = {"request_id", "reply_to", "deadline", "metadata"}  # not for the model
    return {name for name, field in fields.items() if not field.is_required()} - addressing


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _guidance(pipe: Any, known: Mapping[str, inspect.Parameter]) -> Guidance:
    reads_scale = bool(_config(denoiser(pipe)).get("guidance_embeds"))
    takes_negative = "negative_prompt" in known
    name: GuidanceName
    if "distilled_guidance_scale" in known:
        guider = getattr(pipe, "guider", None)
        name = "distilled_guidance_scale" if reads_scale else "guider"
        if name == "guider":
            scale = _config(guider).get("guidance_scale")
            return Guidance(name if scale is not None else None, scale, negative=scale is not None)
        return Guidance(name, known[name].default, negative=guider is not None)
    if "true_cfg_scale" in known:
        name = "guidance_scale" if reads_scale else "true_cfg_scale"
        return Guidance(name, known[name].default, negative=takes_negative and not reads_scale)
    if "guidance_scale" not in known or _config(pipe).get("is_distilled"):
        return Guidance(None, None, negative=takes_negative)
    certainly = 2.0  # weights that read the scale themselves never compare with a negative prompt
    negative = takes_negative and _guides(pipe, certainly)
    return Guidance("guidance_scale", known["guidance_scale"].default, negative=negative)


def _guides(pipe: Any, scale: float) -> bool:
    """Whether the pipeline compares with a negative prompt at this scale, by its own rule."""
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        return scale > 1
    probe = copy.copy(pipe)
    probe._guidance_scale = scale  # noqa: SLF001 - where each pipeline keeps its argument
    return bool(probe.do_classifier_free_guidance)


def _default_side(pipe: Any, known: Mapping[str, inspect.Parameter], name: str) -> int:
    default = known[name].default
    if isinstance(default, int):
        return default
    sample = getattr(pipe, "default_sample_size", None) or _config(denoiser(pipe)).get(
        "sample_size"
    )
    if isinstance(sample, list | tuple):
        sample = sample[0 if name == "height" else -1]
    if not isinstance(sample, int):
        return _SIDE
    side = sample * int(getattr(pipe, "vae_scale_factor", 1))
    # PRX counts its default_sample_size in pixels of the picture.
    return side if side * side <= MAX_PIXELS else sample


def _size_multiple(pipe: Any) -> int:
    """What both factors divide: fits FLUX.1 and .2, SD3, SDXL, both Hunyuans, Qwen and Z-Image."""
    scale = int(getattr(pipe, "vae_scale_factor", 1))
    patch = _config(denoiser(pipe)).get("patch_size", 1) or 1
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    processor = _config(getattr(pipe, "image_processor", None)).get("vae_scale_factor", 1)
    return math.lcm(scale * int(patch), int(processor))


def _max_side(pipe: Any) -> int | None:
    """Stable Diffusion 3 cuts its positions out of a table and raises beyond its edge."""
    embed = getattr(denoiser(pipe), "pos_embed", None)
    if not isinstance(embed, PatchEmbed) or not embed.pos_embed_max_size:
        return None
    return int(embed.pos_embed_max_size) * int(embed.patch_size) * int(pipe.vae_scale_factor)


def _config(part: Any) -> Mapping[str, Any]:
    config = getattr(part, "config", None)
    return config if isinstance(config, Mapping) else {}


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("a default that is a number")
    return value
