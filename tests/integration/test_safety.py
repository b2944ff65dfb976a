"""The safety checker of the operator: one flag for each image, and no unchecked image."""

# mypy: allow-untyped-calls

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from consumer.ports.model import (
    ModelError,
    ModelMisconfigured,
    ModelUnavailable,
    OutOfMemory,
    RunnerOutput,
)
from consumer.runners import ModelConfig, ModelRunner
from consumer.runners.text_to_image.safety import SafetyChecker, load_checker
from generation_contracts import TextToImageRequest
from tests.support import tiny_classifier
from tests.support.checkers import SECRET
from tests.support.model_runs import run_model, run_request
from tests.support.tiny_adapters import pipeline
from tests.support.tiny_models import Folder, Load

Shared = Callable[..., ModelRunner]
CPU = torch.device("cpu")


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
        setting = f"tests.support.checkers:{name}"
        checker = load_checker(ModelConfig(safety_checker=setting), CPU)
        monkeypatch.setattr(runner._model, "_checker", checker)

    return with_checker


def test_without_a_checker_no_image_has_a_flag_and_the_checker_is_logged_as_off(
    model_folder: Folder, load: Load
) -> None:
    with capture_logs() as logs:
        runner = load(model_folder("stable_diffusion_3"))
    assert [entry for entry in logs if entry["event"] == "safety_checker"] == [
        {"event": "safety_checker", "checker": "off", "policy": "flag", "log_level": "info"}
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
        (
            "tests.support.checkers",
            "must be package.module:callable, a folder, or an id on the hub",
        ),
        ("tests.support.checkers:missing", "has no attribute 'missing'"),
        ("tests.no_such_module:check", "No module named 'tests.no_such_module'"),
        ("tests.support.checkers:NOT_CALLABLE", "it is not callable"),
        ("..:check", "must be package.module:callable, a folder, or an id on the hub"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_a_checker_that_cannot_be_loaded_stops_the_start(setting: str, reason: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^MODEL_SAFETY_CHECKER: .*{reason}$"):
        load_checker(ModelConfig(safety_checker=setting), CPU)


# -- classifiers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "bright"
    tiny_classifier.save(folder)
    return folder


def plain(value: int) -> Image.Image:
    return Image.new("RGB", (80, 48), (value, value, value))


def classify(folder: Path, *values: int, **options: Any) -> list[bool]:
    """Return the flags of grey images with these values."""
    checker = load_checker(ModelConfig(safety_checker=str(folder), **options), CPU)
    assert checker is not None
    return checker.flags([plain(value) for value in values])


def test_a_classifier_flags_each_image(classifier: Path) -> None:
    assert classify(classifier, 255, 0, 250) == [True, False, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"safety_labels": ("normal",)}, [False, True]),
        ({"safety_labels": ("normal", "nsfw")}, [True, True]),
        ({"safety_labels": ("drawing",)}, [False, False]),
    ],
    ids=["another label", "labels are added", "a label that no image has"],
)
def test_labels_and_threshold_of_a_classifier(
    classifier: Path, options: dict[str, Any], expected: list[bool]
) -> None:
    assert classify(classifier, 245, 10, **options) == expected


def test_an_image_is_flagged_from_the_threshold(classifier: Path) -> None:
    # For this grey the probability of `NSFW` is 0.88.
    assert classify(classifier, 140) == [True]
    assert classify(classifier, 140, safety_threshold=0.95) == [False]


def test_a_classifier_of_several_labels_flags_by_the_most_probable_one(tmp_path: Path) -> None:
    tiny_classifier.save(tmp_path, problem_type="multi_label_classification")
    assert classify(tmp_path, 255, 0) == [True, False]
    # The probabilities are independent: that of `normal` is a half for every image.
    assert classify(tmp_path, 255, 0, safety_labels=("normal",)) == [True, True]
    assert classify(tmp_path, 255, 0, safety_labels=("normal",), safety_threshold=0.6) == [
        False,
        False,
    ]


def test_a_label_that_the_classifier_lacks_stops_the_start(classifier: Path) -> None:
    line = "^MODEL_SAFETY_LABELS: bright has no label gore; it has normal, NSFW, drawing$"
    with pytest.raises(ModelMisconfigured, match=line):
        classify(classifier, safety_labels=("nsfw", "gore"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("model.safetensors", "has no weights in safetensors files"),
        ("config.json", "bright: cannot be loaded: "),
        ("preprocessor_config.json", "bright: cannot be loaded: "),
    ],
)
def test_an_incomplete_classifier_stops_the_start(
    damage: str, reason: str, classifier: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / "bright"))
    (folder / damage).unlink()
    with pytest.raises(ModelUnavailable, match=f"^MODEL_SAFETY_CHECKER: .*{reason}") as failed:
        classify(folder)
    assert str(tmp_path) not in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_classifier_with_a_missing_weight_stops_the_start(
    classifier: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / "bright"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("classifier.1.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"1 weights are missing, such as classifier\.1"):
        classify(folder)


def test_the_classifier_of_the_settings_flags_images(
    model_folder: Folder, load: Load, classifier: Path
) -> None:
    every = {"safety_labels": ("normal", "nsfw"), "safety_checker": str(classifier)}
    runner = load(model_folder("stable_diffusion_3"), **every)
    assert flags(generate(runner, num_images=2)) == [True, True]


# -- policies -------------------------------------------------------------------------------------


@pytest.fixture
def policy(sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets the policy of a loaded model, as MODEL_SAFETY_POLICY does."""
    return lambda value: monkeypatch.setattr(sd3._model, "_policy", value)


def test_a_flagged_image_is_black_with_the_policy_blank(
    sd3: ModelRunner, use: Callable[..., None], policy: Callable[[str], None]
) -> None:
    unchecked = pixels(generate(sd3, num_images=2))
    use(sd3, "flags_the_second")
    policy("blank")
    output = generate(sd3, num_images=2)
    assert flags(output) == [False, True]
    assert pixels(output) == [unchecked[0], bytes(len(unchecked[1]))]
    assert output.warnings == ("the worker's safety checker blanked images: 1",)


def test_a_flagged_image_refuses_the_output_with_the_policy_fail(
    sd3: ModelRunner, use: Callable[..., None], policy: Callable[[str], None]
) -> None:
    use(sd3, "flags_the_second")
    policy("fail")
    refused = generate(sd3, num_images=2)
    assert refused.refused
    assert refused.images == ()
    assert not generate(sd3, num_images=1).refused


def test_a_refused_request_does_not_refuse_the_others_of_its_batch(
    sd3: ModelRunner, policy: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        run_request(TextToImageRequest(prompt=SECRET, width=32, height=32, seed=seed, steps=1))
        for seed in (7, 8)
    ]
    second = pixels(run_model(sd3, runs[1].request))
    # Batches round differently, so the checker compares roughly.
    checker = SafetyChecker(lambda images: [_is_like(image, second[0]) for image in images])
    monkeypatch.setattr(sd3._model, "_checker", checker)
    policy("fail")
    first, refused = sd3.run(runs)
    assert first is not None
    assert refused is not None
    assert (first.refused, refused.refused) == (False, True)
    assert len(first.images) == 1


def _is_like(image: Image.Image, other: bytes) -> bool:
    difference = np.frombuffer(image.tobytes(), np.uint8).astype(int) - np.frombuffer(
        other, np.uint8
    )
    return bool(np.median(np.abs(difference)) <= 1)


@pytest.mark.parametrize("name", ["blank", "fail"])
def test_previews_are_off_where_flagged_images_are_not_published(
    name: str, sd3: ModelRunner, policy: Callable[[str], None]
) -> None:
    request = TextToImageRequest(prompt="a", width=32, height=32, steps=4, seed=1, preview=True)
    shown: list[bytes] = []
    run_model(sd3, request, on_preview=shown.append)
    assert shown
    shown.clear()
    policy(name)
    run_model(sd3, request, on_preview=shown.append)
    assert shown == []


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
