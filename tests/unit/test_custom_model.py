"""A custom runner as a model: what its class and its `load` may do wrong, and its outputs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.ports.model import (
    GeneratedFile,
    GeneratedImage,
    GeneratedJson,
    GeneratedText,
    Interrupted,
    ModelError,
    ModelMisconfigured,
    ModelUnavailable,
    RunRequest,
    UnsupportedParameter,
)
from consumer.runners import ModelConfig, find_setting_errors
from consumer.runners.custom.custom_model import CustomModel, load
from generation_contracts import CustomRequest, Task

SOURCE = """
from PIL import Image as Pillow
from pydantic import Field
from generation_runner import *

class P(Parameters):
    kind: str = "text"
    count: int = Field(default=1, ge=1, le=9)

class Good(Runner[P]):
    parameters = P
    max_images = 2

    def run(self, parameters, context):
        context.warn("a warning")
        context.step(1, 2)
        AFTER_STEP.append(True)
        return OUTPUTS[parameters.kind]

    def batch_key(self, parameters):
        return parameters.kind

    def run_batch(self, parameters, contexts):
        if parameters[0].kind == "short":
            return []
        for context in contexts:
            context.step(1, 1)
        return [Text(str(each.count)) for each in parameters]

    def close(self):
        CLOSED.append(True)

CLOSED, AFTER_STEP = [], []
OUTPUTS = {
    "text": Text("a"), "json": [Json({"a": [1]}), Text("b")],
    "file": File(b"x", "audio/wav", "wav"),
    "image": Image(Pillow.new("RGB", (2, 2)), "webp"), "none": None, "empty": [], "dict": {"a": 1},
    "nan": Json(float("nan")), "set": Json({1}), "no bytes": File(b"", "audio/wav", "wav"),
    "media type": File(b"x", "audio/wav\\r\\nx: y", "wav"), "extension": File(b"x", "a/b", "../x"),
    "format": Image(Pillow.new("RGB", (2, 2)), "gif"), "no image": Image("a"),
}

class Loud(Good):
    def run(self, parameters, context):
        for number in range(30):
            context.warn(str(number) * 600)
        context.step(5, 2)
        context.step(-1, 0)
        return Text("a")

class OneByOne(Good):
    run_batch = Runner.run_batch

class NoRun(Runner): pass
class BadImages(Good): min_images = 3
class RaisesInLoad(Good):
    def load(self, device): raise OSError("no file /secret/folder/weights.bin")
class RaisesAtStart(Good):
    def __init__(self): raise KeyError("x")
def function(): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `scripted_runner`, in the working directory."""
    (tmp_path / "scripted_runner.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("scripted_runner", None)


class Progress:
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def step(self, done: int, of: int) -> None:
        self.steps.append((done, of))

    def text(self, added: str) -> None: ...

    def preview(self, jpeg: bytes) -> None: ...


def loaded(name: str) -> CustomModel:
    return load(ModelConfig(runner=f"scripted_runner:{name}", device="cpu"))


def run_of(*, cancelled: bool = False, **parameters: Any) -> RunRequest:
    request = CustomRequest(seed=5, parameters=parameters)
    return RunRequest(request, [], Progress(), lambda: cancelled)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("kind", "types"),
    [
        ("text", [GeneratedText]),
        ("json", [GeneratedJson, GeneratedText]),
        ("file", [GeneratedFile]),
        ("image", [GeneratedImage]),
    ],
)
def test_outputs_of_every_kind(kind: str, types: list[type]) -> None:
    run = run_of(kind=kind)
    (output,) = loaded("Good").run([run], save_memory=False)
    assert output is not None
    assert [type(each) for each in output.outputs] == types
    assert output.warnings == ("a warning",)
    assert output.parameters == {"seed": 5}
    assert run.progress.steps == [(1, 2)]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    "kind",
    [
        *("none", "empty", "dict", "nan", "set"),
        *("no bytes", "media type", "extension", "format", "no image"),
    ],
)
def test_an_output_that_is_no_output_is_a_model_error(kind: str) -> None:
    with pytest.raises(ModelError):
        loaded("Good").run([run_of(kind=kind)], save_memory=False)


@pytest.mark.usefixtures("module")
def test_a_cancelled_run_is_interrupted_at_its_step() -> None:
    with pytest.raises(Interrupted):
        loaded("Good").run([run_of(cancelled=True)], save_memory=False)
    assert sys.modules["scripted_runner"].AFTER_STEP == []


@pytest.mark.usefixtures("module")
def test_progress_and_warnings_are_bounded() -> None:
    run = run_of()
    (output,) = loaded("Loud").run([run], save_memory=False)
    assert output is not None
    assert [len(warning) for warning in output.warnings] == [500] * 20
    assert run.progress.steps == [(2, 2), (0, 1)]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("module")
def test_a_batch_without_an_implementation_runs_one_by_one() -> None:
    outputs = loaded("OneByOne").run([run_of(), run_of(kind="json")], save_memory=False)
    assert [each and len(each.outputs) for each in outputs] == [1, 2]


@pytest.mark.usefixtures("module")
def test_one_request_of_a_batch_is_cancelled() -> None:
    model = loaded("Good")
    runs = [run_of(count=1), run_of(count=2, cancelled=True), run_of(count=3)]
    outputs = model.run(runs, save_memory=False)
    texts = [None if each is None else each.text.text for each in outputs]  # type: ignore[union-attr]
    assert texts == ["1", None, "3"]
    with pytest.raises(ModelError, match="another number"):
        model.run([run_of(kind="short")] * 2, save_memory=False)
    with pytest.raises(Interrupted):
        model.run([run_of(cancelled=True)] * 2, save_memory=False)
    keys = [model.batch_key(CustomRequest(parameters={"kind": kind})) for kind in ("text", "json")]
    assert keys == ["text", "json"]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("parameters", "images", "field"),
    [
        ({"count": 10}, 0, "parameters.count"),
        ({"count": "2"}, 0, "parameters.count"),
        ({"counts": 2}, 0, "parameters.counts"),
        ({"a\n": 2}, 0, "parameters.a"),
        ({}, 3, "images"),
    ],
)
def test_a_wrong_request_names_its_field(
    parameters: dict[str, Any], images: int, field: str
) -> None:
    sources = ("s3://generation/a.png",) * images or None
    request = CustomRequest(parameters=parameters, images=sources)
    with pytest.raises(UnsupportedParameter) as refused:
        loaded("Good").check(request)
    assert refused.value.parameter == field
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["NoRun", "BadImages", "function", "missing"])
def test_a_class_that_is_no_runner_is_a_wrong_setting(name: str) -> None:
    with pytest.raises(ModelMisconfigured, match=r"^MODEL_RUNNER: "):
        loaded(name)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["RaisesInLoad", "RaisesAtStart"])
def test_a_runner_that_cannot_be_loaded_is_unavailable(name: str) -> None:
    with pytest.raises(ModelUnavailable) as raised:
        loaded(name)
    assert "/secret" not in str(raised.value)
    closed = sys.modules["scripted_runner"].CLOSED
    assert closed == ([True] if name == "RaisesInLoad" else [])


@pytest.mark.usefixtures("module")
def test_the_schema_of_the_request_has_the_parameters_of_the_runner() -> None:
    schema = loaded("Good").description.request_schema
    assert schema is not None
    assert schema["properties"]["parameters"]["properties"].keys() == {"kind", "count"}


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "MODEL_RUNNER: must be set for MODEL_TYPE=custom: package.module:Class"),
        ({"runner": "scripted_runner"}, "MODEL_RUNNER: must be package.module:Class"),
        ({"runner": "no_such_module:A"}, "MODEL_RUNNER: there is no module no_such_module"),
        (
            {"runner": "scripted_runner:Good", "model_id": "a/b", "offload": "model"},
            "MODEL_ID, MODEL_OFFLOAD: not for MODEL_TYPE=custom",
        ),
    ],
)
def test_wrong_settings_are_found_without_the_runner(fields: dict[str, Any], line: str) -> None:
    assert find_setting_errors(Task.CUSTOM, ModelConfig(**fields)) == [line]
    assert "scripted_runner" not in sys.modules


def test_a_runner_is_refused_for_other_tasks() -> None:
    errors = find_setting_errors(Task.TEXT_TO_IMAGE, ModelConfig(runner="a:B"))
    assert errors == ["MODEL_RUNNER: only for MODEL_TYPE=custom"]
