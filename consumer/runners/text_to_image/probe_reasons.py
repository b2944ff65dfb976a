"""The reasons for a probe run: properties of a loaded pipeline that only a run can validate.

Without the probe run, a pipeline that fails at each request would be reported as ready.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL

from consumer.runners.text_to_image.part_config import config_of
from consumer.runners.text_to_image.schedulers import is_unusual, needs_flow

# Parts that a folder can lack. Some pipelines work without a text encoder, none without tokenizer.
_NEEDED = ("scheduler", "text_encoder", "tokenizer", "transformer", "unet", "vae")


def probe_reasons(pipe: Any) -> tuple[str, ...]:
    """Return the reasons for a probe run; empty where the pipeline needs none.

    Args:
        pipe: The loaded pipeline.
    """
    parts: Mapping[str, Any] = pipe.components
    reasons = [f"no {name}" for name, part in parts.items() if part is None and _is_needed(name)]
    if is_unusual(pipe):
        reasons.append(type(pipe.scheduler).__name__)
    vae = parts.get("vae")
    # The autoencoders of these pipelines shift the latents; their class has no default shift.
    if (
        isinstance(vae, AutoencoderKL)
        and needs_flow(type(pipe))
        and config_of(vae).get("shift_factor") is None
    ):
        reasons.append("vae without shift_factor")
    return tuple(reasons)


def _is_needed(name: str) -> bool:
    return name.startswith(_NEEDED)
