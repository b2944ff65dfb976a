"""Every family through the real from_pretrained path: defaults, images, and refusals.

The expected values are in `tests/support/family_table.py`; `docs/reference/families.md` has the
same table.
"""

# mypy: allow-untyped-calls

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers.loaders.lora_base import LoraBaseMixin
from PIL import Image

from consumer.ports.model import Interrupted, UnsupportedParameter
from consumer.runners import ModelRunner
from consumer.runners.faults import StoppedAtStep
from generation_contracts import TextToImageRequest
from tests.support.family_table import FAMILIES, LARGEST_AREA, Family
from tests.support.image_runs import model, pipeline, pixels, run_checked, run_small, small_request
from tests.support.model_runs import run_model

ALWAYS = {"width", "height", "num_inference_steps", "num_images", "seed", "output_format"}
KEYWORDS = {"guidance_scale", "true_cfg_scale", "distilled_guidance_scale"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "families.md"

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


@pytest.fixture
def runner(family: Family, shared_runner: Callable[..., ModelRunner]) -> ModelRunner:
    return shared_runner(family.name, **family.options)


def refusal_of(runner: ModelRunner, **fields: Any) -> str:
    """Check a request, which must be refused; return the error."""
    with pytest.raises(UnsupportedParameter) as refusal:
        runner.check(small_request(**fields))
    assert str(refusal.value).startswith(f"{refusal.value.parameter}: ")
    return str(refusal.value)


# -- descriptions and images ----------------------------------------------------------------------


@each_family
def test_the_description_of_a_family_matches_the_table(family: Family, runner: ModelRunner) -> None:
    description = model(runner).description
    assert type(pipeline(runner)).__name__ == family.pipeline
    assert description.info.family == family.pipeline.removesuffix("Pipeline")
    assert description.parameters == ALWAYS | family.takes
    assert description.defaults == {
        "width": family.side,
        "height": family.side,
        "num_inference_steps": family.steps,
        "guidance_scale": family.scale,
        "num_images": 1,
        "output_format": "png",
    }
    assert (description.size_multiple, description.max_pixels) == (family.multiple, LARGEST_AREA)
    assert isinstance(pipeline(runner), LoraBaseMixin) is family.adapters


@each_family
def test_a_family_generates_the_requested_image(family: Family, runner: ModelRunner) -> None:
    steps: list[tuple[int, int]] = []
    request = small_request(width=96, num_inference_steps=2)
    output = run_model(runner, request, [], on_step=lambda *step: steps.append(step))
    (image,) = output.images
    assert (image.image.size, image.image.mode, image.seed) == ((96, 64), "RGB", 7)
    assert steps == [(1, 2), (2, 2)]
    assert output.warnings == ()
    scale = {} if family.scale is None else {"guidance_scale": family.scale}
    assert output.parameters == {
        "width": 96,
        "height": 64,
        "num_inference_steps": 2,
        "num_images": 1,
        "seed": 7,
        **scale,
    }


# -- defaults -------------------------------------------------------------------------------------


@each_family
def test_a_request_without_parameters_uses_the_described_defaults(
    family: Family, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}

    def record(pipe: Any, **keywords: Any) -> None:
        arguments.update(keywords, pipeline_guider=getattr(pipe, "guider", None))
        raise StoppedAtStep  # an image of the default size takes minutes

    monkeypatch.setattr(type(pipeline(runner)), "__call__", record)
    with pytest.raises(Interrupted):
        run_checked(runner, TextToImageRequest(prompt="a cat"))
    assert (arguments["width"], arguments["height"]) == (family.side, family.side)
    assert arguments["num_inference_steps"] == family.steps
    if family.guidance == "guider":
        arguments["guider"] = arguments["pipeline_guider"].config.guidance_scale
    keywords = {name: arguments[name] for name in (*KEYWORDS, "guider") if name in arguments}
    assert keywords == ({} if family.guidance is None else {family.guidance: family.scale})
    # FLUX.1-schnell was trained on prompts of 256 tokens.
    schnell = family.title == "FLUX.1-schnell"
    assert arguments.get("max_sequence_length") == (256 if schnell else None)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.guidance], ids=lambda family: family.title
)
def test_the_default_guidance_gives_the_image_of_a_request_without_guidance(
    family: Family, runner: ModelRunner
) -> None:
    assert pixels(run_small(runner, guidance_scale=family.scale)) == pixels(run_small(runner))


# -- accepted and refused parameters --------------------------------------------------------------


@each_family
def test_guidance_changes_the_image_or_is_refused(family: Family, runner: ModelRunner) -> None:
    if family.guidance is None:
        line = refusal_of(runner, guidance_scale=4.0)
        assert line == f"guidance_scale: {model(runner).description.info.family} does not have it"
        return
    weak, strong = run_small(runner, guidance_scale=1.5), run_small(runner, guidance_scale=30.0)
    assert pixels(weak) != pixels(strong)


@each_family
def test_a_negative_prompt_changes_the_image_or_is_refused(
    family: Family, runner: ModelRunner
) -> None:
    if not family.negative:
        line = refusal_of(runner, negative_prompt="a dog")
        assert line == f"negative_prompt: {model(runner).description.info.family} does not have it"
        return
    guided = pixels(run_small(runner, guidance_scale=6.0))
    assert pixels(run_small(runner, guidance_scale=6.0, negative_prompt="a dog")) != guided


@each_family
def test_unsupported_sizes_are_refused(family: Family, runner: ModelRunner) -> None:
    for name in ("width", "height"):
        line = refusal_of(runner, **{name: 64 + family.multiple // 2})
        assert line == f"{name}: must be a multiple of {family.multiple}"
        sides = {"width": 2048, "height": 2048, name: 2048 + family.multiple}
        too_large = refusal_of(runner, **sides)
        assert f"at most {LARGEST_AREA} pixels" in too_large
    runner.check(small_request(width=2048, height=2048))
    longest = family.largest or 4096
    runner.check(small_request(width=longest, height=64))
    if family.largest is not None:
        line = refusal_of(runner, height=family.largest + family.multiple)
        assert line == f"height: must be at most {family.largest}"


@each_family
def test_fewer_steps_than_the_minimum_are_refused(family: Family, runner: ModelRunner) -> None:
    run_small(runner, num_inference_steps=family.least)
    if family.least > 1:
        line = refusal_of(runner, num_inference_steps=family.least - 1)
        assert line == f"num_inference_steps: must be at least {family.least}"


@each_family
def test_previews_are_small_images_and_do_not_change_the_output_or_are_refused(
    family: Family, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not family.previews:
        name = model(runner).description.info.family
        assert refusal_of(runner, preview=True) == f"preview: {name} does not have it"
        return
    monkeypatch.setattr("consumer.runners.text_to_image.preview.MIN_INTERVAL", 0.0)
    monkeypatch.setattr("consumer.runners.text_to_image.preview.MAX_SHARE", 1e9)
    request = small_request(preview=True, num_inference_steps=6, num_images=2)
    runner.check(request)
    previews: list[bytes] = []
    output = run_model(
        runner,
        request,
        [],
        on_preview=previews.append,
    )
    assert len(previews) == 4  # no preview follows the first or the last step
    for preview in previews:
        with Image.open(io.BytesIO(preview)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 256
    assert pixels(output) == pixels(run_small(runner, num_inference_steps=6, num_images=2))


@each_family
def test_adapters_that_are_not_configured_are_refused(family: Family, runner: ModelRunner) -> None:
    assert refusal_of(runner, adapters={"ink": 1.0}) == "adapters: there is no adapter ink"


# -- the document ---------------------------------------------------------------------------------


def row_of(family: Family) -> list[str]:
    """Return the row of a family in the document."""
    guidance = "none" if family.guidance is None else f"`{family.guidance}` {family.scale}"
    sides = "" if family.largest is None else f", sides {family.largest}"
    return [
        family.title,
        f"`{family.pipeline}`",
        str(family.steps),
        guidance,
        "yes" if family.negative else "no",
        f"{family.side}x{family.side}",
        str(family.multiple),
        f"{LARGEST_AREA} pixels{sides}",
        "yes" if family.adapters else "no",
        "yes",  # stops at a step: tests/integration/test_determinism.py
        "yes" if family.previews else "no",
        "yes",
    ]


def test_the_document_has_the_table_of_the_tests() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| ") and "Pipeline`" in line
    ]
    assert rows == [row_of(family) for family in FAMILIES]
