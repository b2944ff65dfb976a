"""The sampling parameters of a text: those of the request, else the defaults of the model."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners.defaults import SETTING, checked_defaults
from generation_contracts import ImageToTextRequest
from generation_contracts.tasks.image_to_text import ImageToTextParameters

NEW_TOKENS = 512  # the limit of a text where neither the request nor the model has one
SEEDS = 2**32  # the number of seeds
# Scores are divided by the temperature. Below this value they can overflow float32, and sampling
# from infinite scores makes a cuda device unusable for the process. Some models use this value to
# request greedy decoding.
LEAST_TEMPERATURE = 1e-6

# Defaults of transformers for values that a model's generation_config.json lacks.
_LIBRARY: Mapping[str, int | float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}

# top_k of "all tokens" in files of other servers; transformers refuses it and uses 0.
_ALL_TOKENS = -1

# Parameters that have an effect only with sampling, so that setting one requests sampling.
_SAMPLING_ONLY = ("top_p", "top_k")


def defaults_of(
    generation: Any, configured: Mapping[str, int | float | str]
) -> Mapping[str, int | float]:
    """Return the defaults for fields that a request omits.

    A temperature of 0 means greedy decoding: always the most likely token.

    Args:
        generation: The model's generation config.
        configured: MODEL_DEFAULTS, which override the generation config.

    Raises:
        ModelUnavailable: There is no such field, or the contract refuses its value.
    """
    defaults = _model_defaults(generation)
    overrides = checked_defaults(ImageToTextParameters, configured)
    for name, value in overrides.items():
        if name not in defaults or isinstance(value, str):
            raise ModelMisconfigured(f"{SETTING}: {name}: cannot have a default")
        defaults[name] = value
    if "temperature" not in overrides and not overrides.keys().isdisjoint(_SAMPLING_ONLY):
        defaults["temperature"] = defaults["temperature"] or _LIBRARY["temperature"]
    return defaults


def _model_defaults(generation: Any) -> dict[str, int | float]:
    defaults: dict[str, int | float] = dict(_LIBRARY)
    for name in _LIBRARY:
        value = getattr(generation, name, None)
        defaults[name] = defaults[name] if value is None else value
        if not isinstance(defaults[name], int | float):
            raise ModelUnavailable(f"generation_config.json: {name}: must be a number")
    if defaults["top_k"] == _ALL_TOKENS:
        defaults["top_k"] = 0
    if not generation.do_sample:
        defaults["temperature"] = 0.0
    return {"max_new_tokens": generation.max_new_tokens or NEW_TOKENS, **defaults}


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of one text.

    Attributes:
        options: Keyword arguments for `generate`.
        parameters: The parameters by request field, including those without an effect.
        seed: For torch's global random generator, which `generate` uses; None for greedy decoding.
    """

    options: Mapping[str, Any]
    parameters: Mapping[str, int | float]
    seed: int | None

    @classmethod
    def of(cls, request: ImageToTextRequest, defaults: Mapping[str, Any]) -> "Sampling":
        """Combine a request with the defaults.

        transformers raises for a temperature of 0. Temperatures below `LEAST_TEMPERATURE` mean
        greedy decoding here, without an effect of `top_p`, `top_k` and `seed`. If the default is
        greedy and a request sets only `top_p` or `top_k`, it is sampled at the temperature 1.
        """
        fields = {name: getattr(request, name) for name in _LIBRARY}
        values = {name: defaults[name] if fields[name] is None else fields[name] for name in fields}
        samples = any(fields[name] is not None for name in _SAMPLING_ONLY)
        if request.temperature is None and values["temperature"] == 0 and samples:
            values["temperature"] = _LIBRARY["temperature"]
        if values["temperature"] < LEAST_TEMPERATURE:
            values["temperature"] = 0.0
        always = {"repetition_penalty": values["repetition_penalty"], "num_beams": 1}
        if values["temperature"] == 0:
            return cls({**always, "do_sample": False}, values, seed=None)
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return cls({**always, **values, "do_sample": True}, values, seed)
