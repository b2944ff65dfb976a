"""Families of vision-language models through the real from_pretrained path, and texts as they grow.

What every model does with requests is in test_vision_language.py; here is what a family could make
different: how it reads images, stops, draws by chance, and is decoded.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
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


def drawing(size: tuple[int, int] = (90, 60), colour: str = "red") -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, size[0] // 2, size[1] // 2), colour)
    return image


RED, BLUE = drawing(), drawing((64, 64), "blue")


@pytest.fixture(scope="module")
def folder_of(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """The folder with a tiny model of a family; not to be changed."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family == "vision_language":
            return model_folder(family)
        if family not in made:
            torch = importlib.import_module("torch")
            place = tmp_path_factory.mktemp("vision") / family
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                getattr(importlib.import_module("tests.support.tiny_vision"), family)(place)
            made[family] = place
        return made[family]

    return folder


@pytest.fixture(scope="module")
def runner_of(folder_of: FolderOf) -> Iterator[RunnerOf]:
    """A loaded model of a family, one for all tests."""
    loaded: dict[str, ModelRunner] = {}

    def runner(family: str) -> ModelRunner:
        if family not in loaded:
            config = ModelConfig(model_id=str(folder_of(family)))
            made = create_runner(Task.IMAGE_TO_TEXT, config)
            made.load()
            loaded[family] = made
        return loaded[family]

    yield runner
    for made in loaded.values():
        made.close()


def asked(**fields: Any) -> ImageToTextRequest:
    return ImageToTextRequest(
        **{"prompt": "What is this?", "images": (SOURCE,), "max_new_tokens": 12, **fields}
    )


def output(
    runner: ModelRunner,
    *images: Image.Image,
    on_text: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> RunnerOutput:
    request = asked(**fields)
    runner.check(request)
    return run_model(
        runner,
        request,
        images or (RED,),
        on_text=on_text,
    )


def written(runner: ModelRunner, *images: Image.Image, **fields: Any) -> GeneratedText:
    text = output(runner, *images, **fields).text
    assert text is not None
    return text


def inner(runner: ModelRunner) -> Any:
    return runner._model


def read(runner: ModelRunner, *images: Image.Image) -> Any:
    """What the model sees of images, in a row."""
    fitted = inner(runner)._budget.fit(images)
    return inner(runner)._inputs(("x", None), fitted)["pixel_values"]


# -- every family ---------------------------------------------------------------------------------


@EVERY
def test_a_family_writes_about_one_image_or_several_in_their_order(
    family: str, runner_of: RunnerOf
) -> None:
    runner = runner_of(family)
    assert written(runner, RED).completion_tokens == 12
    assert written(runner, RED, BLUE).prompt_tokens > written(runner, RED).prompt_tokens
    torch = importlib.import_module("torch")
    pixels = [read(runner, *images) for images in ((RED, BLUE), (RED,), (BLUE,))]
    assert torch.equal(pixels[0], torch.cat(pixels[1:]))  # random weights make little of images


@EVERY
def test_a_family_stops_at_the_very_token_and_the_next_text_is_unharmed(
    family: str, runner_of: RunnerOf
) -> None:
    runner = runner_of(family)
    undisturbed = written(runner, RED)
    for last in (1, 5):
        steps: list[int] = []
        with pytest.raises(Interrupted):
            run_model(
                runner,
                asked(),
                [RED],
                on_step=lambda step, _, steps=steps: steps.append(step),  # type: ignore[misc]
                cancelled=lambda steps=steps, last=last: len(steps) == last,  # type: ignore[misc]
            )
        assert steps == list(range(1, last + 1))
    assert written(runner, RED) == undisturbed


@EVERY
def test_a_seed_writes_one_text_alone_or_after_others(family: str, runner_of: RunnerOf) -> None:
    runner = runner_of(family)
    alone = written(runner, temperature=1.0, seed=5)
    assert alone.seed == 5
    written(runner, BLUE, temperature=2.0, seed=8, max_new_tokens=3)
    written(runner, BLUE)
    assert written(runner, temperature=1.0, seed=5) == alone
    assert written(runner, temperature=1.0, seed=6).text != alone.text


def test_a_text_tells_its_seed_only_if_it_was_drawn_by_chance(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    drawn = written(runner, temperature=1.0)
    assert drawn.seed is not None
    assert written(runner, temperature=1.0, seed=drawn.seed) == drawn
    assert written(runner).seed is None
    assert written(runner, seed=3).seed is None


@pytest.mark.parametrize(
    ("family", "tile"), [("qwen2_vl", 28), ("vision_language", 28), ("qwen3_vl", 32)]
)
def test_a_large_image_is_read_within_the_workers_budget(
    family: str, tile: int, folder_of: FolderOf, load: Load
) -> None:
    budget = 40 * tile**2  # pixels, for 40 tokens
    runner = load(folder_of(family), Task.IMAGE_TO_TEXT, max_image_pixels=budget)
    alone = written(runner, Image.new("RGB", (6 * tile, 6 * tile))).prompt_tokens
    assert written(runner, Image.new("RGB", (2_000, 2_000))).prompt_tokens == alone
    small = written(runner, Image.new("RGB", (5 * tile, 5 * tile))).prompt_tokens
    assert alone - small == 6 * 6 - 5 * 5


def test_a_family_with_one_size_of_images_is_given_them_whole(runner_of: RunnerOf) -> None:
    runner = runner_of("llava")
    large = Image.new("RGB", (600, 400))
    (fitted,) = inner(runner)._budget.fit([large])
    assert fitted.size == large.size
    assert written(runner, large).prompt_tokens == written(runner, RED).prompt_tokens


def test_a_family_with_one_size_of_images_refuses_very_narrow_ones(runner_of: RunnerOf) -> None:
    """Its processor would first enlarge the shorter side: 10,000x1 to a billion pixels."""
    with pytest.raises(UnsupportedParameter, match=r"images\.0: one side is more than 200 times"):
        output(runner_of("llava"), Image.new("RGB", (10_000, 1)))


def test_an_edge_that_is_a_length_is_not_taken_for_a_number_of_pixels() -> None:
    processor = importlib.import_module("transformers").SmolVLMImageProcessor()
    budget = importlib.import_module("consumer.runners.image_to_text.image_budget").ImageBudget.of(
        processor, 240_000
    )
    assert processor.size.longest_edge < 240_000
    (fitted,) = budget.fit([Image.new("RGB", (600, 400))])
    assert fitted.size == (600, 400)
    (smaller,) = budget.fit([Image.new("RGB", (1_200, 800))])
    assert smaller.size == (600, 400)


def test_a_first_token_that_the_template_writes_is_written_once(runner_of: RunnerOf) -> None:
    runner = runner_of("llava")
    tokens = inner(runner)._inputs(("x", None), [RED])["input_ids"][0].tolist()
    first = inner(runner)._processor.tokenizer.bos_token_id
    assert (tokens[0], tokens.count(first)) == (first, 1)


# -- what was used --------------------------------------------------------------------------------


def test_the_output_tells_what_it_was_made_with(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    greedy = {
        "max_new_tokens": 12,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
    }
    assert output(runner).parameters == greedy
    asked_for = {"temperature": 0.5, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.5}
    assert output(runner, **asked_for).parameters == {"max_new_tokens": 12, **asked_for}
    own = inner(runner).description.defaults["max_new_tokens"]
    assert output(runner, max_new_tokens=None).parameters["max_new_tokens"] == own


def test_defaults_of_the_worker_come_before_the_models_own(
    runner_of: RunnerOf, folder_of: FolderOf, load: Load
) -> None:
    defaults = {"max_new_tokens": 5, "temperature": 1.0}
    runner = load(folder_of("vision_language"), Task.IMAGE_TO_TEXT, defaults=defaults)
    described = inner(runner).description.defaults
    assert described.items() >= defaults.items()
    text = written(runner, max_new_tokens=None, seed=4)
    assert text.completion_tokens == 5
    other = written(runner_of("vision_language"), max_new_tokens=5, temperature=1.0, seed=4)
    assert text == other
    assert written(runner, temperature=0.0).completion_tokens == 12  # the request comes first


def test_a_default_that_cannot_be_is_told_by_the_name_of_the_setting(
    folder_of: FolderOf, load: Load
) -> None:
    with pytest.raises(ModelUnavailable, match=r"^MODEL_DEFAULTS: top_p: "):
        load(folder_of("vision_language"), Task.IMAGE_TO_TEXT, defaults={"top_p": 2.0})


# -- refused at load ------------------------------------------------------------------------------


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a folder with other values in its config.json."""
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(content | config))
    return to


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0].content[-1].text }}", "no place for images"),
        ("{{ raise_exception('not so') }}", "cannot be loaded: not so"),
        ("{{ messages[0].content + '' }}", "cannot be loaded: "),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_told_at_load(
    template: str, says: str, folder_of: FolderOf, load: Load, tmp_path: Path
) -> None:
    folder = changed(folder_of("vision_language"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelUnavailable, match=says) as refused:
        load(folder, Task.IMAGE_TO_TEXT)
    assert str(refused.value).startswith("model: ")
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_a_family_whose_texts_come_from_a_decoder_of_their_own_is_told_at_load(
    folder_of: FolderOf, load: Load, tmp_path: Path
) -> None:
    # What it writes has no prompt to cut off, and would be cut off itself.
    folder = changed(folder_of("vision_language"), tmp_path / "model", is_encoder_decoder=True)
    with pytest.raises(ModelUnavailable, match="model: qwen2_5_vl is an encoder-decoder model"):
        load(folder, Task.IMAGE_TO_TEXT)


# -- a text as it grows ---------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_parts_of_a_text_are_the_text(family: str, seed: int, runner_of: RunnerOf) -> None:
    parts: list[str] = []
    options = {"temperature": 2.0, "top_k": 1000, "seed": seed, "max_new_tokens": 40}
    text = written(runner_of(family), on_text=parts.append, stream=True, **options)
    assert "".join(parts) == text.text
    assert len(parts) > 5
    assert "" not in parts
    assert text == written(runner_of(family), **options)  # whether anybody reads along or not


def test_a_text_grows_with_its_tokens(runner_of: RunnerOf) -> None:
    seen: list[tuple[int, str]] = []
    steps: list[int] = []
    run_model(
        runner_of("vision_language"),
        asked(stream=True),
        [RED],
        on_step=lambda step, _: steps.append(step),
        on_text=lambda text: seen.append((steps[-1], text)),
    )
    assert [step for step, _ in seen] == list(range(1, 13))  # each token is a letter
    assert {len(text) for _, text in seen} == {1}


def test_no_part_comes_after_a_run_has_failed_or_stopped(runner_of: RunnerOf) -> None:
    parts: list[str] = []
    with pytest.raises(Interrupted):
        run_model(
            runner_of("vision_language"),
            asked(stream=True),
            [RED],
            cancelled=lambda: len(parts) == 3,
            on_text=parts.append,
        )
    assert len(parts) <= 4


TEXTS = (
    "naïve — 灯台 маяк \U0001f4a1\U0001f1eb\U0001f1f7",
    "  indented\n    lines\n\n and a blank ",
    "and \u200d joined",
    "\U0001f4a1",
)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_told_before_it_is_whole(
    family: str, text: str, runner_of: RunnerOf
) -> None:
    deltas = importlib.import_module("consumer.runners.image_to_text.deltas")
    torch = importlib.import_module("torch")
    tokenizer = inner(runner_of(family))._processor.tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    control = tokenizer.eos_token_id
    parts: list[str] = []
    growing = deltas.Deltas(tokenizer, parts.append)
    growing.put(torch.tensor([[control, control]]))  # the prompt
    for token in (*tokens, control):
        growing.put(torch.tensor([token]))
    whole = deltas.decode_text(tokenizer, tokens)
    assert whole.strip() == text.strip()
    assert "".join(parts) == whole
    assert not any("\ufffd" in part for part in parts)
    growing.finish(whole)
    assert "".join(parts) == whole


def test_a_token_that_the_tokenizer_does_not_have_adds_nothing(runner_of: RunnerOf) -> None:
    """Models have some rows more than there are tokens, and may draw one of them."""
    deltas = importlib.import_module("consumer.runners.image_to_text.deltas")
    torch = importlib.import_module("torch")
    tokenizer = inner(runner_of("qwen2_vl"))._processor.tokenizer
    parts: list[str] = []
    growing = deltas.Deltas(tokenizer, parts.append)
    growing.put(torch.tensor([[0]]))
    for token in (*tokenizer("a", add_special_tokens=False)["input_ids"], len(tokenizer) + 9):
        growing.put(torch.tensor([token]))
    assert parts == ["a"]


def test_the_rest_of_a_text_that_ends_within_a_character_is_told_at_the_end(
    runner_of: RunnerOf,
) -> None:
    deltas = importlib.import_module("consumer.runners.image_to_text.deltas")
    torch = importlib.import_module("torch")
    tokenizer = inner(runner_of("qwen2_vl"))._processor.tokenizer
    tokens = tokenizer("a\U0001f4a1", add_special_tokens=False)["input_ids"][:-1]
    parts: list[str] = []
    growing = deltas.Deltas(tokenizer, parts.append)
    growing.put(torch.tensor([[0]]))
    for token in tokens:
        growing.put(torch.tensor([token]))
    assert parts == ["a"]
    growing.finish(whole := deltas.decode_text(tokenizer, tokens))
    assert "".join(parts) == whole == "a\ufffd"
