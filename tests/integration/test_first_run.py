"""The run before the first job: when it happens, its request, and its errors."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.ports.model import ModelError, ModelUnavailable, OutOfMemory, RunRequest
from consumer.runners import ModelConfig, create_runner
from consumer.runners.image_to_text import vision_language
from consumer.runners.text_to_image import diffusion
from generation_contracts import Request, Task, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.tiny_models import Folder, Load

MODELS = {
    Task.TEXT_TO_IMAGE: ("stable_diffusion_3", diffusion.DiffusionModel),
    Task.IMAGE_TO_TEXT: ("vision_language", vision_language.VisionLanguageModel),
}


class Runs:
    """Records the runs of a class of models, and runs the models."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        self.threads: list[str] = []
        self.fail_with: Exception | None = None
        self.fits_in_less = False  # whether a run that saves memory succeeds
        self.saving: list[bool] = []
        self.closed = 0
        run, close = model.run, model.close

        def record_run(this: Any, runs: Sequence[RunRequest], **options: Any) -> Any:
            self.requests += [run.request for run in runs]
            self.threads.append(threading.current_thread().name)
            self.saving.append(options["save_memory"])
            if self.fail_with and not (self.fits_in_less and options["save_memory"]):
                raise self.fail_with
            return run(this, runs, **options)

        def record_close(this: Any) -> None:
            self.closed += 1
            close(this)

        monkeypatch.setattr(model, "run", record_run)
        monkeypatch.setattr(model, "close", record_close)


@pytest.mark.parametrize("task", list(DEFAULT_QUEUES))
async def test_a_warm_up_is_a_run_of_two_steps_in_the_inference_thread(
    task: Task, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = MODELS[task]
    runs = Runs(model, monkeypatch)
    runner = create_runner(task, ModelConfig(model_id=str(model_folder(family)), warm_up=True))
    inference = InferenceWorker(runner, RunQueue())
    await inference.start()
    assert runs.threads == ["inference"]
    (request,) = runs.requests
    steps = "num_inference_steps" if task is Task.TEXT_TO_IMAGE else "max_new_tokens"
    assert getattr(request, steps) == 2
    await inference.stop()
    assert runs.closed == 1


def test_a_warm_up_has_at_most_the_default_number_of_steps(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    folder = model_folder("stable_diffusion_3")
    load(folder, warm_up=True, defaults={"num_inference_steps": 1})
    (request,) = runs.requests
    assert isinstance(request, TextToImageRequest)
    assert request.num_inference_steps == 1


def test_a_model_without_a_warm_up_runs_nothing_at_load(
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
    ids=["model error", "out of memory"],
)
def test_a_failed_first_run_stops_the_start_and_closes_the_model(
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


@pytest.mark.parametrize("fits_in_less", [True, False], ids=["fits", "does not fit"])
def test_a_probe_run_without_enough_memory_does_not_refuse_the_model(
    *,
    fits_in_less: bool,
    own_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(diffusion.DiffusionModel, monkeypatch)
    runs.fail_with, runs.fits_in_less = OutOfMemory("no room"), fits_in_less
    folder = own_folder("stable_diffusion_3")
    set_unusual_scheduler(folder)
    with capture_logs() as logs:
        load(folder)
    assert runs.saving == [False, True]
    assert runs.closed == 0
    not_probed = [entry["untried"] for entry in logs if entry["event"] == "first_run_out_of_memory"]
    name = "stable_diffusion_3: FlowMatchLCMScheduler"
    assert not_probed == ([] if fits_in_less else [(name,)])


def set_unusual_scheduler(folder: Path) -> None:
    """Give the model a scheduler that makes the runner probe it at the start."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    file.write_text(json.dumps(index))
