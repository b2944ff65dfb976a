"""What of a loaded pipeline only a run can show to work: it is run once before the first job.

Without that, a pipeline that fails at each request would be reported as ready.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.schedulers import is_unusual, needs_flow

# Parts that a pipeline can lack. Some work without a text encoder, and none without its tokenizer.
_NEEDED = ("scheduler", "text_encoder", "tokenizer", "transformer", "unet", "vae")


def parts_to_try(pipe: Any) -> tuple[str, ...]:
    """The parts because of which the pipeline is to be run once; empty where there are none.

    Args:
        pipe: The pipeline, loaded.
    """
    parts: Mapping[str, Any] = pipe.components
    reasons = [f"no {name}" for name, part in parts.items() if part is None and _counts(name)]
    if is_unusual(pipe):
        reasons.append(type(pipe.scheduler).__name__)
    vae = parts.get("vae")
    # The autoencoders of these pipelines move the latents, and their class has no default for it.
    if (
        isinstance(vae, AutoencoderKL)
        and needs_flow(type(pipe))
        and config_of(vae).get("shift_factor") is None
    ):
        reasons.append("vae without shift_factor")
    return tuple(reasons)


def _counts(name: str) -> bool:
    return name.startswith(_NEEDED)
