"""The expected parameters and defaults of each model family.

`docs/reference/families.md` contains the same table. A test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST_AREA = 2048 * 2048  # pixels
PREVIEWS = {"stable_diffusion_3", "stable_diffusion_35", "flux", "z_image"}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        title: Title in the documentation.
        name: Name of a function in `tests.support.tiny_families`, called with `options`.
        pipeline: The `_class_name` in model_index.json.
        steps: Default number of denoising steps.
        guidance: The pipeline argument that gets the guidance_scale of a request, if any.
        scale: Default guidance scale.
        negative: Whether the pipeline supports a negative prompt.
        side: Side of the default image, which is square, in pixels.
        multiple: Both sides of an image must be multiples of this number of pixels.
        largest: Largest side in pixels, or None if only the area is limited.
        adapters: Whether the pipeline supports LoRA adapters.
        least: Smallest number of denoising steps of a request.
    """

    title: str
    name: str
    pipeline: str
    steps: int
    guidance: str | None
    scale: float | None
    negative: bool
    side: int
    multiple: int
    largest: int | None = None
    adapters: bool = True
    least: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> set[str]:
        """The supported parameters that some families do not support."""
        guided = {"guidance_scale"} if self.guidance else set()
        negative = {"negative_prompt"} if self.negative else set()
        return guided | negative | ({"preview"} if self.previews else set())

    @property
    def previews(self) -> bool:
        """Whether the family supports previews."""
        return self.name in PREVIEWS


FAMILIES = (
    Family(
        title="Stable Diffusion 3",
        name="stable_diffusion_3",
        options={"full_size": True},
        pipeline="StableDiffusion3Pipeline",
        steps=28,
        guidance="guidance_scale",
        scale=7.0,
        negative=True,
        side=1024,
        multiple=16,
        largest=3072,
    ),
    Family(
        title="Stable Diffusion 3 without T5",
        name="stable_diffusion_3",
        options={"full_size": True, "t5": False},
        pipeline="StableDiffusion3Pipeline",
        steps=28,
        guidance="guidance_scale",
        scale=7.0,
        negative=True,
        side=1024,
        multiple=16,
        largest=3072,
    ),
    Family(
        title="Stable Diffusion 3.5",
        name="stable_diffusion_35",
        options={"full_size": True},
        pipeline="StableDiffusion3Pipeline",
        steps=28,
        guidance="guidance_scale",
        scale=7.0,
        negative=True,
        side=1024,
        multiple=16,
        largest=3072,
    ),
    Family(
        title="SDXL",
        name="stable_diffusion_xl",
        options={"full_size": True},
        pipeline="StableDiffusionXLPipeline",
        steps=50,
        guidance="guidance_scale",
        scale=5.0,
        negative=True,
        side=1024,
        multiple=8,
    ),
    Family(
        title="FLUX.1-dev",
        name="flux",
        pipeline="FluxPipeline",
        steps=28,
        guidance="guidance_scale",
        scale=3.5,
        negative=False,
        side=1024,
        multiple=16,
    ),
    Family(
        title="FLUX.1-schnell",
        name="flux",
        options={"reads_guidance": False},
        pipeline="FluxPipeline",
        steps=4,
        guidance="true_cfg_scale",
        scale=1.0,
        negative=True,
        side=1024,
        multiple=16,
    ),
    Family(
        title="FLUX.2-dev",
        name="flux_2",
        pipeline="Flux2Pipeline",
        steps=50,
        guidance="guidance_scale",
        scale=4.0,
        negative=False,
        side=1024,
        multiple=16,
    ),
    Family(
        title="FLUX.2 klein base",
        name="flux_2_klein",
        pipeline="Flux2KleinPipeline",
        steps=50,
        guidance="guidance_scale",
        scale=4.0,
        negative=False,
        side=1024,
        multiple=16,
    ),
    Family(
        title="FLUX.2 klein",
        name="flux_2_klein",
        options={"is_distilled": True},
        pipeline="Flux2KleinPipeline",
        steps=4,
        guidance=None,
        scale=None,
        negative=False,
        side=1024,
        multiple=16,
    ),
    Family(
        title="HunyuanDiT",
        name="hunyuan_dit",
        options={"full_size": True},
        pipeline="HunyuanDiTPipeline",
        steps=50,
        guidance="guidance_scale",
        scale=5.0,
        negative=True,
        side=1024,
        multiple=16,
        adapters=False,
    ),
    Family(
        title="HunyuanImage 2.1",
        name="hunyuan_image",
        pipeline="HunyuanImagePipeline",
        steps=50,
        guidance="guider",
        scale=3.5,
        negative=True,
        side=2048,
        multiple=32,
        adapters=False,
    ),
    Family(
        title="HunyuanImage 2.1 distilled",
        name="hunyuan_image",
        options={"is_distilled": True},
        pipeline="HunyuanImagePipeline",
        steps=8,
        guidance="distilled_guidance_scale",
        scale=3.25,
        negative=False,
        side=2048,
        multiple=32,
        adapters=False,
    ),
    Family(
        title="Qwen-Image",
        name="qwen_image",
        pipeline="QwenImagePipeline",
        least=2,
        steps=50,
        guidance="true_cfg_scale",
        scale=4.0,
        negative=True,
        side=1024,
        multiple=16,
    ),
    Family(
        title="Z-Image",
        name="z_image",
        pipeline="ZImagePipeline",
        steps=50,
        guidance="guidance_scale",
        scale=5.0,
        negative=True,
        side=1024,
        multiple=16,
    ),
)
