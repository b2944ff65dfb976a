"""Several requests in one run of a model: which requests share a batch, and their outputs.

The tests compare each output with the output of its request alone, in every family with batches.
The measured differences are in `consumer/runners/text_to_image/batch.py` and
`consumer/runners/image_to_text/batch.py`.
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

# An image of 64x64 pixels may differ from the image of its request alone by 1 in 8 of its 12,288
# values. The largest measured difference in 40 images of each family is 4 values.
MAX_VALUES = 8

LONG = "a very long and winding prompt about a large red dog that runs along the beach"
TOO_LONG = "endless " * 500  # for every encoder

each_family = pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(f.name, f.options, id=f.title) for f in FAMILIES),
        pytest.param("pixart", {}, id="PixArt, with the old callback"),
    ],
)


@dataclass
class Member:
    """One member of a batch, and its recorded steps.

    Attributes:
        cancelled_at: The step at which the request is cancelled; 0: before the first step.
    """

    request: Request
    images: Sequence[Image.Image] = ()
    cancelled_at: int | None = None
    steps: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> RunRequest:
        return run_request(
            self.request,
            self.images,
            on_step=lambda *step: self.steps.append(step),
            cancelled=lambda: len(self.steps) == self.cancelled_at,
        )


def run_batch(runner: ModelRunner, *members: Member) -> list[RunnerOutput | None]:
    keys = {runner.batch_key(one.request) for one in members}
    assert None not in keys
    assert len(keys) == 1
    return [*runner.run([one.run() for one in members])]


def require_all(outputs: Sequence[RunnerOutput | None]) -> list[RunnerOutput]:
    present = [output for output in outputs if output is not None]
    assert len(present) == len(outputs)
    return present


# -- images: outputs ------------------------------------------------------------------------------


def distance(one: RunnerOutput, other: RunnerOutput) -> int:
    """Return how many values of the images differ; 10,000 or more if one differs by above 1."""
    most = 0
    for left, right in zip(one.images, other.images, strict=True):
        differences = np.abs(np.asarray(left.image, int) - np.asarray(right.image, int))
        most = max(most, int((differences > 0).sum()), 10_000 * int((differences > 1).any()))
    return most


def assert_equal_but_for_rounding(one: RunnerOutput, other: RunnerOutput) -> None:
    assert distance(one, other) <= MAX_VALUES
    assert [image.seed for image in one.images] == [image.seed for image in other.images]
    assert (one.parameters, one.warnings) == (other.parameters, other.warnings)


def assert_same_as_alone(runner: ModelRunner, *members: Member) -> list[RunnerOutput]:
    """Run requests in one batch, and compare each output with that of the request alone.

    Returns:
        The outputs of the runs alone.
    """
    outputs = require_all(run_batch(runner, *members))
    alone = [run_checked(runner, one.request) for one in members]
    for output, single in zip(outputs, alone, strict=True):
        assert_equal_but_for_rounding(output, single)
    return alone


@each_family
def test_a_batch_gives_each_request_its_images(
    name: str, options: dict[str, Any], shared_runner: Shared
) -> None:
    members = [
        Member(small_request(prompt=prompt, seed=seed))
        for prompt, seed in (("a cat", 7), (LONG, 90), ("sea", 7))
    ]
    alone = assert_same_as_alone(shared_runner(name, **options), *members)
    assert distance(alone[0], alone[2]) > MAX_VALUES  # another prompt gives a larger difference
    assert [one.steps for one in members] == [[(1, 3), (2, 3), (3, 3)]] * 3


@each_family
def test_a_batch_keeps_prompts_and_warnings_with_their_requests(
    name: str, options: dict[str, Any], shared_runner: Shared
) -> None:
    # Three families confuse the masks of prompts if `num_images_per_prompt` is above 1.
    runner = shared_runner(name, **options)
    fields: list[dict[str, Any]] = [{}, {}, {}]
    has_negative = "negative_prompt" in model(runner).description.parameters
    if has_negative:
        negative = ["dark", "ugly, blurred, with many more words than the others have", TOO_LONG]
        fields = [{"guidance_scale": 4.0, "negative_prompt": text} for text in negative]
    members = [
        Member(small_request(prompt=prompt, seed=seed, num_images=2, **more))
        for prompt, seed, more in zip(
            ("a cat", TOO_LONG, "the sea"), (7, 2**32 - 1, 9), fields, strict=True
        )
    ]
    alone = assert_same_as_alone(runner, *members)
    assert [bool(output.warnings) for output in alone] == [False, True, has_negative]


def test_prompts_with_quotes_share_a_batch_only_with_prompts_with_quotes(
    shared_runner: Shared,
) -> None:
    # In HunyuanImage, quotes in one prompt change the guidance of all images of a call.
    runner = shared_runner("hunyuan_image")
    quoted, plain = small_request(prompt='a sign: "open"'), small_request(prompt="a sign")
    negated = small_request(prompt="a sign", negative_prompt='"shut"')
    assert len({runner.batch_key(r) for r in (quoted, plain, negated)}) == 3
    members = [Member(quoted), Member(small_request(prompt="'a' and “b”: " + TOO_LONG, seed=9))]
    assert_same_as_alone(runner, *members)


def test_the_demonstration_model_generates_the_same_images_in_batches() -> None:
    runner = create_runner(Task.TEXT_TO_IMAGE, ModelConfig())
    runner.load()
    prompts = ["a red circle", "a large blue heart on a yellow background", "a star", "a cross"]
    members = [
        Member(small_request(prompt=prompt, seed=seed, num_inference_steps=5))
        for seed, prompt in enumerate(prompts)
    ]
    assert_same_as_alone(runner, *members)
    runner.close()


def test_each_request_gets_its_own_flags_and_warnings(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("hunyuan_dit")
    flags = [False, False, True, False]
    monkeypatch.setattr(pipeline(runner), "run_safety_checker", lambda image, *_: (image, flags))
    members = [Member(small_request(num_images=2)), Member(small_request(num_images=2, seed=9))]
    first, second = require_all(run_batch(runner, *members))
    assert [image.flagged for image in (*first.images, *second.images)] == flags
    assert first.warnings == ()
    assert second.warnings == ("the model's safety checker blanked images: 1",)


def test_the_safety_checker_is_called_for_each_request(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("stable_diffusion_3")
    checker = load_checker(
        ModelConfig(safety_checker="tests.support.checkers:flags_the_second"), torch.device("cpu")
    )
    monkeypatch.setattr(runner._model, "_checker", checker)
    members = [Member(small_request(num_images=2)), Member(small_request(num_images=2, seed=9))]
    for output in require_all(run_batch(runner, *members)):
        assert [image.flagged for image in output.images] == [False, True]


def test_adapters_are_active_for_the_whole_batch_and_not_afterwards(
    model_folder: Folder, shared_runner: Shared, load: Load, tmp_path: Path
) -> None:
    plain = shared_runner("stable_diffusion_3")
    file = save_adapter(pipeline(plain), tmp_path)
    runner = load(model_folder("stable_diffusion_3"), adapters={"ink": str(file)})
    members = [Member(small_request(prompt=p, adapters={"ink": 0.5})) for p in ("a cat", "a dog")]
    assert_same_as_alone(runner, *members)
    assert pixels(run_checked(runner, small_request())) == pixels(
        run_checked(plain, small_request())
    )


# -- images: batch keys ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "same_batch"),
    [
        ({"prompt": "another", "seed": 3, "output_format": "webp", "metadata": {"a": "b"}}, True),
        ({"guidance_scale": 7.0, "adapters": {"ink": 0.0}}, True),  # the defaults
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
def test_requests_with_the_same_common_arguments_share_a_batch(
    fields: dict[str, Any], same_batch: bool, shared_runner: Shared
) -> None:
    runner = shared_runner("stable_diffusion_3")
    assert (
        runner.batch_key(small_request(**fields)) == runner.batch_key(small_request())
    ) is same_batch


def test_the_scale_of_a_guider_is_part_of_the_batch_key(shared_runner: Shared) -> None:
    # The scale of a guider is not an argument of the call.
    runner = shared_runner("hunyuan_image")
    assert runner.batch_key(small_request()) == runner.batch_key(small_request(guidance_scale=3.5))
    assert runner.batch_key(small_request()) != runner.batch_key(small_request(guidance_scale=4.0))


def test_the_order_of_adapters_does_not_change_the_batch_key(shared_runner: Shared) -> None:
    runner = shared_runner("stable_diffusion_3")
    keys = {
        runner.batch_key(small_request(adapters=adapters))
        for adapters in ({"a": 1, "b": 0.5}, {"b": 0.5, "a": 1.0}, {"b": 0.5, "a": 1, "c": 0})
    }
    assert len(keys) == 1
    assert runner.batch_key(small_request(adapters={"a": 1, "b": 0.4})) not in keys


def test_a_request_with_previews_runs_alone(shared_runner: Shared) -> None:
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


def test_these_tests_cover_every_family_with_batches(shared_runner: Shared) -> None:
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
def test_options_that_make_images_depend_on_the_batch_disable_batches(
    name: str, config: dict[str, Any], alone: bool, shared_runner: Shared
) -> None:
    runner = shared_runner(name)
    keys = image_batch.BatchKeys(pipeline(runner), model(runner)._parameters, ModelConfig(**config))
    assert (keys.key(small_request()) is None) is alone


def test_a_step_cache_disables_batches(model_folder: Folder, load: Load) -> None:
    runner = load(model_folder("flux", blocks=2), step_cache=0.1)
    assert runner.batch_key(small_request()) is None


# -- images: cancellation and errors --------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion_3", "pixart"])  # both kinds of callbacks
def test_a_cancelled_request_leaves_the_batch_and_the_others_continue(
    name: str, shared_runner: Shared
) -> None:
    runner = shared_runner(name)
    expected = require_all(
        run_batch(runner, *(Member(small_request(seed=seed)) for seed in (1, 2, 3)))
    )
    members = [Member(small_request(seed=seed)) for seed in (1, 2, 3)]
    members[1].cancelled_at = 2
    first, second, third = run_batch(runner, *members)
    assert second is None
    assert members[1].steps == [(1, 3), (2, 3)]
    for output, before, one in (
        (first, expected[0], members[0]),
        (third, expected[2], members[2]),
    ):
        assert output is not None
        assert pixels(output) == pixels(before)
        assert one.steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "pixart"])
def test_a_run_stops_when_all_its_requests_are_cancelled(name: str, shared_runner: Shared) -> None:
    runner = shared_runner(name)
    expected = pixels(run_checked(runner, small_request()))
    members = [
        Member(small_request(seed=1), cancelled_at=2),
        Member(small_request(seed=2), cancelled_at=1),
    ]
    with pytest.raises(Interrupted):
        run_batch(runner, *members)
    assert [len(one.steps) for one in members] == [2, 1]
    assert pixels(run_checked(runner, small_request())) == expected


def test_requests_that_are_cancelled_before_the_run_are_not_generated(
    shared_runner: Shared,
) -> None:
    runner = shared_runner("stable_diffusion_3")
    decoded: list[int] = []
    hook = pipeline(runner).vae.decoder.register_forward_pre_hook(
        lambda _, inputs: decoded.append(len(inputs[0]))
    )
    members = [Member(small_request(seed=seed)) for seed in (1, 2, 3)]
    members[0].cancelled_at = members[2].cancelled_at = 0
    outputs = run_batch(runner, *members)
    with pytest.raises(Interrupted):
        run_batch(runner, members[0], members[2])
    hook.remove()
    assert decoded == [1]
    assert outputs[0] is outputs[2] is None
    assert outputs[1] is not None
    assert pixels(outputs[1]) == pixels(run_checked(runner, small_request(seed=2)))
    assert (members[0].steps, members[2].steps) == ([], [])


def test_a_batch_that_cannot_be_decoded_does_not_start(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("stable_diffusion_3")
    least = min_decode_bytes(pipeline(runner), images=4, width=64, height=64)
    assert least is not None
    members = [Member(small_request(num_images=2)), Member(small_request(num_images=2, seed=9))]
    monkeypatch.setattr(runner._model, "_free_bytes", lambda _: least - 1)
    with pytest.raises(OutOfMemory) as full:
        run_batch(runner, *members)
    assert full.value.tried == ()
    assert members[0].steps == members[1].steps == []
    monkeypatch.setattr(runner._model, "_free_bytes", lambda _: least)
    assert [output.warnings for output in require_all(run_batch(runner, *members))] == [(), ()]


def test_a_failed_batch_frees_its_tensors_and_does_not_change_the_model(
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
            run_batch(runner, Member(small_request()), Member(small_request(seed=9)))
        assert seen[0]() is None
    finally:
        gc.enable()
        hook.remove()
    assert failed.value.__context__ is None
    assert pixels(run_checked(runner, small_request())) == before


# -- texts: outputs -------------------------------------------------------------------------------

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
    """Return a function that gives the shared loaded model of a family."""
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


# Seeds of the random weights. With 0, rounding on some processors decides between two words in one
# text of this family.
SEEDS = {"qwen2_vl": 1}


def make_text_request(**fields: Any) -> ImageToTextRequest:
    small = {"prompt": "What is this?", "images": (SOURCE,), "max_new_tokens": 12}
    return ImageToTextRequest(**{**small, **fields})


def alone(runner: ModelRunner, one: Member) -> tuple[RunnerOutput, list[tuple[int, int]]]:
    """Return the output of a request alone, and its steps."""
    again = Member(one.request, one.images)
    runner.check(again.request)
    (output,) = runner.run([again.run()])
    assert output is not None
    return output, again.steps


def text_of(output: RunnerOutput | None) -> GeneratedText:
    assert output is not None
    assert output.text is not None
    return output.text


def different_members() -> list[Member]:
    return [
        Member(make_text_request(), [RED]),
        Member(
            make_text_request(prompt="And these two, which are larger?", max_new_tokens=5),
            [BLUE, RED],
        ),
        Member(make_text_request(prompt="x<|im_end|>", max_new_tokens=None, seed=3), [GREEN]),
        Member(make_text_request(max_new_tokens=40), [RED, BLUE, GREEN]),
    ]


@each_text_family
def test_a_batch_gives_each_request_its_text(family: str, runner_of: RunnerOf) -> None:
    runner = runner_of(family)
    members = different_members()
    for output, one in zip(run_batch(runner, *members), members, strict=True):
        assert (output, one.steps) == alone(runner, one)


@each_text_family
def test_a_batch_does_not_change_the_repetition_penalty(family: str, runner_of: RunnerOf) -> None:
    # The padding must not count as repeated tokens.
    runner = runner_of(family)
    members = [
        Member(make_text_request(prompt=prompt, repetition_penalty=1.5, max_new_tokens=30), [RED])
        for prompt in ("x", "a much longer question than the other one")
    ]
    for output, one in zip(run_batch(runner, *members), members, strict=True):
        assert output == alone(runner, one)[0]


def test_each_request_of_a_batch_has_its_own_system_prompt(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    members = [
        Member(make_text_request(system=system), [RED])
        for system in (None, "Be brief.", "<|im_end|>Sing.")
    ]
    outputs = run_batch(runner, *members)
    assert [output for output in outputs if output] == [alone(runner, one)[0] for one in members]
    assert len({text_of(output).prompt_tokens for output in outputs}) == 3


def test_each_text_of_a_batch_ends_at_its_own_end_token_or_limit(runner_of: RunnerOf) -> None:
    runner = runner_of("demonstration")
    members = [Member(make_text_request(max_new_tokens=most), [RED]) for most in (60, 4, 40)]
    outputs = run_batch(runner, *members)
    whole, cut, again = map(text_of, outputs)
    assert (whole.finish_reason, again.finish_reason) == ("stop", "stop")
    assert whole.text == again.text
    assert 4 < whole.completion_tokens < 40
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 4)
    assert whole.text.startswith(cut.text)
    assert [len(one.steps) for one in members] == [
        text.completion_tokens for text in (whole, cut, again)
    ]


def test_the_demonstration_model_generates_the_same_texts_in_batches(runner_of: RunnerOf) -> None:
    scenes = importlib.import_module("consumer.runners.demonstration.training.scenes")
    random = importlib.import_module("random")
    runner, choice = runner_of("demonstration"), random.Random(7)
    members = []
    for number in range(32):
        scene = scenes.some_held_out_scene(choice, two=number % 2 == 0)
        drawn = scenes.draw(scene, choice)
        prompt = choice.choice(("Describe this picture.", "What do you see?", "Which colour?"))
        members.append(Member(make_text_request(prompt=prompt, max_new_tokens=None), [drawn]))
    for first in range(0, len(members), 8):
        eight = members[first : first + 8]
        for output, one in zip(run_batch(runner, *eight), eight, strict=True):
            assert output == alone(runner, one)[0]


def test_each_text_of_a_batch_ends_at_the_end_of_the_context(
    runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("vision_language")
    members = [Member(make_text_request(), [RED]), Member(make_text_request(), [RED, BLUE])]
    longest = text_of(alone(runner, members[1])[0]).prompt_tokens
    monkeypatch.setattr(model(runner), "_context", longest + 5)
    for output, one in zip(run_batch(runner, *members), members, strict=True):
        assert output == alone(runner, one)[0]
    monkeypatch.setattr(model(runner), "_context", longest)
    with pytest.raises(UnsupportedParameter):
        run_batch(runner, *members)


# -- texts: batch keys ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "same_batch"),
    [
        ({"prompt": "another", "system": "Be brief.", "max_new_tokens": 3, "seed": 1}, True),
        ({"temperature": 0.0, "images": (SOURCE, SOURCE), "repetition_penalty": 1.0}, True),
        ({"repetition_penalty": 1.2}, False),
    ],
)
def test_requests_with_the_same_sampling_share_a_batch(
    fields: dict[str, Any], same_batch: bool, runner_of: RunnerOf
) -> None:
    runner = runner_of("vision_language")
    assert (
        runner.batch_key(make_text_request(**fields)) == runner.batch_key(make_text_request())
    ) is same_batch


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5, "seed": 1}, {"top_p": 0.5}, {"top_k": 5}, {"stream": True}]
)
def test_sampled_and_streamed_texts_are_generated_alone(
    fields: dict[str, Any], runner_of: RunnerOf
) -> None:
    assert runner_of("vision_language").batch_key(make_text_request(**fields)) is None


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
def test_a_model_whose_texts_could_depend_on_the_batch_has_no_batches(
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
    sampling = text_batch.Sampling.of(make_text_request(), inner.description.defaults)
    possible = config.get("quantization") == "bitsandbytes-4bit"
    assert (keys.key(make_text_request(), sampling) is not None) is possible


# -- texts: cancellation --------------------------------------------------------------------------


def test_a_cancelled_text_ends_at_its_token_and_the_others_continue(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    members = different_members()
    members[0].cancelled_at = 4
    members[2].cancelled_at = 0
    outputs = run_batch(runner, *members)
    assert outputs[0] is outputs[2] is None
    assert [len(one.steps) for one in members] == [4, 5, 0, 40]
    for index in (1, 3):
        assert outputs[index] == alone(runner, members[index])[0]


def test_a_text_run_stops_when_all_its_requests_are_cancelled(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    members = [
        Member(make_text_request(), [RED], cancelled_at=3),
        Member(make_text_request(), [BLUE], cancelled_at=5),
    ]
    calls: list[int] = []
    hook = model(runner)._model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(Interrupted):
        run_batch(runner, *members)
    hook.remove()
    assert len(calls) == 5
    with pytest.raises(Interrupted):
        run_batch(runner, *(Member(one.request, one.images, cancelled_at=0) for one in members))


def test_a_text_that_has_ended_cannot_be_cancelled(runner_of: RunnerOf) -> None:
    runner = runner_of("vision_language")
    members = [
        Member(make_text_request(max_new_tokens=3), [RED]),
        Member(make_text_request(), [BLUE], cancelled_at=6),
    ]
    first, second = run_batch(runner, *members)
    assert (first, second) == (alone(runner, members[0])[0], None)
    assert len(members[0].steps) == 3
