"""The safety checker of the operator: one flag for each image, and no unchecked image."""

# mypy: allow-untyped-calls

from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.ports.model import ModelError, ModelUnavailable, OutOfMemory, RunnerOutput
from consumer.runners import ModelRunner
from consumer.runners.text_to_image.safety import load_checker
from generation_contracts import TextToImageRequest
from tests.support.checkers import SECRET
from tests.support.model_runs import run_model
from tests.support.tiny_adapters import pipeline
from tests.support.tiny_models import Folder, Load

Shared = Callable[..., ModelRunner]


def generate(runner: ModelRunner, *, num_images: int = 1, size: int = 32) -> RunnerOutput:
    request = TextToImageRequest(
        prompt=SECRET,
        width=size,
        height=size,
        num_inference_steps=1,
        num_images=num_images,
        seed=7,
    )
    return run_model(runner, request, [])


def flags(output: RunnerOutput) -> list[bool | None]:
    return [image.flagged for image in output.images]


def pixels(output: RunnerOutput) -> list[bytes]:
    return [image.image.tobytes() for image in output.images]


@pytest.fixture
def sd3(shared_runner: Shared) -> ModelRunner:
    return shared_runner("stable_diffusion_3")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelRunner, str], None]:
    """Return a function that sets the checker of a loaded model, as MODEL_SAFETY_CHECKER does."""

    def with_checker(runner: ModelRunner, name: str) -> None:
        checker = load_checker(f"tests.support.checkers:{name}")
        monkeypatch.setattr(runner._model, "_checker", checker)

    return with_checker


def test_without_a_checker_no_image_has_a_flag_and_the_checker_is_logged_as_off(
    model_folder: Folder, load: Load
) -> None:
    with capture_logs() as logs:
        runner = load(model_folder("stable_diffusion_3"))
    assert [entry for entry in logs if entry["event"] == "safety_checker"] == [
        {"event": "safety_checker", "checker": "off", "log_level": "info"}
    ]
    assert flags(generate(runner)) == [None]


def test_the_checker_of_the_settings_flags_each_image(model_folder: Folder, load: Load) -> None:
    name = "tests.support.checkers:flags_the_second"
    with capture_logs() as logs:
        runner = load(model_folder("stable_diffusion_3"), safety_checker=name)
    assert [entry["checker"] for entry in logs if entry["event"] == "safety_checker"] == [name]
    assert flags(generate(runner, num_images=3)) == [False, True, False]


def test_a_checker_does_not_change_the_images(sd3: ModelRunner, use: Callable[..., None]) -> None:
    unchecked = pixels(generate(sd3, num_images=2))
    use(sd3, "flags_and_paints")
    checked = generate(sd3, num_images=2)
    assert flags(checked) == [True, True]
    assert pixels(checked) == unchecked


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ("raises", "the safety checker raised ValueError"),
        ("takes_no_images", "the safety checker raised TypeError"),
        ("returns_too_few", "did not return one flag for each image"),
        ("returns_one_bool", "did not return one flag for each image"),
        ("returns_numbers", "neither true nor false"),
        ("returns_nones", "neither true nor false"),
    ],
)
def test_a_failed_check_raises_instead_of_returning_images(
    checker: str, message: str, sd3: ModelRunner, use: Callable[..., None]
) -> None:
    use(sd3, checker)
    with pytest.raises(ModelError, match=message) as failed:
        generate(sd3, num_images=2)
    assert SECRET not in str(failed.value)


def test_a_checker_without_enough_memory_raises_out_of_memory(
    sd3: ModelRunner, use: Callable[..., None]
) -> None:
    use(sd3, "runs_out_of_memory")
    with pytest.raises(OutOfMemory):
        generate(sd3)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("tests.support.checkers", "must be package.module:callable"),
        ("tests.support.checkers:missing", "has no attribute 'missing'"),
        ("tests.no_such_module:check", "No module named 'tests.no_such_module'"),
        ("tests.support.checkers:NOT_CALLABLE", "it is not callable"),
        ("..:check", "must be package.module:callable"),
    ],
)
def test_a_checker_that_cannot_be_loaded_stops_the_start(setting: str, reason: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^MODEL_SAFETY_CHECKER: .*{reason}$"):
        load_checker(setting)


# -- pipelines with a safety checker --------------------------------------------------------------


def set_flags_of_the_model(
    runner: ModelRunner, flagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline(runner), "run_safety_checker", lambda image, *_: (image, flagged))


@pytest.mark.parametrize(
    ("checker", "expected"),
    [
        (None, [True, False]),
        ("flags_the_second", [True, True]),
        ("flags_none", [True, False]),
    ],
)
def test_the_flags_of_both_checkers_are_combined(
    checker: str | None,
    expected: list[bool],
    shared_runner: Shared,
    use: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = shared_runner("hunyuan_dit")
    set_flags_of_the_model(runner, [True, False], monkeypatch)
    if checker is not None:
        use(runner, checker)
    output = generate(runner, num_images=2)
    assert flags(output) == expected
    assert output.warnings == ("the model's safety checker blanked images: 1",)


def test_a_wrong_number_of_flags_of_the_models_checker_is_an_error(
    shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared_runner("hunyuan_dit")
    set_flags_of_the_model(runner, [False, True, False], monkeypatch)
    with pytest.raises(ModelError, match="did not return one flag for each image"):
        generate(runner, num_images=2)
