"""Every family through the real from_pretrained path: what it makes, takes and refuses.

The expected values are in `tests/support/family_table.py`; `docs/reference/families.md` has the
same table.
"""

# mypy: allow-untyped-calls

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers.loaders.lora_base import LoraBaseMixin
from PIL import Image
from structlog.testing import capture_logs

from consumer.ports.model import Interrupted, ModelUnavailable, UnsupportedParameter
from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.faults import StoppedAtStep
from generation_contracts import Task, TextToImageRequest
from tests.support.family_table import FAMILIES, LARGEST_AREA, Family
from tests.support.image_runs import model, pipeline, pixels, run_checked, run_small, small_request
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder

ALWAYS = {"width", "height", "num_inference_steps", "num_images", "seed", "output_format"}
KEYWORDS = {"guidance_scale", "true_cfg_scale", "distilled_guidance_scale"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "families.md"

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


@pytest.fixture
def runner(family: Family, shared_runner: Callable[..., ModelRunner]) -> ModelRunner:
    return shared_runner(family.name, **family.options)


def refused(runner: ModelRunner, **fields: Any) -> str:
    with pytest.raises(UnsupportedParameter) as refusal:
        runner.check(small_request(**fields))
    assert str(refusal.value).startswith(f"{refusal.value.parameter}: ")
    return str(refusal.value)


# -- what a family is -----------------------------------------------------------------------------


@each_family
def test_a_family_is_described_as_the_table_has_it(family: Family, runner: ModelRunner) -> None:
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
def test_a_family_makes_the_image_asked_for(family: Family, runner: ModelRunner) -> None:
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


# -- what it does where a request says nothing ----------------------------------------------------


@each_family
def test_a_request_that_says_nothing_is_made_with_the_described_defaults(
    family: Family, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def note(pipe: Any, **arguments: Any) -> None:
        given.update(arguments, of_the_guider=getattr(pipe, "guider", None))
        raise StoppedAtStep  # an image of the default size would take minutes

    monkeypatch.setattr(type(pipeline(runner)), "__call__", note)
    with pytest.raises(Interrupted):
        run_checked(runner, TextToImageRequest(prompt="a cat"))
    assert (given["width"], given["height"]) == (family.side, family.side)
    assert given["num_inference_steps"] == family.steps
    if family.guidance == "guider":
        given["guider"] = given["of_the_guider"].config.guidance_scale
    keywords = {name: given[name] for name in (*KEYWORDS, "guider") if name in given}
    assert keywords == ({} if family.guidance is None else {family.guidance: family.scale})
    # FLUX.1-schnell was trained on prompts of 256 tokens.
    schnell = family.title == "FLUX.1-schnell"
    assert given.get("max_sequence_length") == (256 if schnell else None)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.guidance], ids=lambda family: family.title
)
def test_to_ask_for_the_default_guidance_is_the_same_as_to_say_nothing(
    family: Family, runner: ModelRunner
) -> None:
    assert pixels(run_small(runner, guidance_scale=family.scale)) == pixels(run_small(runner))


# -- what it takes and refuses --------------------------------------------------------------------


@each_family
def test_guidance_acts_or_is_refused(family: Family, runner: ModelRunner) -> None:
    if family.guidance is None:
        line = refused(runner, guidance_scale=4.0)
        assert line == f"guidance_scale: {model(runner).description.info.family} does not have it"
        return
    weak, strong = run_small(runner, guidance_scale=1.5), run_small(runner, guidance_scale=30.0)
    assert pixels(weak) != pixels(strong)


@each_family
def test_a_negative_prompt_acts_or_is_refused(family: Family, runner: ModelRunner) -> None:
    if not family.negative:
        line = refused(runner, negative_prompt="a dog")
        assert line == f"negative_prompt: {model(runner).description.info.family} does not have it"
        return
    guided = pixels(run_small(runner, guidance_scale=6.0))
    assert pixels(run_small(runner, guidance_scale=6.0, negative_prompt="a dog")) != guided


@each_family
def test_sizes_that_the_family_cannot_make_are_refused(family: Family, runner: ModelRunner) -> None:
    for name in ("width", "height"):
        line = refused(runner, **{name: 64 + family.multiple // 2})
        assert line == f"{name}: must be a multiple of {family.multiple}"
        sides = {"width": 2048, "height": 2048, name: 2048 + family.multiple}
        too_large = refused(runner, **sides)
        assert f"at most {LARGEST_AREA} pixels" in too_large
    runner.check(small_request(width=2048, height=2048))
    longest = family.largest or 4096
    runner.check(small_request(width=longest, height=64))
    if family.largest is not None:
        line = refused(runner, height=family.largest + family.multiple)
        assert line == f"height: must be at most {family.largest}"


@each_family
def test_the_fewest_steps_make_an_image_and_fewer_are_refused(
    family: Family, runner: ModelRunner
) -> None:
    run_small(runner, num_inference_steps=family.least)
    if family.least > 1:
        line = refused(runner, num_inference_steps=family.least - 1)
        assert line == f"num_inference_steps: must be at least {family.least}"


@each_family
def test_previews_are_small_images_that_change_nothing_or_are_refused(
    family: Family, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not family.previews:
        name = model(runner).description.info.family
        assert refused(runner, preview=True) == f"preview: {name} does not have it"
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
    assert len(previews) == 4  # not after the first step, and not of the image itself
    for preview in previews:
        with Image.open(io.BytesIO(preview)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 256
    assert pixels(output) == pixels(run_small(runner, num_inference_steps=6, num_images=2))


@each_family
def test_adapters_that_are_not_configured_are_refused(family: Family, runner: ModelRunner) -> None:
    assert refused(runner, adapters={"ink": 1.0}) == "adapters: there is no adapter ink"


# -- what has a model_index.json and is no family of this worker ----------------------------------


def cut_short(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def without_its_words(folder: Path) -> None:
    for file in (folder / "tokenizer").glob("*.json"):
        file.unlink()


def with_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


def with_a_scheduler_that_nobody_knows(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "NoSuchScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def of_the_class(name: str) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))

    return rewrite


FROM_IMAGES = "FluxImg2ImgPipeline does not generate images from a text alone"
VIDEO = "HunyuanVideoPipeline does not generate images from a text alone"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        pytest.param(of_the_class("FluxImg2ImgPipeline"), FROM_IMAGES, id="from images"),
        pytest.param(of_the_class("HunyuanVideoPipeline"), VIDEO, id="video"),
        pytest.param(cut_short, "cannot be loaded: ", id="weights cut short"),
        pytest.param(without_its_words, "tokenizer: its vocabulary is missing", id="no words"),
        pytest.param(with_a_config_that_is_no_json, "cannot be loaded: ", id="broken config"),
        pytest.param(with_a_scheduler_that_nobody_knows, "cannot be loaded: ", id="no class"),
    ],
)
def test_what_cannot_be_driven_fails_with_one_clear_line(
    spoil: Callable[[Path], None], line: str, own_folder: Folder
) -> None:
    folder = own_folder("flux")
    spoil(folder)
    runner = create_runner(Task.TEXT_TO_IMAGE, ModelConfig(model_id=str(folder)))
    with capture_logs(), pytest.raises(ModelUnavailable) as unavailable:
        runner.load()
    told = str(unavailable.value)
    assert told.startswith(f"flux: {line}")
    assert "\n" not in told
    assert str(folder.parent) not in told


# -- the document ---------------------------------------------------------------------------------


def row_of(family: Family) -> list[str]:
    """The row of a family as the document has it."""
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
