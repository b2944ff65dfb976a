"""The parameters of a pipeline, derived from the signature of `__call__`; validation of requests.

`**kwargs` in a signature are ignored: SDXL silently drops unknown names.
"""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from diffusers.models.embeddings import PatchEmbed

from consumer.ports.model import (
    ModelDescription,
    ModelMisconfigured,
    UnsupportedParameter,
)
from consumer.runners.defaults import SETTING, Default, checked_defaults
from consumer.runners.text_to_image.distilled import distilled
from consumer.runners.text_to_image.guidance import Guidance, has_cfg
from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.pipeline_loading import denoiser
from consumer.runners.text_to_image.preview import allows_previews
from consumer.runners.text_to_image.schedulers import least_steps
from generation_contracts import ModelInfo, TextToImageRequest
from generation_contracts.events import ParameterValue
from generation_contracts.tasks.text_to_image import TextToImageParameters

# The largest default of all families, 2048x2048 of HunyuanImage. A request is for at most eight
# images of this size, which bounds the memory of a run.
MAX_PIXELS = 2048 * 2048

_SIDE = 1024  # pixels; for pipelines whose default size is only in their code (Z-Image)
_STEPS = 50  # for pipelines without a default: the most frequent default in diffusers

_ALWAYS = {"width", "height", "num_inference_steps", "num_images", "seed", "output_format"}
_NO_DEFAULTS: Mapping[str, Default] = MappingProxyType({})


class Parameters:
    """The parameters of one loaded pipeline.

    Args:
        pipe: The pipeline; not changed.
        info: Identifies the model in the description.
        defaults: MODEL_DEFAULTS: values by request field, for requests that omit the field. They
            take precedence over the defaults of the weights and of the pipeline.
        adapters: Names of the LoRA adapters that a request may use.

    Raises:
        ModelUnavailable: The pipeline would refuse a default if a request contained it.
    """

    def __init__(
        self,
        pipe: Any,
        info: ModelInfo,
        defaults: Mapping[str, Default] = _NO_DEFAULTS,
        adapters: Collection[str] = (),
    ) -> None:
        self._pipe = pipe
        self._known = inspect.signature(type(pipe).__call__).parameters
        self._adapters = frozenset(adapters)
        self._distilled = distilled(pipe)
        self._max_side = _max_side(pipe)
        self._least_steps = least_steps(getattr(pipe, "scheduler", None))
        self.guidance = Guidance.of(pipe, self._known)
        self._defaults = checked_defaults(TextToImageParameters, defaults)
        self.description = self._describe(info)
        self._check_defaults()

    def check(self, request: TextToImageRequest) -> None:
        """Validate a request against the pipeline.

        Raises:
            UnsupportedParameter: Names the first unsupported field.
        """
        for name in sorted(request.model_fields_set & TextToImageParameters.model_fields.keys()):
            value = getattr(request, name)
            if value == type(request).model_fields[name].get_default(call_default_factory=True):
                continue
            if name == "adapters":
                self._check_adapters(value)
            elif name not in self.description.parameters and not _is_blank(value):
                raise UnsupportedParameter(name, f"{name}: {self._family} does not have it")
        self._check_steps(request)
        self._check_size(request)
        self._check_negative_prompt(request)

    def accepts(self, name: str) -> bool:
        """Return whether the pipeline's `__call__` has a parameter of this name."""
        return name in self._known

    def size(self, request: TextToImageRequest) -> tuple[int, int]:
        """Return width and height of the images in pixels."""
        defaults = self.description.defaults
        return request.width or _int(defaults["width"]), request.height or _int(defaults["height"])

    def steps(self, request: TextToImageRequest) -> int:
        """Return the number of denoising steps."""
        defaults = self.description.defaults
        return request.num_inference_steps or _int(defaults["num_inference_steps"])

    def scale(self, request: TextToImageRequest) -> float | None:
        """Return the guidance scale; None for a pipeline without one."""
        if request.guidance_scale is not None:
            return request.guidance_scale
        return _number(self.description.defaults["guidance_scale"])

    def guider_scale(self, request: TextToImageRequest) -> float | None:
        """Return the scale of the request or of MODEL_DEFAULTS; None: the guider's default."""
        if request.guidance_scale is not None:
            return request.guidance_scale
        return _number(self._defaults.get("guidance_scale"))

    def arguments(self, request: TextToImageRequest) -> dict[str, Any]:
        """Return keyword arguments for the pipeline, without the generators and the callback.

        Defaults are passed explicitly, so that they are those of the description. The output type
        is an array, in which NaN values can be detected.
        """
        width, height = self.size(request)
        negative_prompt: Any = request.negative_prompt
        if negative_prompt is None:
            negative_prompt = self.description.defaults.get("negative_prompt")
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "width": width,
            "height": height,
            "num_inference_steps": self.steps(request),
            "output_type": "np",
            **self.guidance.arguments(self.scale(request), negative_prompt),
        }
        if self._distilled is not None:
            arguments.update(self._distilled.arguments)
        if self.accepts("use_resolution_binning"):
            # Binning would generate 1024x1024 for 64x64 and crop the image.
            arguments["use_resolution_binning"] = False
        return arguments

    def resolved(
        self, request: TextToImageRequest, seeds: Sequence[int]
    ) -> dict[str, ParameterValue]:
        """Return the parameters of the images, including defaults, without any text.

        Args:
            request: The request.
            seeds: The seeds of the images in order.
        """
        width, height = self.size(request)
        resolved: dict[str, ParameterValue] = {
            "width": width,
            "height": height,
            "num_inference_steps": self.steps(request),
            "num_images": len(seeds),
            "seed": seeds[0],
        }
        scale = self.scale(request)
        if scale is not None:
            resolved["guidance_scale"] = scale
        if request.adapters:
            resolved["adapters"] = dict(request.adapters)
        return resolved

    @property
    def _family(self) -> str:
        return self.description.info.family

    def _check_defaults(self) -> None:
        try:
            self.check(TextToImageRequest.model_validate({**self._defaults, "prompt": "any"}))
        except UnsupportedParameter as refused:
            raise ModelMisconfigured(f"{SETTING}: {refused}") from None

    def _check_adapters(self, weights: Mapping[str, float]) -> None:
        for name in weights:
            if name not in self._adapters:
                raise UnsupportedParameter("adapters", f"adapters: there is no adapter {name}")

    def _check_steps(self, request: TextToImageRequest) -> None:
        if self.steps(request) < self._least_steps:
            name = "num_inference_steps"
            raise UnsupportedParameter(name, f"{name}: must be at least {self._least_steps}")

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
        if _is_blank(request.negative_prompt) or self.guidance.name == "guider":
            return
        scale = self.scale(request)
        if scale is not None and not has_cfg(self._pipe, scale):
            least = 0 if has_cfg(self._pipe, 1.0) else 1
            raise UnsupportedParameter(
                "negative_prompt",
                f"negative_prompt: has an effect only with guidance_scale above {least}",
            )

    def _describe(self, info: ModelInfo) -> ModelDescription:
        names = set(_ALWAYS)
        if self.guidance.name is not None:
            names.add("guidance_scale")
        if self.guidance.negative:
            names.add("negative_prompt")
        if self._adapters:
            names.add("adapters")
        if allows_previews(self._pipe):
            names.add("preview")
        return ModelDescription(
            info=info,
            parameters=frozenset(names),
            defaults={**self._model_defaults(), **self._defaults},
            size_multiple=_size_multiple(self._pipe),
            max_pixels=MAX_PIXELS,
            least_steps=self._least_steps,
        )

    def _model_defaults(self) -> dict[str, Default | None]:
        steps = self._known["num_inference_steps"].default or _STEPS
        scale = self.guidance.default
        if self._distilled is not None:
            steps = self._distilled.steps
            if self._distilled.guidance_scale is not None:
                scale = self._distilled.guidance_scale
        return {
            "width": _default_side(self._pipe, self._known, "width"),
            "height": _default_side(self._pipe, self._known, "height"),
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "num_images": 1,
            "output_format": "png",
        }


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _default_side(pipe: Any, known: Mapping[str, inspect.Parameter], name: str) -> int:
    default = known[name].default
    if isinstance(default, int):
        return default
    sample = getattr(pipe, "default_sample_size", None) or config_of(denoiser(pipe)).get(
        "sample_size"
    )
    if isinstance(sample, list | tuple):
        sample = sample[0 if name == "height" else -1]
    if not isinstance(sample, int):
        return _SIDE
    side = sample * int(getattr(pipe, "vae_scale_factor", 1))
    # The default_sample_size of PRX is in pixels of the image.
    return side if side * side <= MAX_PIXELS else sample


def _size_multiple(pipe: Any) -> int:
    """Return the number of pixels of which width and height must be multiples.

    The rule fits FLUX.1, FLUX.2, SD3, SDXL, HunyuanDiT, HunyuanImage, Qwen-Image and Z-Image.
    """
    scale = int(getattr(pipe, "vae_scale_factor", 1))
    patch = config_of(denoiser(pipe)).get("patch_size", 1) or 1
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    processor = config_of(getattr(pipe, "image_processor", None)).get("vae_scale_factor", 1)
    return math.lcm(scale * int(patch), int(processor))


def _max_side(pipe: Any) -> int | None:
    """Return the longest side in pixels; None without a limit.

    Stable Diffusion 3 reads its position embeddings from a table and raises beyond its size.
    """
    embed = getattr(denoiser(pipe), "pos_embed", None)
    if not isinstance(embed, PatchEmbed) or not embed.pos_embed_max_size:
        return None
    return int(embed.pos_embed_max_size) * int(embed.patch_size) * int(pipe.vae_scale_factor)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("a default that is a number")
    return value
