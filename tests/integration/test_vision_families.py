"""Families of vision-language models through the real from_pretrained path, and streamed texts.

These tests cover what depends on the family: images, cancellation, sampling and decoding. The tests
of requests to every model are in test_vision_language.py.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from consumer.ports.model import (
    GeneratedText,
    Interrupted,
    ModelUnavailable,
    RunnerOutput,
    UnsupportedParameter,
)
from consumer.runners import ModelConfig, ModelRunner, create_runner
from generation_contracts import ArtifactReference, ImageToTextRequest, Task
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

FAMILIES = ("qwen2_vl", "vision_language", "qwen3_vl", "llava")  # the second is a Qwen2.5-VL
EVERY = pytest.mark.parametrize("family", FAMILIES)
SOURCE = ArtifactReference(bucket="inputs", key="image.png")  # never read: images are given

FolderOf = Callable[[str], Path]
RunnerOf = Callable[[str], ModelRunner]


def image_of_a_circle(size: tuple[int, int] = (90, 60), colour: str = "red") -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, size[0] // 2, size[1] // 2), colour)
    return image


RED, BLUE = image_of_a_circle(), image_of_a_circle((64, 64), "blue")


@pytest.fixture(scope="module")
def folder_of(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Return a function that gives the read-only folder of a tiny model of a family."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family == "vision_language":
            return model_folder(family)
        if family not in folders:
            torch = importlib.import_module("torch")
            path = tmp_path_factory.mktemp("vision") / family
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                getattr(importlib.import_module("tests.support.tiny_vision"), family)(path)
            folders[family] = path
        return folders[family]

    return folder


@pytest.fixture(scope="module")
def runner_of(folder_of: FolderOf) -> Iterator[RunnerOf]:
    """Return a function that gives the shared loaded model of a family."""
    loaded: dict[str, ModelRunner] = {}

    def runner(family: str) -> ModelRunner:
        if family not in loaded:
            config = ModelConfig(model_id=str(folder_of(family)))
            loaded[family] = create_runner(Task.IMAGE_TO_TEXT, config)
            loaded[family].load()
        return loaded[family]

    yield runner
    for closing in loaded.values():
        closing.close()


def make_request(**fields: Any) -> ImageToTextRequest:
    return ImageToTextRequest(
        **{"prompt": "What is this?", "images": (SOURCE,), "max_new_tokens": 12, **fields}
    )


def generate(
    runner: ModelRunner,
    *images: Image.Image,
    on_text: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> RunnerOutput:
    request = make_request(**fields)
    runner.check(request)
    return run_model(
        runner,
        request,
        images or (RED,),
        on_text=on_text,
    )


def generate_text(runner: ModelRunner, *images: Image.Image, **fields: Any) -> GeneratedText:
    text = generate(runner, *images, **fields).text
    assert text is not None
    return text


def inner(runner: ModelRunner) -> Any:
    return runner._model


def pixel_values(runner: ModelRunner, *images: Image.Image) -> Any:
    """Return the pixel values that the model gets for images."""
    fitted = inner(runner)._budget.fit(images)
    return inner(runner)._inputs(("x", None), fitted)["pixel_values"]


# -- every family ---------------------------------------------------------------------------------


@EVERY
def test_a_family_reads_several_images_in_their_order(family: str, runner_of: RunnerOf) -> None:
    runner = runner_of(family)
    assert generate_text(runner, RED).completion_tokens == 12
    assert generate_text(runner, RED, BLUE).prompt_tokens > generate_text(runner, RED).prompt_tokens
    torch = importlib.import_module("torch")
    pixels = [pixel_values(runner, *images) for images in ((RED, BLUE), (RED,), (BLUE,))]
    # The text of random weights depends too little on the images.
    assert torch.equal(pixels[0], torch.cat(pixels[1:]))


@EVERY
def test_a_cancellation_stops_at_its_token_and_does_not_change_the_next_text(
    family: str, runner_of: RunnerOf
) -> None:
    runner = runner_of(family)
    expected = generate_text(runner, RED)
    for last in (1, 5):
        steps: list[int] = []
        with pytest.raises(Interrupted):
            run_model(
                runner,
                make_request(),
                [RED],
                on_step=lambda step, _, steps=steps: steps.append(step),  # type: ignore[misc]
                cancelled=lambda steps=steps, last=last: len(steps) == last,  # type: ignore[misc]
            )
        assert steps == list(range(1, last + 1))
    assert generate_text(runner, RED) == expected


@EVERY
def test_a_seed_determines_the_text_also_after_other_jobs(family: str, runner_of: RunnerOf) -> None:
    runner = runner_of(family)
    alone = generate_text(runner, temperature=1.0, seed=5)
    assert alone.seed == 5
    generate_text(runner, BLUE, temperature=2.0, seed=8, max_new_tokens=3)
    generate_text(runner, BLUE)
    assert generate_text(runner, temperature=1.0, seed=5) == alone
    assert generate_text(runner, temperature=1.0, seed=6).text != alone.text


def test_only_a_sampled_text_reports_a_seed(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    sampled = generate_text(runner, temperature=1.0)
    assert sampled.seed is not None
    assert generate_text(runner, temperature=1.0, seed=sampled.seed) == sampled
    assert generate_text(runner).seed is None
    assert generate_text(runner, seed=3).seed is None


@pytest.mark.parametrize(
    ("family", "tile"), [("qwen2_vl", 28), ("vision_language", 28), ("qwen3_vl", 32)]
)
def test_a_large_image_is_reduced_to_the_pixel_budget(
    family: str, tile: int, folder_of: FolderOf, load: Load
) -> None:
    budget = 40 * tile**2  # pixels, for 40 tokens
    runner = load(folder_of(family), Task.IMAGE_TO_TEXT, max_image_pixels=budget)
    alone = generate_text(runner, Image.new("RGB", (6 * tile, 6 * tile))).prompt_tokens
    assert generate_text(runner, Image.new("RGB", (2_000, 2_000))).prompt_tokens == alone
    small = generate_text(runner, Image.new("RGB", (5 * tile, 5 * tile))).prompt_tokens
    assert alone - small == 6 * 6 - 5 * 5


def test_images_for_a_family_with_a_fixed_size_are_not_reduced(runner_of: RunnerOf) -> None:
    runner = runner_of("llava")
    large = Image.new("RGB", (600, 400))
    (fitted,) = inner(runner)._budget.fit([large])
    assert fitted.size == large.size
    assert generate_text(runner, large).prompt_tokens == generate_text(runner, RED).prompt_tokens


def test_a_family_with_a_fixed_size_refuses_very_narrow_images(runner_of: RunnerOf) -> None:
    """Its processor would first enlarge the shorter side: 10,000x1 to a billion pixels."""
    with pytest.raises(UnsupportedParameter, match=r"images\.0: one side is more than 200 times"):
        generate(runner_of("llava"), Image.new("RGB", (10_000, 1)))


def test_a_longest_edge_in_pixels_is_not_used_as_a_pixel_budget() -> None:
    processor = importlib.import_module("transformers").SmolVLMImageProcessor()
    budget = importlib.import_module("consumer.runners.image_to_text.image_budget").ImageBudget.of(
        processor, 240_000
    )
    assert processor.size.longest_edge < 240_000
    (fitted,) = budget.fit([Image.new("RGB", (600, 400))])
    assert fitted.size == (600, 400)
    (smaller,) = budget.fit([Image.new("RGB", (1_200, 800))])
    assert smaller.size == (600, 400)


def test_a_first_token_in_the_template_is_not_added_twice(runner_of: RunnerOf) -> None:
    runner = runner_of("llava")
    tokens = inner(runner)._inputs(("x", None), [RED])["input_ids"][0].tolist()
    first = inner(runner)._processor.tokenizer.bos_token_id
    assert (tokens[0], tokens.count(first)) == (first, 1)


# -- reported parameters and defaults -------------------------------------------------------------


def test_the_output_reports_its_parameters(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    greedy = {
        "max_new_tokens": 12,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
    }
    assert generate(runner).parameters == greedy
    asked_for = {"temperature": 0.5, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.5}
    assert generate(runner, **asked_for).parameters == {"max_new_tokens": 12, **asked_for}
    default = inner(runner).description.defaults["max_new_tokens"]
    assert generate(runner, max_new_tokens=None).parameters["max_new_tokens"] == default


def test_configured_defaults_replace_the_defaults_of_the_model(
    runner_of: RunnerOf, folder_of: FolderOf, load: Load
) -> None:
    defaults = {"max_new_tokens": 5, "temperature": 1.0}
    runner = load(folder_of("vision_language"), Task.IMAGE_TO_TEXT, defaults=defaults)
    described = inner(runner).description.defaults
    assert described.items() >= defaults.items()
    text = generate_text(runner, max_new_tokens=None, seed=4)
    assert text.completion_tokens == 5
    other = generate_text(runner_of("vision_language"), max_new_tokens=5, temperature=1.0, seed=4)
    assert text == other
    # The parameters of a request replace the defaults.
    assert generate_text(runner, temperature=0.0).completion_tokens == 12


def test_an_invalid_default_is_refused_with_the_name_of_the_setting(
    folder_of: FolderOf, load: Load
) -> None:
    with pytest.raises(ModelUnavailable, match=r"^MODEL_DEFAULTS: top_p: "):
        load(folder_of("vision_language"), Task.IMAGE_TO_TEXT, defaults={"top_p": 2.0})


# -- streamed texts -------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_parts_of_a_streamed_text_are_the_text(
    family: str, seed: int, runner_of: RunnerOf
) -> None:
    parts: list[str] = []
    options = {"temperature": 2.0, "top_k": 1000, "seed": seed, "max_new_tokens": 40}
    text = generate_text(runner_of(family), on_text=parts.append, stream=True, **options)
    assert "".join(parts) == text.text
    assert len(parts) > 5
    assert "" not in parts
    assert text == generate_text(runner_of(family), **options)  # streaming does not change the text


def test_each_token_of_a_streamed_text_is_published_in_its_step(runner_of: RunnerOf) -> None:
    seen: list[tuple[int, str]] = []
    steps: list[int] = []
    run_model(
        runner_of("vision_language"),
        make_request(stream=True),
        [RED],
        on_step=lambda step, _: steps.append(step),
        on_text=lambda text: seen.append((steps[-1], text)),
    )
    assert [step for step, _ in seen] == list(range(1, 13))  # each token is a letter
    assert {len(text) for _, text in seen} == {1}


def test_no_part_is_published_after_a_cancellation(runner_of: RunnerOf) -> None:
    parts: list[str] = []
    with pytest.raises(Interrupted):
        run_model(
            runner_of("vision_language"),
            make_request(stream=True),
            [RED],
            cancelled=lambda: len(parts) == 3,
            on_text=parts.append,
        )
    assert len(parts) <= 4


@pytest.fixture
def deltas() -> Any:
    """Return the module that decodes tokens one by one; it imports transformers."""
    return importlib.import_module("consumer.runners.image_to_text.deltas")


def put_tokens(growing: Any, prompt: Sequence[int], tokens: Iterable[int]) -> None:
    """Put a prompt and then single tokens, as transformers does."""
    torch = importlib.import_module("torch")
    growing.put(torch.tensor([prompt]))
    for token in tokens:
        growing.put(torch.tensor([token]))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("naïve — 灯台 маяк \U0001f4a1\U0001f1eb\U0001f1f7", id="scripts"),
        pytest.param("  indented\n    lines\n\n and a blank ", id="white space"),
        pytest.param("and \u200d joined", id="joiner"),
        pytest.param("\U0001f4a1", id="emoji"),
    ],
)
def test_an_incomplete_character_is_not_published(
    family: str, text: str, runner_of: RunnerOf, deltas: Any
) -> None:
    tokenizer = inner(runner_of(family))._processor.tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    control = tokenizer.eos_token_id
    parts: list[str] = []
    growing = deltas.Deltas(tokenizer, parts.append)
    put_tokens(growing, [control, control], [*tokens, control])
    whole = deltas.decode_text(tokenizer, tokens)
    assert whole.strip() == text.strip()
    assert "".join(parts) == whole
    assert not any("\ufffd" in part for part in parts)
    growing.finish(whole)
    assert "".join(parts) == whole


def test_a_token_that_the_tokenizer_does_not_have_adds_nothing(
    runner_of: RunnerOf, deltas: Any
) -> None:
    """A model can generate such a token if it has more rows than its tokenizer has tokens."""
    tokenizer = inner(runner_of("qwen2_vl"))._processor.tokenizer
    parts: list[str] = []
    tokens = tokenizer("a", add_special_tokens=False)["input_ids"]
    put_tokens(deltas.Deltas(tokenizer, parts.append), [0], [*tokens, len(tokenizer) + 9])
    assert parts == ["a"]


def test_an_incomplete_last_character_is_published_at_the_end(
    runner_of: RunnerOf, deltas: Any
) -> None:
    tokenizer = inner(runner_of("qwen2_vl"))._processor.tokenizer
    tokens = tokenizer("a\U0001f4a1", add_special_tokens=False)["input_ids"][:-1]
    parts: list[str] = []
    growing = deltas.Deltas(tokenizer, parts.append)
    put_tokens(growing, [0], tokens)
    assert parts == ["a"]
    growing.finish(whole := deltas.decode_text(tokenizer, tokens))
    assert "".join(parts) == whole == "a\ufffd"
