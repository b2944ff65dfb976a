"""Several requests in one run of a model: what goes together, and that each gets what is its own.

Each output is compared with the one that its request gets alone, in every family that is run in
batches. What the numbers were: `consumer/runners/text_to_image/batch.py` and its brother for texts.
"""

# mypy: allow-untyped-calls

import gc
import importlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from consumer.ports.model import (
    GeneratedText,
    Interrupted,
    OutOfMemory,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.image_to_text import batch as text_batch
from consumer.runners.text_to_image import batch as image_batch
from consumer.runners.text_to_image.memory_guard import min_decode_bytes
from consumer.runners.text_to_image.safety import load_checker
from generation_contracts import ArtifactReference, ImageToTextRequest, Request, Task
from tests.support.family_table import FAMILIES
from tests.support.image_runs import model, pipeline, pixels, run_checked, small_request
from tests.support.model_runs import run_request
from tests.support.tiny_adapters import save_adapter
from tests.support.tiny_models import Folder, Load

Shared = Callable[..., ModelRunner]

# How far an image of 64x64 may be from the one that its request gets alone: 8 of its 12,288 values
# may differ by 1. The most that was seen among 40 images of each family is 4 values.
MOST_VALUES = 8

LONG = "a very long and winding prompt about a large red dog that runs along the beach"
TOO_LONG = "endless " * 500  # for every encoder

each_family = pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(f.name, f.options, id=f.title) for f in FAMILIES),
        pytest.param("pixart", {}, id="PixArt, whose callback is the old one"),
    ],
)


@dataclass
class Asking:
    """Whoever asks for one thing, and what is told in the meantime.

    Attributes:
        leaves_at: The step at which the request is cancelled; 0: before the first.
    """

    request: Request
    images: Sequence[Image.Image] = ()
    leaves_at: int | None = None
    steps: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> RunRequest:
        return run_request(
            self.request,
            self.images,
            on_step=lambda *step: self.steps.append(step),
            cancelled=lambda: len(self.steps) == self.leaves_at,
        )


def together(runner: ModelRunner, *asking: Asking) -> list[RunnerOutput | None]:
    keys = {runner.batch_key(one.request) for one in asking}
    assert None not in keys
    assert len(keys) == 1
    return [*runner.run([one.run() for one in asking])]


def all_of(outputs: Sequence[RunnerOutput | None]) -> list[RunnerOutput]:
    there = [output for output in outputs if output is not None]
    assert len(there) == len(outputs)
    return there


# -- images: what each request gets -------------------------------------------------------------


def distance(one: RunnerOutput, other: RunnerOutput) -> int:
    """How many values of the images differ; a large number where one does so by more than 1."""
    most = 0
    for left, right in zip(one.images, other.images, strict=True):
        differences = np.abs(np.asarray(left.image, int) - np.asarray(right.image, int))
        most = max(most, int((differences > 0).sum()), 10_000 * int((differences > 1).any()))
    return most


def same_but_for_rounding(one: RunnerOutput, other: RunnerOutput) -> None:
    assert distance(one, other) <= MOST_VALUES
    assert [image.seed for image in one.images] == [image.seed for image in other.images]
    assert (one.parameters, one.warnings) == (other.parameters, other.warnings)


def same_as_alone(runner: ModelRunner, *asking: Asking) -> list[RunnerOutput]:
    """Run requests together, and compare each with the run that it gets alone.

    Returns:
        The outputs of the runs alone.
    """
    outputs = all_of(together(runner, *asking))
    alone = [run_checked(runner, one.request) for one in asking]
    for output, single in zip(outputs, alone, strict=True):
        same_but_for_rounding(output, single)
    return alone


@each_family
def test_each_request_gets_the_images_that_it_would_get_alone(
    name: str, options: dict[str, Any], shared_runner: Shared
) -> None:
    asking = [
        Asking(small_request(prompt=prompt, seed=seed))
        for prompt, seed in (("a cat", 7), (LONG, 90), ("sea", 7))
    ]
    alone = same_as_alone(shared_runner(name, **options), *asking)
    assert distance(alone[0], alone[2]) > MOST_VALUES  # another prompt would have been seen
    assert [one.steps for one in asking] == [[(1, 3), (2, 3), (3, 3)]] * 3


@each_family
def test_images_prompts_and_cuts_stay_with_their_request(
    name: str, options: dict[str, Any], shared_runner: Shared
) -> None:
    # With a list of prompts and `num_images_per_prompt` three families mix up their masks.
    runner = shared_runner(name, **options)
    fields: list[dict[str, Any]] = [{}, {}, {}]
    has_negative = "negative_prompt" in model(runner).description.parameters
    if has_negative:
        negative = ["dark", "ugly, blurred, with many more words than the others have", TOO_LONG]
        fields = [{"guidance_scale": 4.0, "negative_prompt": text} for text in negative]
    asking = [
        Asking(small_request(prompt=prompt, seed=seed, num_images=2, **more))
        for prompt, seed, more in zip(
            ("a cat", TOO_LONG, "the sea"), (7, 2**32 - 1, 9), fields, strict=True
        )
    ]
    alone = same_as_alone(runner, *asking)
    assert [bool(output.warnings) for output in alone] == [False, True, has_negative]


def test_words_in_quotes_go_with_words_in_quotes(shared_runner: Shared) -> None:
    # HunyuanImage guides all images of a call otherwise where one of them has such words.
    runner = shared_runner("hunyuan_image")
    quoted, plain = small_request(prompt='a sign: "open"'), small_request(prompt="a sign")
    negated = small_request(prompt="a sign", negative_prompt='"shut"')
    assert len({runner.batch_key(r) for r in (quoted, plain, negated)}) == 3
    asking = [Asking(quoted), Asking(small_request(prompt="'a' and “b”: " + TOO_LONG, seed=9))]
    same_as_alone(runner, *asking)


def test_the_demonstration_model_draws_the_same_in_batches() -> None:
    runner = create_runner(Task.TEXT_TO_IMAGE, ModelConfig())
    runner.load()
    prompts = ["a red circle", "a large blue heart on a yellow background", "a star", "a cross"]
    asking = [
        Asking(small_request(prompt=prompt, seed=seed, num_inference_steps=None))
        for seed, prompt in enumerate(prompts)
    ]
    same_as_alone(runner, *asking)
    runner.close()


def test_flags_and_what_is_told_of_them_are_each_requests_own(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("hunyuan_dit")
    flags = [False, False, True, False]
    monkeypatch.setattr(pipeline(runner), "run_safety_checker", lambda image, *_: (image, flags))
    asking = [Asking(small_request(num_images=2)), Asking(small_request(num_images=2, seed=9))]
    first, second = all_of(together(runner, *asking))
    assert [image.flagged for image in (*first.images, *second.images)] == flags
    assert first.warnings == ()
    assert second.warnings == ("the model's safety checker blanked images: 1",)


def test_the_operators_checker_judges_each_request_by_itself(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("stable_diffusion_3")
    checker = load_checker("tests.support.checkers:flags_the_second")
    monkeypatch.setattr(runner._model, "_checker", checker)
    asking = [Asking(small_request(num_images=2)), Asking(small_request(num_images=2, seed=9))]
    for output in all_of(together(runner, *asking)):
        assert [image.flagged for image in output.images] == [False, True]


def test_adapters_are_in_use_for_the_whole_batch_and_not_afterwards(
    model_folder: Folder, shared_runner: Shared, load: Load, tmp_path: Path
) -> None:
    plain = shared_runner("stable_diffusion_3")
    file = save_adapter(pipeline(plain), tmp_path)
    runner = load(model_folder("stable_diffusion_3"), adapters={"ink": str(file)})
    asking = [Asking(small_request(prompt=p, adapters={"ink": 0.5})) for p in ("a cat", "a dog")]
    same_as_alone(runner, *asking)
    assert pixels(run_checked(runner, small_request())) == pixels(
        run_checked(plain, small_request())
    )


# -- images: what goes together -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "goes_along"),
    [
        ({"prompt": "another", "seed": 3, "output_format": "webp", "metadata": {"a": "b"}}, True),
        ({"guidance_scale": 7.0, "adapters": {"ink": 0.0}}, True),  # as where nothing is said
        ({"negative_prompt": " "}, True),
        ({"width": 96}, False),
        ({"height": 96}, False),
        ({"num_inference_steps": 4}, False),
        ({"guidance_scale": 7.5}, False),
        ({"num_images": 2}, False),
        ({"negative_prompt": "dark"}, False),
        ({"adapters": {"ink": 1.0}}, False),
    ],
)
def test_requests_go_together_if_what_a_call_has_in_common_is_the_same(
    fields: dict[str, Any], goes_along: bool, shared_runner: Shared
) -> None:
    runner = shared_runner("stable_diffusion_3")
    assert (
        runner.batch_key(small_request(**fields)) == runner.batch_key(small_request())
    ) is goes_along


def test_guiders_are_compared_too(shared_runner: Shared) -> None:
    # The scale of a guider is no argument of the call.
    runner = shared_runner("hunyuan_image")
    assert runner.batch_key(small_request()) == runner.batch_key(small_request(guidance_scale=3.5))
    assert runner.batch_key(small_request()) != runner.batch_key(small_request(guidance_scale=4.0))


def test_weights_of_adapters_are_compared_in_any_order(shared_runner: Shared) -> None:
    runner = shared_runner("stable_diffusion_3")
    keys = {
        runner.batch_key(small_request(adapters=adapters))
        for adapters in ({"a": 1, "b": 0.5}, {"b": 0.5, "a": 1.0}, {"b": 0.5, "a": 1, "c": 0})
    }
    assert len(keys) == 1
    assert runner.batch_key(small_request(adapters={"a": 1, "b": 0.4})) not in keys


def test_who_wants_previews_runs_alone(shared_runner: Shared) -> None:
    assert shared_runner("stable_diffusion_3").batch_key(small_request(preview=True)) is None


def test_a_family_that_was_not_measured_runs_alone(
    shared_runner: Shared, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    folder = model_folder("pixart")
    index = json.loads((folder / "model_index.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for part in folder.iterdir():
        (other / part.name).symlink_to(part)
    (other / "model_index.json").unlink()
    index["_class_name"] = "PixArtAlphaPipeline"
    (other / "model_index.json").write_text(json.dumps(index))
    assert load(other).batch_key(small_request()) is None
    assert shared_runner("pixart").batch_key(small_request()) is not None


def test_every_measured_family_is_measured_here(shared_runner: Shared) -> None:
    assert {family.pipeline for family in FAMILIES} | {"PixArtSigmaPipeline"} == (
        image_batch.MEASURED
    )


@pytest.mark.parametrize(
    ("name", "config", "alone"),
    [
        ("flux", {}, False),
        ("flux", {"attention": "native"}, False),
        ("qwen_image", {"attention": "native"}, True),
        ("flux", {"step_cache": 0.1}, True),
        ("flux", {"quantization": "bitsandbytes-8bit"}, True),
        ("flux", {"quantization": "torchao-int8"}, False),
    ],
)
def test_options_by_which_neighbours_would_change_an_image_make_each_run_alone(
    name: str, config: dict[str, Any], alone: bool, shared_runner: Shared
) -> None:
    runner = shared_runner(name)
    keys = image_batch.BatchKeys(pipeline(runner), model(runner)._parameters, ModelConfig(**config))
    assert (keys.key(small_request()) is None) is alone


def test_with_a_step_cache_each_runs_alone(model_folder: Folder, load: Load) -> None:
    runner = load(model_folder("flux", blocks=2), step_cache=0.1)
    assert runner.batch_key(small_request()) is None


# -- images: who leaves, and what fails ---------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion_3", "pixart"])  # both kinds of callbacks
def test_who_is_cancelled_leaves_and_the_others_go_on(name: str, shared_runner: Shared) -> None:
    runner = shared_runner(name)
    undisturbed = all_of(
        together(runner, *(Asking(small_request(seed=seed)) for seed in (1, 2, 3)))
    )
    asking = [Asking(small_request(seed=seed)) for seed in (1, 2, 3)]
    asking[1].leaves_at = 2
    first, second, third = together(runner, *asking)
    assert second is None
    assert asking[1].steps == [(1, 3), (2, 3)]
    for output, before, one in (
        (first, undisturbed[0], asking[0]),
        (third, undisturbed[2], asking[2]),
    ):
        assert output is not None
        assert pixels(output) == pixels(before)
        assert one.steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "pixart"])
def test_when_all_have_left_the_run_stops_at_that_step(name: str, shared_runner: Shared) -> None:
    runner = shared_runner(name)
    undisturbed = pixels(run_checked(runner, small_request()))
    asking = [
        Asking(small_request(seed=1), leaves_at=2),
        Asking(small_request(seed=2), leaves_at=1),
    ]
    with pytest.raises(Interrupted):
        together(runner, *asking)
    assert [len(one.steps) for one in asking] == [2, 1]
    assert pixels(run_checked(runner, small_request())) == undisturbed


def test_who_was_cancelled_before_is_not_made(shared_runner: Shared) -> None:
    runner = shared_runner("stable_diffusion_3")
    decoded: list[int] = []
    hook = pipeline(runner).vae.decoder.register_forward_pre_hook(
        lambda _, inputs: decoded.append(len(inputs[0]))
    )
    asking = [Asking(small_request(seed=seed)) for seed in (1, 2, 3)]
    asking[0].leaves_at = asking[2].leaves_at = 0
    outputs = together(runner, *asking)
    with pytest.raises(Interrupted):
        together(runner, asking[0], asking[2])
    hook.remove()
    assert decoded == [1]
    assert outputs[0] is outputs[2] is None
    assert outputs[1] is not None
    assert pixels(outputs[1]) == pixels(run_checked(runner, small_request(seed=2)))
    assert (asking[0].steps, asking[2].steps) == ([], [])


def test_more_images_than_can_be_decoded_at_once_are_not_begun(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("stable_diffusion_3")
    least = min_decode_bytes(pipeline(runner), images=4, width=64, height=64)
    assert least is not None
    asking = [Asking(small_request(num_images=2)), Asking(small_request(num_images=2, seed=9))]
    monkeypatch.setattr(runner._model, "_free_bytes", lambda _: least - 1)
    with pytest.raises(OutOfMemory) as full:
        together(runner, *asking)
    assert full.value.tried == ()
    assert asking[0].steps == asking[1].steps == []
    monkeypatch.setattr(runner._model, "_free_bytes", lambda _: least)
    assert [output.warnings for output in all_of(together(runner, *asking))] == [(), ()]


def test_a_batch_that_fails_keeps_nothing_and_leaves_the_model_as_it_was(
    shared_runner: Shared,
) -> None:
    runner = shared_runner("stable_diffusion_3")
    before = pixels(run_checked(runner, small_request()))
    seen: list[weakref.ref[torch.Tensor]] = []

    def fail(_: Any, latents: tuple[torch.Tensor, ...]) -> None:
        seen.append(weakref.ref(latents[0]))
        raise torch.OutOfMemoryError("no more")

    hook = pipeline(runner).vae.decoder.register_forward_pre_hook(fail)
    gc.disable()
    try:
        with pytest.raises(OutOfMemory) as failed:
            together(runner, Asking(small_request()), Asking(small_request(seed=9)))
        assert seen[0]() is None
    finally:
        gc.enable()
        hook.remove()
    assert failed.value.__context__ is None
    assert pixels(run_checked(runner, small_request())) == before


# -- texts: what each request gets ----------------------------------------------------------------

SOURCE = ArtifactReference(bucket="inputs", key="image.png")  # never read: images are given
TEXT_FAMILIES = ("qwen2_vl", "vision_language", "qwen3_vl", "llava", "demonstration")
each_text_family = pytest.mark.parametrize("family", TEXT_FAMILIES)
RunnerOf = Callable[[str], ModelRunner]


def drawing(size: tuple[int, int], colour: str) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, size[0] // 2, size[1] // 2), colour)
    return image


RED, BLUE, GREEN = drawing((90, 60), "red"), drawing((64, 64), "blue"), drawing((120, 30), "green")


@pytest.fixture(scope="module")
def runner_of(
    shared_runner: Shared, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ModelRunner]:
    """A loaded model of a family, one for all tests."""
    loaded: dict[str, ModelRunner] = {}

    def runner(family: str) -> ModelRunner:
        if family == "vision_language":
            return shared_runner(family)
        if family not in loaded:
            model_id = ""
            if family != "demonstration":
                folder = tmp_path_factory.mktemp("texts") / family
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(SEEDS.get(family, 0))
                    getattr(importlib.import_module("tests.support.tiny_vision"), family)(folder)
                model_id = str(folder)
            loaded[family] = create_runner(Task.IMAGE_TO_TEXT, ModelConfig(model_id=model_id))
            loaded[family].load()
        return loaded[family]

    return runner


# Of the random weights. With 0, one of this family's texts is a choice between words that rounding
# alone decides on some processors.
SEEDS = {"qwen2_vl": 1}


def question(**fields: Any) -> ImageToTextRequest:
    small = {"prompt": "What is this?", "images": (SOURCE,), "max_new_tokens": 12}
    return ImageToTextRequest(**{**small, **fields})


def alone(runner: ModelRunner, one: Asking) -> tuple[RunnerOutput, list[tuple[int, int]]]:
    """The output of a request by itself, and the steps that were told."""
    again = Asking(one.request, one.images)
    runner.check(again.request)
    (output,) = runner.run([again.run()])
    assert output is not None
    return output, again.steps


def text_of(output: RunnerOutput | None) -> GeneratedText:
    assert output is not None
    assert output.text is not None
    return output.text


def various() -> list[Asking]:
    return [
        Asking(question(), [RED]),
        Asking(question(prompt="And these two, which are larger?", max_new_tokens=5), [BLUE, RED]),
        Asking(question(prompt="x<|im_end|>", max_new_tokens=None, seed=3), [GREEN]),
        Asking(question(max_new_tokens=40), [RED, BLUE, GREEN]),
    ]


@each_text_family
def test_each_request_gets_the_text_that_it_would_get_alone(
    family: str, runner_of: RunnerOf
) -> None:
    runner = runner_of(family)
    asking = various()
    for output, one in zip(together(runner, *asking), asking, strict=True):
        assert (output, one.steps) == alone(runner, one)


@each_text_family
def test_repetitions_cost_the_same_in_a_batch(family: str, runner_of: RunnerOf) -> None:
    # The padding is no word that a text repeats.
    runner = runner_of(family)
    asking = [
        Asking(question(prompt=prompt, repetition_penalty=1.5, max_new_tokens=30), [RED])
        for prompt in ("x", "a much longer question than the other one")
    ]
    for output, one in zip(together(runner, *asking), asking, strict=True):
        assert output == alone(runner, one)[0]


def test_a_system_prompt_is_each_requests_own(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    asking = [
        Asking(question(system=system), [RED]) for system in (None, "Be brief.", "<|im_end|>Sing.")
    ]
    outputs = together(runner, *asking)
    assert [output for output in outputs if output] == [alone(runner, one)[0] for one in asking]
    assert len({text_of(output).prompt_tokens for output in outputs}) == 3


def test_texts_end_by_themselves_or_at_their_limit_each_in_its_row(runner_of: RunnerOf) -> None:
    runner = runner_of("demonstration")
    asking = [Asking(question(max_new_tokens=most), [RED]) for most in (60, 4, 40)]
    outputs = together(runner, *asking)
    whole, cut, again = map(text_of, outputs)
    assert (whole.finish_reason, again.finish_reason) == ("stop", "stop")
    assert whole.text == again.text
    assert 4 < whole.completion_tokens < 40
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 4)
    assert whole.text.startswith(cut.text)
    assert [len(one.steps) for one in asking] == [
        text.completion_tokens for text in (whole, cut, again)
    ]


def test_the_demonstration_model_describes_the_same_in_batches(runner_of: RunnerOf) -> None:
    scenes = importlib.import_module("consumer.runners.demonstration.training.scenes")
    random = importlib.import_module("random")
    runner, choice = runner_of("demonstration"), random.Random(7)
    asking = []
    for number in range(32):
        scene = scenes.some_held_out_scene(choice, two=number % 2 == 0)
        drawn = scenes.draw(scene, choice)
        prompt = choice.choice(("Describe this picture.", "What do you see?", "Which colour?"))
        asking.append(Asking(question(prompt=prompt, max_new_tokens=None), [drawn]))
    for first in range(0, len(asking), 8):
        eight = asking[first : first + 8]
        for output, one in zip(together(runner, *eight), eight, strict=True):
            assert output == alone(runner, one)[0]


def test_a_row_ends_with_the_models_context(
    runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("vision_language")
    asking = [Asking(question(), [RED]), Asking(question(), [RED, BLUE])]
    longest = text_of(alone(runner, asking[1])[0]).prompt_tokens
    monkeypatch.setattr(model(runner), "_context", longest + 5)
    for output, one in zip(together(runner, *asking), asking, strict=True):
        assert output == alone(runner, one)[0]
    monkeypatch.setattr(model(runner), "_context", longest)
    with pytest.raises(UnsupportedParameter):
        together(runner, *asking)


# -- texts: what goes together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "goes_along"),
    [
        ({"prompt": "another", "system": "Be brief.", "max_new_tokens": 3, "seed": 1}, True),
        ({"temperature": 0.0, "images": (SOURCE, SOURCE), "repetition_penalty": 1.0}, True),
        ({"repetition_penalty": 1.2}, False),
    ],
)
def test_texts_go_together_if_they_are_written_in_the_same_way(
    fields: dict[str, Any], goes_along: bool, runner_of: RunnerOf
) -> None:
    runner = runner_of("vision_language")
    assert (runner.batch_key(question(**fields)) == runner.batch_key(question())) is goes_along


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5, "seed": 1}, {"top_p": 0.5}, {"top_k": 5}, {"stream": True}]
)
def test_texts_drawn_by_chance_or_told_as_they_grow_are_written_alone(
    fields: dict[str, Any], runner_of: RunnerOf
) -> None:
    assert runner_of("vision_language").batch_key(question(**fields)) is None


@pytest.mark.parametrize(
    ("broken", "config"),
    [
        ("family", {}),
        ("settings", {}),
        ("padding", {}),
        ("", {"quantization": "bitsandbytes-8bit"}),
        ("", {"quantization": "bitsandbytes-4bit"}),
    ],
)
def test_a_model_whose_rows_could_differ_from_single_texts_writes_alone(
    broken: str, config: dict[str, Any], runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = model(runner_of("vision_language"))
    if broken == "family":
        monkeypatch.setattr(text_batch, "MEASURED", frozenset())
    if broken == "settings":
        monkeypatch.setattr(inner._model.generation_config, "min_length", 5)
    if broken == "padding":
        monkeypatch.setattr(inner._processor.tokenizer, "_special_tokens_map", {"pad_token": None})
    keys = text_batch.BatchKeys(inner._model, inner._processor.tokenizer, ModelConfig(**config))
    sampling = text_batch.Sampling.of(question(), inner.description.defaults)
    possible = config.get("quantization") == "bitsandbytes-4bit"
    assert (keys.key(question(), sampling) is not None) is possible


# -- texts: who leaves ----------------------------------------------------------------------------


def test_a_cancelled_row_ends_at_its_token_and_the_others_go_on(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    asking = various()
    asking[0].leaves_at = 4
    asking[2].leaves_at = 0
    outputs = together(runner, *asking)
    assert outputs[0] is outputs[2] is None
    assert [len(one.steps) for one in asking] == [4, 5, 0, 40]
    for place in (1, 3):
        assert outputs[place] == alone(runner, asking[place])[0]


def test_when_all_are_cancelled_writing_stops_at_that_token(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    asking = [Asking(question(), [RED], leaves_at=3), Asking(question(), [BLUE], leaves_at=5)]
    calls: list[int] = []
    hook = model(runner)._model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(Interrupted):
        together(runner, *asking)
    hook.remove()
    assert len(calls) == 5
    with pytest.raises(Interrupted):
        together(runner, *(Asking(one.request, one.images, leaves_at=0) for one in asking))


def test_a_text_that_has_ended_is_not_asked_whether_it_is_cancelled(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    asking = [Asking(question(max_new_tokens=3), [RED]), Asking(question(), [BLUE], leaves_at=6)]
    first, second = together(runner, *asking)
    assert (first, second) == (alone(runner, asking[0])[0], None)
    assert len(asking[0].steps) == 3
