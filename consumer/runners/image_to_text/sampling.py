"""How a text is written: the request's sampling parameters over the model's own."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consumer.ports.model import ModelUnavailable
from consumer.runners.defaults import SETTING, checked_defaults
from generation_contracts import ImageToTextRequest
from generation_contracts.requests import ImageToTextParameters

NEW_TOKENS = 512  # the most that a text has where neither the request nor the model says
SEEDS = 2**32
# Below it the scores, which are divided by it, may be more than a float32 holds; on cuda, sampling
# from such ends the process's device. Models that mean greedy have this one themselves.
LEAST_TEMPERATURE = 1e-6

# What transformers does where a model's generation_config.json says nothing.
_LIBRARY: Mapping[str, int | float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}

# The files of other servers say so; transformers refuses it, and has 0 for it.
_EVERY_TOKEN = -1

# These choose among tokens: whoever sets one of them wants no greedy text.
_CHOICE = ("top_p", "top_k")


def defaults_of(
    generation: Any, configured: Mapping[str, int | float | str]
) -> Mapping[str, int | float]:
    """What a model does where a request says nothing.

    A temperature of 0 is greedy: the most likely token each time.

    Args:
        generation: The model's generation config.
        configured: MODEL_DEFAULTS, which come before it.

    Raises:
        ModelUnavailable: A default is none of a request's, or the contract refuses its value.
    """
    own = _own_defaults(generation)
    set_here = checked_defaults(ImageToTextParameters, configured)
    for name, value in set_here.items():
        if name not in own or isinstance(value, str):
            raise ModelUnavailable(f"{SETTING}: {name}: cannot have a default")
        own[name] = value
    if "temperature" not in set_here and not set_here.keys().isdisjoint(_CHOICE):
        own["temperature"] = own["temperature"] or _LIBRARY["temperature"]
    return own


def _own_defaults(generation: Any) -> dict[str, int | float]:
    defaults: dict[str, int | float] = dict(_LIBRARY)
    for name in _LIBRARY:
        own = getattr(generation, name, None)
        defaults[name] = defaults[name] if own is None else own
        if not isinstance(defaults[name], int | float):
            raise ModelUnavailable(f"generation_config.json: {name}: must be a number")
    if defaults["top_k"] == _EVERY_TOKEN:
        defaults["top_k"] = 0
    if not generation.do_sample:
        defaults["temperature"] = 0.0
    return {"max_new_tokens": generation.max_new_tokens or NEW_TOKENS, **defaults}


@dataclass(frozen=True)
class Sampling:
    """How one text is written.

    Attributes:
        options: Keywords for `generate`.
        parameters: The same by the names of a request's fields, with those that choose nothing.
        seed: For the global random generator, the only one that sampling has; None for greedy.
    """

    options: Mapping[str, Any]
    parameters: Mapping[str, int | float]
    seed: int | None

    @classmethod
    def of(cls, request: ImageToTextRequest, defaults: Mapping[str, Any]) -> "Sampling":
        """What a request asks for.

        A temperature of 0 would raise in transformers: it is greedy here, as is one of next to
        nothing, and then `top_p`, `top_k` and `seed` choose nothing. A request that gives `top_p`
        or `top_k` to a model that is greedy by default wants sampling, at the temperature 1.
        """
        asked = {name: getattr(request, name) for name in _LIBRARY}
        chosen = {name: defaults[name] if asked[name] is None else asked[name] for name in asked}
        wants_choice = any(asked[name] is not None for name in _CHOICE)
        if request.temperature is None and chosen["temperature"] == 0 and wants_choice:
            chosen["temperature"] = _LIBRARY["temperature"]
        if chosen["temperature"] < LEAST_TEMPERATURE:
            chosen["temperature"] = 0.0
        always = {"repetition_penalty": chosen["repetition_penalty"], "num_beams": 1}
        if chosen["temperature"] == 0:
            return cls({**always, "do_sample": False}, chosen, seed=None)
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return cls({**always, **chosen, "do_sample": True}, chosen, seed)
