"""Text to image through the real from_pretrained path; test_families.py tests each family."""

# mypy: allow-untyped-calls

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import FirstBlockCacheConfig, HeunDiscreteScheduler
from structlog.testing import capture_logs

from consumer.ports.model import (
    DeviceLost,
    Interrupted,
    ModelError,
    OutOfMemory,
    UnsupportedParameter,
)
from consumer.runners import ModelRunner, create_runner
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.text_to_image import diffusion
from consumer.runners.text_to_image.memory import save
from generation_contracts import Task, TextToImageRequest
from tests.integration.small_runs import largest_difference
from tests.support.image_runs import StopAt, model, pipeline, pixels, run_small, small_request
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

SECRET = "zanzibar"  # a word of the prompt that must not appear in a log, warning or error

Shared = Callable[..., ModelRunner]


@pytest.fixture
def sd3(shared_runner: Shared) -> ModelRunner:
    return shared_runner("stable_diffusion_3")


# -- images ---------------------------------------------------------------------------------------


def test_the_description_identifies_the_model(sd3: ModelRunner) -> None:
    assert model(sd3).description.info.model_dump() == {
        "id": "stable_diffusion_3",
        "revision": None,
        "family": "StableDiffusion3",
        "dtype": "float32",
        "device": "cpu",
        "libraries": {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def test_the_default_size_of_the_demonstration_model_is_64_by_64_pixels() -> None:
    runner = create_runner(Task.TEXT_TO_IMAGE, ModelConfig())
    description = runner.load()
    assert description.info.id == "demonstration"
    assert description.info.revision is None
    request = TextToImageRequest(prompt="a cat", num_inference_steps=2)
    output = run_model(runner, request, [])
    assert output.images[0].image.size == (64, 64)


def test_a_missing_side_has_its_default(sd3: ModelRunner) -> None:
    assert run_small(sd3, width=96, height=None).images[0].image.size == (96, 64)
    assert run_small(sd3, width=None, height=32).images[0].image.size == (64, 32)


def test_a_second_order_scheduler_counts_its_own_steps(model_folder: Folder, load: Load) -> None:
    runner = load(model_folder("stable_diffusion_xl"))
    shared = pipeline(runner)
    shared.scheduler = HeunDiscreteScheduler.from_config(shared.scheduler.config)
    steps: list[tuple[int, int]] = []
    run_model(runner, small_request(), [], on_step=lambda *step: steps.append(step))
    assert steps == [(n, 5) for n in range(1, 6)]


def test_a_blanked_image_is_reported(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("hunyuan_dit")
    monkeypatch.setattr(
        pipeline(runner), "run_safety_checker", lambda image, *_: (image, [False, True])
    )
    output = run_small(runner, num_images=2)
    assert output.warnings == ("the model's safety checker blanked images: 1",)


# -- seeds ----------------------------------------------------------------------------------------


def test_a_seed_determines_the_image(sd3: ModelRunner) -> None:
    assert pixels(run_small(sd3)) == pixels(run_small(sd3))
    assert pixels(run_small(sd3)) != pixels(run_small(sd3, seed=8))


def test_seeds_increase_by_one_and_wrap_after_the_largest(sd3: ModelRunner) -> None:
    output = run_small(sd3, seed=2**32 - 1, num_images=3)
    assert [image.seed for image in output.images] == [2**32 - 1, 0, 1]
    assert len(set(pixels(output))) == 3


# HunyuanDiT's scheduler draws noise at each step. One generator for all images of a batch would
# change each of them.
@pytest.mark.parametrize("family", ["stable_diffusion_3", "hunyuan_dit"])
def test_each_image_of_a_request_is_the_image_of_its_seed(
    family: str, shared_runner: Shared
) -> None:
    runner = shared_runner(family)
    several = run_small(runner, num_images=3).images
    alone = [run_small(runner, seed=7 + n).images[0] for n in range(3)]
    for one, other in zip(several, alone, strict=True):
        assert largest_difference(one.image, other.image) <= 3  # of 255; batches round differently


# -- state after a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_does_not_cast_the_shared_weights(
    dtype: str, model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder("stable_diffusion_3"), dtype=dtype)
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    expected = {part: getattr(torch, dtype) for part in parts}
    assert {part: getattr(pipeline(runner), part).dtype for part in parts} == expected
    run_small(runner)
    assert {part: getattr(pipeline(runner), part).dtype for part in parts} == expected
    description = runner._model.description if runner._model else None
    assert description is not None
    assert description.info.dtype == dtype


def test_the_dtype_of_the_vae_is_restored_when_decoding_fails(
    model_folder: Folder, load: Load
) -> None:
    # SDXL in float16 decodes in float32; a failure must restore float16.
    runner = load(model_folder("stable_diffusion_xl"), dtype="float16")
    vae = pipeline(runner).vae
    images_before = pixels(run_small(runner))

    def fail(*_: Any) -> None:
        assert vae.dtype == torch.float32
        raise torch.OutOfMemoryError("no more")

    hook = vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory):
        run_small(runner)
    hook.remove()
    assert vae.dtype == torch.float16
    assert pixels(run_small(runner)) == images_before


def test_the_step_cache_of_a_cancelled_run_is_not_used_by_the_next_run(
    model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder("flux", blocks=2))
    pipeline(runner).transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    images_before = pixels(run_small(runner))
    with pytest.raises(Interrupted):
        run_model(runner, small_request(prompt="another"), [], cancelled=StopAt(2).is_reached)
    assert pixels(run_small(runner)) == images_before


# The CPU stands for an accelerator: the same hooks move the parts. Sequential offload cannot be
# tested this way: accelerate's hook needs two kinds of device.
@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_generates_the_same_images(
    offload: str,
    sd3: ModelRunner,
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = Placement(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(diffusion, "place", lambda _: cpu)
    runner = load(model_folder("stable_diffusion_3"), offload=offload)
    images_before = pixels(run_small(sd3))
    assert pixels(run_small(runner)) == images_before
    with pytest.raises(Interrupted):
        run_model(runner, small_request(), [], cancelled=StopAt(2).is_reached)
    assert pixels(run_small(runner)) == images_before
    assert pixels(run_small(runner, save_memory=True)) == images_before


# -- unsupported parameters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "field", "message"),
    [
        ("stable_diffusion_xl", {"preview": True}, "preview", "StableDiffusionXL does not have it"),
        ("stable_diffusion_3", {"width": 100}, "width", "must be a multiple of 16"),
        ("flux", {"height": 72}, "height", "must be a multiple of 16"),
        ("stable_diffusion_3", {"width": 528}, "width", "must be at most 512"),
        ("flux", {"width": 4096, "height": 2048}, "width", "at most 4194304 pixels"),
        ("flux", {"width": None, "height": 4096}, None, ""),
        ("flux", {"negative_prompt": "a dog"}, "negative_prompt", "Flux does not have it"),
        (
            "stable_diffusion_3",
            {"negative_prompt": "a dog", "guidance_scale": 1.0},
            "negative_prompt",
            "only with guidance_scale above 1",
        ),
        ("stable_diffusion_3", {"negative_prompt": "a dog"}, None, ""),
        ("flux", {"negative_prompt": " "}, None, ""),
        (
            "flux",
            {"preview": False, "then": (), "num_images": 1, "negative_prompt": None},
            None,
            "",
        ),
    ],
)
def test_check_refuses_unsupported_parameters_by_name(
    family: str,
    fields: dict[str, Any],
    field: str | None,
    message: str,
    shared_runner: Shared,
) -> None:
    runner = shared_runner(family)
    if field is None:
        runner.check(small_request(**fields))
        return
    with pytest.raises(UnsupportedParameter, match=message) as refused:
        runner.check(small_request(**fields))
    assert refused.value.parameter == field
    assert str(refused.value).startswith(f"{field}: ")


def test_flux_without_a_distilled_scale_is_guided_against_a_negative_prompt(
    shared_runner: Shared,
) -> None:
    schnell = shared_runner("flux", reads_guidance=False)
    plain = pixels(run_small(schnell))
    guided = pixels(run_small(schnell, guidance_scale=4.0))
    assert guided != plain
    assert pixels(run_small(schnell, guidance_scale=4.0, negative_prompt="a dog")) not in (
        guided,
        plain,
    )
    with pytest.raises(UnsupportedParameter, match="only with guidance_scale above 1"):
        run_small(schnell, negative_prompt="a dog")


# -- prompts that are too long --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "encoders"),
    [
        ("stable_diffusion_3", {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}),
        ("flux", {"tokenizer": 77, "tokenizer_2": 512}),
        ("hunyuan_dit", {"tokenizer": 77, "tokenizer_2": 256}),
    ],
)
def test_a_truncated_prompt_is_reported_without_its_words(
    family: str,
    encoders: dict[str, int],
    shared_runner: Shared,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG), capture_logs() as logs:
        output = run_small(shared_runner(family), prompt=f"{SECRET} " * 100)
    assert output.warnings == tuple(
        f"the prompt was truncated: {name} read only its first {tokens} tokens"
        for name, tokens in encoders.items()
    )
    printed = capsys.readouterr()
    for text in (str(output.warnings), caplog.text, str(logs), printed.out, printed.err):
        assert SECRET not in text


def test_only_encoders_that_truncate_the_prompt_are_reported(sd3: ModelRunner) -> None:
    warnings = run_small(sd3, prompt="x" * 100).warnings
    assert [w.split(": ")[1].split()[0] for w in warnings] == ["tokenizer", "tokenizer_2"]


# -- errors failing the model ---------------------------------------------------------------------


class FailingPart:
    """Makes a part of a pipeline raise once, with a tensor in the frame that raises."""

    def __init__(self, part: torch.nn.Module, error: Exception) -> None:
        self.error: Exception | None = error
        self.tensor: weakref.ref[torch.Tensor] | None = None
        self.hook = part.register_forward_pre_hook(self._raise)

    def _raise(self, *_: Any) -> None:
        tensor = torch.zeros(1000)
        self.tensor = weakref.ref(tensor)
        error, self.error = self.error, None
        assert error is not None
        raise error

    def freed(self) -> bool:
        self.hook.remove()
        return self.tensor is not None and self.tensor() is None


@pytest.mark.parametrize(
    ("error", "message", "translated", "text"),
    [
        (torch.OutOfMemoryError, SECRET, OutOfMemory, "did not suffice"),
        (MemoryError, "", OutOfMemory, "did not suffice"),
        (
            RuntimeError,
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes",
            OutOfMemory,
            "did not suffice",
        ),
        (ValueError, SECRET, ModelError, "ValueError"),
        (RuntimeError, SECRET, ModelError, "RuntimeError"),
    ],
)
def test_an_exception_is_translated_and_its_tensors_are_freed(
    error: type[Exception],
    message: str,
    translated: type[Exception],
    text: str,
    sd3: ModelRunner,
) -> None:
    images_before = pixels(run_small(sd3))
    failing = FailingPart(pipeline(sd3).transformer, error(message))
    gc.disable()
    try:
        with capture_logs() as logs, pytest.raises(translated, match=text) as raised:
            run_small(sd3, prompt=SECRET)
        assert failing.freed()
    finally:
        gc.enable()
    assert raised.value.__context__ is None
    assert SECRET not in f"{raised.value} {logs}"
    assert pixels(run_small(sd3)) == images_before


def test_a_device_error_is_a_lost_device_and_releases_no_memory(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr(diffusion, "release", released.append)
    failing = FailingPart(
        pipeline(sd3).transformer, torch.AcceleratorError(f"CUDA error: {SECRET}")
    )
    with capture_logs() as logs, pytest.raises(DeviceLost) as raised:
        run_small(sd3)
    failing.hook.remove()
    assert released == []
    assert SECRET not in f"{raised.value} {logs}"


def test_a_device_error_during_the_release_of_memory_is_a_lost_device(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: gone")

    monkeypatch.setattr(diffusion, "release", fail)
    failing = FailingPart(pipeline(sd3).transformer, torch.OutOfMemoryError("no more"))
    with pytest.raises(DeviceLost):
        run_small(sd3)
    failing.hook.remove()


def test_an_exception_is_logged_with_its_class_and_location(sd3: ModelRunner) -> None:
    failing = FailingPart(pipeline(sd3).vae.decoder, ValueError(SECRET))
    with capture_logs() as logs, pytest.raises(ModelError):
        run_small(sd3)
    failing.hook.remove()
    (entry,) = logs
    assert (entry["event"], entry["error"]) == ("model_raised", "ValueError")
    assert "test_diffusion.py" in entry["where"]


def test_pixels_that_are_not_numbers_are_an_error(model_folder: Folder, load: Load) -> None:
    runner = load(model_folder("stable_diffusion_3"))
    with torch.no_grad():
        pipeline(runner).vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="pixels that are not numbers"):
        run_small(runner)


def test_images_of_a_wrong_shape_are_an_error(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = pipeline(sd3).image_processor
    whole = processor.postprocess
    monkeypatch.setattr(processor, "postprocess", lambda *a, **k: whole(*a, **k)[:, :-8])
    with pytest.raises(ModelError, match="another shape"):
        run_small(sd3)


def test_a_cancelled_request_does_not_start(sd3: ModelRunner) -> None:
    failing = FailingPart(pipeline(sd3).text_encoder, AssertionError("the text was read"))
    with pytest.raises(Interrupted):
        run_model(sd3, small_request(), [], cancelled=lambda: True)
    failing.hook.remove()


# -- saving memory --------------------------------------------------------------------------------


def test_saving_memory_generates_one_image_at_a_time_and_ends_with_the_run(
    sd3: ModelRunner,
) -> None:
    vae = pipeline(sd3).vae
    batches: list[tuple[int, bool, bool]] = []
    hook = vae.decoder.register_forward_pre_hook(
        lambda _, inputs: batches.append((len(inputs[0]), vae.use_slicing, vae.use_tiling))
    )
    steps: list[tuple[int, int]] = []
    output = run_model(
        sd3,
        small_request(num_images=2),
        [],
        on_step=lambda *step: steps.append(step),
        save_memory=True,
    )
    hook.remove()
    assert batches == [(1, True, True)] * 2
    assert steps == [(n, 6) for n in range(1, 7)]
    assert [image.seed for image in output.images] == [7, 8]
    assert "memory was short" in output.warnings[0]
    assert (vae.use_slicing, vae.use_tiling) == (False, False)
    assert pixels(output)[0] == pixels(run_small(sd3))[0]


def test_saving_memory_ends_with_a_failed_run(sd3: ModelRunner) -> None:
    failing = FailingPart(pipeline(sd3).transformer, torch.OutOfMemoryError("no more"))
    with pytest.raises(OutOfMemory):
        run_small(sd3, save_memory=True)
    failing.hook.remove()
    assert (pipeline(sd3).vae.use_slicing, pipeline(sd3).vae.use_tiling) == (False, False)


def test_parts_that_were_moved_for_one_run_are_moved_back(sd3: ModelRunner) -> None:
    shared = pipeline(sd3)
    images_before = pixels(run_small(sd3))
    with ExitStack() as undo:
        save(undo, shared, torch.device("cpu"), offload=True)
        assert shared.transformer._hf_hook is not None
        assert pixels(run_small(sd3)) == images_before
    assert not hasattr(shared.transformer, "_hf_hook")
    assert pixels(run_small(sd3)) == images_before


def test_parts_that_no_longer_fit_stay_in_main_memory(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(model_folder("stable_diffusion_3"))
    shared = pipeline(runner)
    images_before = pixels(run_small(runner))
    undo = ExitStack()
    save(undo, shared, torch.device("cpu"), offload=True)
    move_to = shared.to

    def raise_once(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(shared, "to", move_to)
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(shared, "to", raise_once)
    with capture_logs() as logs:
        undo.close()
    assert [entry["event"] for entry in logs] == ["weights_stay_in_main_memory"]
    assert shared.transformer._hf_hook is not None
    assert pixels(run_small(runner)) == images_before
