"""MODEL_DEFAULTS and the names of adapters, validated against real pipelines."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from consumer.ports.model import ModelUnavailable, UnsupportedParameter
from consumer.runners import ModelRunner
from consumer.runners.defaults import Default, checked_defaults
from consumer.runners.text_to_image.parameters import Parameters
from generation_contracts import TextToImageRequest
from generation_contracts.tasks.image_to_text import ImageToTextParameters
from generation_contracts.tasks.text_to_image import TextToImageParameters
from tests.support.image_runs import model, pipeline, pixels, run_checked, small_request
from tests.support.tiny_models import Folder, Load

Shared = Callable[..., ModelRunner]
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "families.md"


@pytest.fixture
def parameters_of(shared_runner: Shared) -> Callable[..., Parameters]:
    """Return a function that gives the parameters of a tiny pipeline with defaults and adapters."""

    def parameters(
        family: str, defaults: Mapping[str, Default], adapters: tuple[str, ...] = ()
    ) -> Parameters:
        runner = shared_runner(family)
        return Parameters(pipeline(runner), model(runner).description.info, defaults, adapters)

    return parameters


@pytest.mark.parametrize(
    ("family", "defaults", "line"),
    [
        ("flux", {"colour": "red"}, "colour: a request has no such parameter"),
        ("flux", {"prompt": "a cat"}, "prompt: a request has no such parameter"),
        ("flux", {"num_inference_steps": 0}, "num_inference_steps: Input should be greater than"),
        ("flux", {"num_inference_steps": 4.5}, "num_inference_steps: Input should be a valid int"),
        ("flux", {"num_inference_steps": "4"}, "num_inference_steps: Input should be a valid int"),
        ("flux", {"guidance_scale": -1}, "guidance_scale: Input should be greater than"),
        ("flux", {"seed": 7}, "seed: cannot have a default"),
        ("flux", {"output_format": "webp"}, "output_format: cannot have a default"),
        ("flux", {"num_images": 2}, "num_images: cannot have a default"),
        ("flux", {"width": 1000}, "width: must be a multiple of 16"),
        ("flux", {"negative_prompt": "a dog"}, "negative_prompt: Flux does not have it"),
        ("stable_diffusion_3", {"height": 528}, "height: must be at most 512"),
        (
            "stable_diffusion_3",
            {"negative_prompt": "a dog", "guidance_scale": 1.0},
            "negative_prompt: has an effect only with guidance_scale above 1",
        ),
        (
            "z_image",
            {"negative_prompt": "a dog", "guidance_scale": 0.0},
            "negative_prompt: has an effect only with guidance_scale above 0",
        ),
    ],
)
def test_a_default_that_no_request_can_have_is_refused(
    family: str,
    defaults: dict[str, Default],
    line: str,
    parameters_of: Callable[..., Parameters],
) -> None:
    with pytest.raises(ModelUnavailable) as refused:
        parameters_of(family, defaults)
    assert str(refused.value).startswith(f"MODEL_DEFAULTS: {line}")
    assert "\n" not in str(refused.value)


def test_configured_defaults_replace_the_defaults_of_the_model(
    parameters_of: Callable[..., Parameters],
) -> None:
    turbo = {"steps": 4, "guidance_scale": 0, "width": 512}  # `steps` is an alias in the contract
    parameters = parameters_of("stable_diffusion_xl", turbo)
    described = parameters.description.defaults
    assert (described["num_inference_steps"], described["guidance_scale"]) == (4, 0)
    assert (described["width"], described["height"]) == (512, 64)
    request = small_request(width=None, height=None, num_inference_steps=None)
    assert parameters.arguments(request).items() >= {
        ("num_inference_steps", 4),
        ("guidance_scale", 0),
        ("width", 512),
        ("height", 64),
    }
    assert parameters.resolved(request, [7, 8]) == {
        "width": 512,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 0,
        "num_images": 2,
        "seed": 7,
    }
    assert parameters.arguments(small_request(guidance_scale=3.0))["guidance_scale"] == 3.0


def test_a_model_with_unsupported_defaults_does_not_load(model_folder: Folder, load: Load) -> None:
    with pytest.raises(ModelUnavailable, match=r"^MODEL_DEFAULTS: width: must be a multiple"):
        load(model_folder("flux"), defaults={"width": 1000})


def test_a_request_without_parameters_uses_the_configured_defaults(
    model_folder: Folder, load: Load
) -> None:
    small = {"width": 96, "num_inference_steps": 2, "guidance_scale": 4.0}
    runner = load(model_folder("flux", reads_guidance=False), defaults={**small, "height": 64})
    output = run_checked(runner, TextToImageRequest(prompt="a cat", seed=7))
    assert output.images[0].image.size == (96, 64)
    assert output.parameters.items() >= small.items()
    assert pixels(run_checked(runner, small_request(**small))) == pixels(output)
    assert pixels(run_checked(runner, small_request(**{**small, "guidance_scale": 1.0}))) != pixels(
        output
    )


def test_a_negative_prompt_of_a_request_replaces_the_default_one(
    model_folder: Folder, load: Load, shared_runner: Shared
) -> None:
    plain = shared_runner("stable_diffusion_3")
    runner = load(model_folder("stable_diffusion_3"), defaults={"negative_prompt": "a dog"})

    def image(runner: ModelRunner, **fields: Any) -> list[bytes]:
        return pixels(run_checked(runner, small_request(**fields)))

    assert image(runner) == image(plain, negative_prompt="a dog")
    assert image(runner, negative_prompt="a fox") == image(plain, negative_prompt="a fox")
    assert image(runner, negative_prompt="") == image(plain)
    # Not refused: only a request with its own negative prompt and this scale is refused.
    assert image(runner, guidance_scale=1.0) == image(plain, guidance_scale=1.0)


def test_defaults_of_a_text_model_are_validated() -> None:
    defaults: dict[str, Default] = {"max_new_tokens": 200, "temperature": 0.2}
    assert checked_defaults(ImageToTextParameters, defaults) == defaults
    with pytest.raises(ModelUnavailable, match="MODEL_DEFAULTS: stream: cannot have a default"):
        checked_defaults(ImageToTextParameters, {"stream": True})


def test_the_defaults_in_the_document_are_valid() -> None:
    examples = re.findall(r"MODEL_DEFAULTS='(\{.*?\})'", DOCUMENT.read_text())
    assert len(examples) >= 5
    for value in examples:
        defaults = json.loads(value)
        assert checked_defaults(TextToImageParameters, defaults).keys() == defaults.keys()


def test_a_request_selects_adapters_by_their_names_in_the_settings(
    parameters_of: Callable[..., Parameters],
) -> None:
    parameters = parameters_of("flux", {}, ("ink", "clay"))
    assert "adapters" in parameters.description.parameters
    mixed = small_request(adapters={"clay": 0.5, "ink": 1.0})
    parameters.check(mixed)
    assert parameters.resolved(mixed, [7])["adapters"] == {"clay": 0.5, "ink": 1.0}
    with pytest.raises(UnsupportedParameter, match=r"^adapters: there is no adapter wax$") as no:
        parameters.check(small_request(adapters={"ink": 1.0, "wax": 1.0}))
    assert no.value.parameter == "adapters"
