"""Sampling parameters from the request, the worker defaults and the model defaults."""

from types import SimpleNamespace
from typing import Any

import pytest

from consumer.ports.model import ModelUnavailable
from consumer.runners.image_to_text.sampling import Sampling, defaults_of
from generation_contracts import ArtifactReference, ImageToTextRequest

SOURCE = ArtifactReference(bucket="inputs", key="image.png")

SILENT = SimpleNamespace(do_sample=False, max_new_tokens=None)
GREEDY = defaults_of(SILENT, {})
# What Qwen2-VL has in its generation_config.json, rounded.
SAMPLING = defaults_of(
    SimpleNamespace(
        do_sample=True,
        temperature=0.01,
        top_p=0.001,
        top_k=1,
        repetition_penalty=1.05,
        max_new_tokens=100,
    ),
    {},
)


def sampled(defaults: Any, **fields: Any) -> Sampling:
    return Sampling.of(ImageToTextRequest(prompt="x", images=(SOURCE,), **fields), defaults)


def test_model_without_defaults_is_greedy_with_512_tokens() -> None:
    assert GREEDY == {
        "max_new_tokens": 512,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
    }


def test_model_defaults_are_reported() -> None:
    assert SAMPLING == {
        "max_new_tokens": 100,
        "temperature": 0.01,
        "top_p": 0.001,
        "top_k": 1,
        "repetition_penalty": 1.05,
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5, "seed": 1}, {"seed": 1}],
)
def test_greedy_has_no_temperature_and_no_seed(fields: dict[str, Any]) -> None:
    actual = sampled(GREEDY, **fields)
    assert actual.options == {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1}
    assert actual.seed is None
    assert actual.parameters == {
        "temperature": 0.0,
        "top_p": fields.get("top_p", 1.0),
        "top_k": 50,
        "repetition_penalty": 1.0,
    }


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 9e-7])
def test_temperature_0_makes_a_sampling_model_greedy(temperature: float) -> None:
    actual = sampled(SAMPLING, temperature=temperature)
    assert actual.options["do_sample"] is False
    assert actual.parameters["temperature"] == 0


def test_smallest_temperature_is_sampled() -> None:
    assert sampled(SAMPLING, temperature=1e-6).options["do_sample"] is True


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"top_k": 5}])
def test_sampling_parameter_makes_a_greedy_model_sample(fields: dict[str, Any]) -> None:
    options = sampled(GREEDY, **fields).options
    assert options["do_sample"] is True
    assert options["temperature"] == 1.0
    assert options.items() >= fields.items()


def test_request_overrides_the_model_defaults() -> None:
    options = {"temperature": 2.0, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.5}
    chosen = sampled(SAMPLING, seed=3, **options)
    assert chosen == Sampling({**options, "do_sample": True, "num_beams": 1}, options, 3)
    assert sampled(SAMPLING, temperature=2.0, seed=3).options["top_k"] == 1


def test_sampling_without_a_seed_draws_a_seed() -> None:
    seeds = {sampled(SAMPLING).seed for _ in range(3)}
    assert None not in seeds
    assert len(seeds) == 3


# -- MODEL_DEFAULTS -------------------------------------------------------------------------------


def test_worker_defaults_override_the_model_defaults() -> None:
    assert defaults_of(SILENT, {"max_new_tokens": 7, "temperature": 0.5}) == {
        **GREEDY,
        "max_new_tokens": 7,
        "temperature": 0.5,
    }
    assert sampled(defaults_of(SILENT, {"temperature": 0.5})).options["temperature"] == 0.5


@pytest.mark.parametrize(
    ("defaults", "temperature"),
    [
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9, "temperature": 0}, 0.0),
        ({"repetition_penalty": 1.1}, 0.0),
    ],
)
def test_sampling_default_makes_a_greedy_model_sample(
    defaults: dict[str, Any], temperature: float
) -> None:
    assert defaults_of(SILENT, defaults)["temperature"] == temperature


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.5),
        ("top_k", 0),
        ("max_new_tokens", "many"),
        ("temprature", 0.5),
        ("width", 64),
        ("seed", 7),
        ("stream", 1),
        ("system", "Be brief."),
    ],
)
def test_invalid_default_fails_the_start(name: str, value: float | str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^MODEL_DEFAULTS: {name}: ") as refused:
        defaults_of(SILENT, {name: value})
    assert "\n" not in str(refused.value)
