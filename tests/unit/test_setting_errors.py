"""Wrong settings of a model that are found without its libraries."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consumer.app.composition import make_runner
from consumer.app.daemon import _exit_code_of
from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners import ModelConfig, find_setting_errors, setting_errors
from consumer.settings import Settings, SettingsError
from generation_contracts import Task

IMAGES, TEXTS = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT


@pytest.mark.parametrize(
    ("task", "values", "line"),
    [
        (IMAGES, {"model_id": "/models/none"}, "MODEL_ID: there is no folder /models/none"),
        (IMAGES, {"model_id": __file__}, f"MODEL_ID: {__file__} is a file: "),
        (
            IMAGES,
            {"model_id": str(Path(__file__).parent), "revision": "main"},
            "MODEL_REVISION: only a model of the hub has revisions",
        ),
        (
            IMAGES,
            {"safety_checker": "foo"},
            "MODEL_SAFETY_CHECKER: must be package.module:callable",
        ),
        (
            IMAGES,
            {"safety_checker": "/models/none"},
            "MODEL_SAFETY_CHECKER: there is no folder /models/none",
        ),
        (
            IMAGES,
            {"safety_checker": str(Path(__file__).parent), "safety_labels": ()},
            "MODEL_SAFETY_LABELS: without a label the classifier would flag nothing",
        ),
        (IMAGES, {"safety_checker": __file__}, f"MODEL_SAFETY_CHECKER: {__file__} is a file: "),
        (
            IMAGES,
            {"safety_checker": "os:path", "safety_threshold": 0.9},
            "MODEL_SAFETY_THRESHOLD: only for a classifier as MODEL_SAFETY_CHECKER",
        ),
        (TEXTS, {"safety_policy": "fail"}, "MODEL_SAFETY_POLICY: only for MODEL_TYPE="),
        (IMAGES, {"safety_checker": "..:x"}, "MODEL_SAFETY_CHECKER: must be package.module"),
        (
            IMAGES,
            {"safety_checker": "no_such_package.checks:safe"},
            "MODEL_SAFETY_CHECKER: there is no module no_such_package",
        ),
        (
            IMAGES,
            {"defaults": {"stepz": 4}},
            "MODEL_DEFAULTS: stepz: a request has no such parameter",
        ),
        (TEXTS, {"defaults": {"num_inference_steps": 4}}, "MODEL_DEFAULTS: num_inference_steps: "),
        (
            IMAGES,
            {"adapters": {"ink": "/nope"}},
            "MODEL_ADAPTERS: ink: there is no such ",
        ),
        (IMAGES, {"attention": "flash_hub"}, "MODEL_ATTENTION: must be one of _flash_3, "),
        (TEXTS, {"attention": "flash"}, "MODEL_ATTENTION: must be one of eager, sdpa, "),
        (TEXTS, {"vae_tiling": True}, "MODEL_VAE_TILING: only for MODEL_TYPE=text_to_image"),
        (IMAGES, {"device": "cpu", "offload": "model"}, "MODEL_OFFLOAD: the device is cpu, "),
        (IMAGES, {"quantization": "gguf"}, "MODEL_QUANTIZATION, MODEL_ID: gguf needs a folder"),
    ],
)
def test_a_wrong_setting_is_found(task: Task, values: dict[str, Any], line: str) -> None:
    (found,) = find_setting_errors(task, ModelConfig(**values))
    assert found.startswith(line)
    assert "\n" not in found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model_id": "black-forest-labs/FLUX.1-schnell", "revision": "main"},
        {"model_id": str(Path(__file__).parent)},
        {"safety_checker": "tests.support.checkers:NOT_CALLABLE"},
        {"attention": "native", "defaults": {"num_inference_steps": 4}},
    ],
    ids=["demonstration model", "hub", "folder", "checker", "attention and defaults"],
)
def test_possible_settings_are_accepted(values: dict[str, Any]) -> None:
    assert find_setting_errors(IMAGES, ModelConfig(**values)) == []


@pytest.mark.parametrize(
    ("platform", "torch", "driver", "possible"),
    [
        ("linux", "2.9.0+cpu", True, False),
        ("linux", "2.9.0", False, False),
        ("linux", "2.9.0+cu128", False, False),
        ("linux", "2.9.0", True, True),
        ("linux", "2.9.0+cu128", True, True),
        ("linux", "2.9.0+rocm6.4", False, True),
        ("linux", "2.9.0a0+git1234567", False, True),
        ("win32", "2.9.0+cu128", False, True),
        ("darwin", "2.9.0", False, False),
    ],
)
def test_cuda_is_refused_only_where_torch_cannot_have_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, torch: str, driver: bool, possible: bool
) -> None:
    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(setting_errors.sys, "platform", platform)
    monkeypatch.setattr(setting_errors, "version", lambda _: torch)
    monkeypatch.setattr(setting_errors, "CDLL", load)
    found = find_setting_errors(IMAGES, ModelConfig(device="cuda"))
    assert [line.split(":")[0] for line in found] == ([] if possible else ["MODEL_DEVICE"])


def test_all_wrong_settings_stop_the_start_with_one_line_each() -> None:
    settings = Settings(
        model_type="text_to_image", model_id="/models/none", model_defaults='{"stepz": 4}'
    )
    with pytest.raises(SettingsError) as refused:
        make_runner(settings)
    assert str(refused.value).splitlines() == [
        "MODEL_ID: there is no folder /models/none",
        "MODEL_DEFAULTS: stepz: a request has no such parameter",
    ]


def test_a_wrong_setting_is_found_without_torch() -> None:
    code = """
import sys
from consumer.runners import ModelConfig, find_setting_errors
from generation_contracts import Task
find_setting_errors(Task.TEXT_TO_IMAGE, ModelConfig(adapters={"ink": "/nope"}, device="cuda"))
print(sorted({"torch", "diffusers", "transformers", "numpy"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("error", "code"), [(ModelMisconfigured, 2), (ModelUnavailable, 70)])
def test_exit_code_tells_wrong_settings_from_other_failures(
    error: type[Exception], code: int
) -> None:
    assert _exit_code_of(error("MODEL_VAE_TILING: the model has no vae with tiling")) == code
