"""The run before the first job: when it is made, of what, and what its failure says."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.ports import ModelError, ModelUnavailable, OutOfMemory
from consumer.runners import InferenceThread, ModelConfig, create_runner
from consumer.runners.image_to_text import vision_language
from consumer.runners.text_to_image import diffusion
from generation_contracts import Request, Task, TextToImageRequest
from tests.support.tiny_models import Folder, Load

MODELS = {
    Task.TEXT_TO_IMAGE: ("stable_diffusion_3", diffusion.DiffusionModel),
    Task.IMAGE_TO_TEXT: ("vision_language", vision_language.VisionLanguageModel),
}


class Runs:
    """Watches the runs of a class of models; they are made nonetheless."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        self.threads: list[str] = []
        self.fail_with: Exception | None = None
        self.fits_in_less = False  # whether a run that saves memory succeeds
        self.saving: list[bool] = []
        self.closed = 0
        run, close = model.run, model.close

        def watched(this: Any, request: Request, images: Sequence[Any], **how: Any) -> Any:
            self.requests.append(request)
            self.threads.append(threading.current_thread().name)
            self.saving.append(how["save_memory"])
            if self.fail_with and not (self.fits_in_less and how["save_memory"]):
                raise self.fail_with
            return run(this, request, images, **how)

        def closing(this: Any) -> None:
            self.closed += 1
            close(this)

        monkeypatch.setattr(model, "run", watched)
        monkeypatch.setattr(model, "close", closing)


@pytest.mark.parametrize("task", list(Task))
async def test_a_warm_up_is_a_run_of_two_steps_in_the_inference_thread(
    task: Task, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = MODELS[task]
    runs = Runs(model, monkeypatch)
    runner = create_runner(task, ModelConfig(model_id=str(model_folder(family)), warm_up=True))
    inference = InferenceThread()
    await inference.call(runner.load)
    assert [name.rstrip("0123456789") for name in runs.threads] == ["inference_"]
    (request,) = runs.requests
    steps = "num_inference_steps" if task is Task.TEXT_TO_IMAGE else "max_new_tokens"
    assert getattr(request, steps) == 2
    await inference.call(runner.close)
    inference.close()


def test_the_steps_of_a_warm_up_are_no_more_than_the_default(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    folder = model_folder("stable_diffusion_3")
    load(folder, warm_up=True, defaults={"num_inference_steps": 1})
    (request,) = runs.requests
    assert isinstance(request, TextToImageRequest)
    assert request.num_inference_steps == 1


def test_without_options_nothing_is_run_at_load(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    load(model_folder("stable_diffusion_3"), vae_tiling=True)
    assert runs.requests == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("RuntimeError"), "MODEL_WARM_UP: the first run failed: RuntimeError"),
        (OutOfMemory("no room"), "MODEL_WARM_UP: the first run failed: no room"),
    ],
)
def test_a_first_run_that_fails_stops_the_start_and_lets_go_of_the_model(
    error: Exception, line: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    runs.fail_with = error
    folder = model_folder("stable_diffusion_3")
    runner = create_runner(Task.TEXT_TO_IMAGE, ModelConfig(model_id=str(folder), warm_up=True))
    with pytest.raises(ModelUnavailable) as refused:
        runner.load()
    assert str(refused.value) == line
    assert runs.closed == 1
    with pytest.raises(ModelUnavailable, match="no model is loaded"):
        runner.check(runs.requests[0])


@pytest.mark.parametrize("fits_in_less", [True, False])
def test_a_trial_that_is_out_of_memory_does_not_refuse_the_model(
    *,
    fits_in_less: bool,
    own_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    runs.fail_with, runs.fits_in_less = OutOfMemory("no room"), fits_in_less
    folder = own_folder("stable_diffusion_3")
    with_an_unnamed_scheduler(folder)
    with capture_logs() as logs:
        load(folder)
    assert runs.saving == [False, True]
    assert runs.closed == 0
    untried = [entry["untried"] for entry in logs if entry["event"] == "first_run_out_of_memory"]
    name = "stable_diffusion_3: FlowMatchLCMScheduler"
    assert untried == ([] if fits_in_less else [(name,)])


def with_an_unnamed_scheduler(folder: Path) -> None:
    """Have the model tried at the start, without a setting that asks for it."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    file.write_text(json.dumps(index))
