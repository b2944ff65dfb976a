"""Schedulers: which of them load with which pipeline, and the determinism of their images."""

# mypy: allow-untyped-calls

import gc
import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from consumer.ports.model import ModelError, ModelUnavailable, UnsupportedParameter
from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.text_to_image.schedulers import (
    fresh_scheduler,
    is_unusual,
    least_steps,
    require_kind,
)
from generation_contracts import Task
from tests.integration.small_runs import load_error
from tests.support.image_runs import pipeline, pixels, run_small
from tests.support.tiny_models import Folder, Load

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
SD3, XL, FLUX = "stable_diffusion_3", "stable_diffusion_xl", "flux"
OF_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
STEPS = {"num_inference_steps": 4}  # the minimum of PNDM
OPTIONS = [{}, {"stochastic_sampling": True}, {"algorithm_type": "sde-dpmsolver++"}]


def all_schedulers() -> Iterator[tuple[str, Any]]:
    """Yield each scheduler class of diffusers with each set of its options."""
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)
        if not inspect.isclass(kind) or not issubclass(kind, SchedulerMixin):
            continue
        parameters = inspect.signature(kind.__init__).parameters
        for flow in ({}, OF_FLOW):
            for options in ({**base, **flow} for base in OPTIONS):
                if options.keys() <= parameters.keys():
                    try:
                        yield name, kind(**options)
                    except (TypeError, NotImplementedError):
                        continue  # diffusers refuses this option for this class


@pytest.fixture(scope="module", params=[SD3, XL, FLUX])
def runner(request: pytest.FixtureRequest, model_folder: Folder) -> Iterator[ModelRunner]:
    """Load a model for this module only: the tests change its scheduler."""
    folder = str(model_folder(request.param))
    loaded = create_runner(Task.TEXT_TO_IMAGE, ModelConfig(model_id=folder))
    loaded.load()
    yield loaded
    loaded.close()


def documented(family: str) -> set[str]:
    """Return the schedulers that the document lists for a family."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {family} |")]
    assert len(rows) == 1
    return set(rows[0].split("|")[2].replace("`", " ").replace(",", " ").split())


@pytest.mark.filterwarnings("ignore:__array")  # diffusers with numpy 2
def test_each_scheduler_that_loads_takes_its_noise_from_the_seed(runner: ModelRunner) -> None:
    pipe = pipeline(runner)
    working = set()
    for name, scheduler in all_schedulers():
        pipe.scheduler = scheduler
        try:
            require_kind(pipe, "a model")
            first = run_small(runner, num_images=2, **STEPS)
        except (ModelUnavailable, ModelError):
            continue  # a model error would stop the first run of a worker
        working.add(name.removesuffix("Scheduler"))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert pixels(run_small(runner, num_images=2, **STEPS)) == pixels(first), (
            name,
            scheduler.config,
        )
        assert torch.equal(torch.get_rng_state(), state), name
        alone = np.asarray(run_small(runner, seed=8, **STEPS).images[0].image, dtype=int)
        difference = np.abs(alone - np.asarray(first.images[1].image, dtype=int))
        # Batches round differently; another seed changes nearly every value by more than 1.
        assert np.median(difference) <= 1, (name, scheduler.config)
    assert working == documented(type(pipe).__name__.removesuffix("Pipeline"))


def with_scheduler(folder: Path, name: str, **config: Any) -> Path:
    """Set another scheduler in the folder of a pipeline."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, **config}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("family", "scheduler", "config", "line"),
    [
        (
            SD3,
            "DDIMScheduler",
            {},
            "DDIMScheduler is for other weights: StableDiffusion3 needs a flow-matching scheduler",
        ),
        (
            SD3,
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            "UniPCMultistepScheduler is for other weights: ",
        ),
        (
            XL,
            "FlowMatchEulerDiscreteScheduler",
            {},
            "FlowMatchEulerDiscreteScheduler is a flow-matching scheduler, and StableDiffusionXL ",
        ),
        (
            XL,
            "DDIMInverseScheduler",
            {},
            "DDIMInverseScheduler adds noise instead of removing it",
        ),
        (
            XL,
            "DPMSolverSDEScheduler",
            {},
            "DPMSolverSDEScheduler ignores the seed of a request",
        ),
        (
            FLUX,
            "FlowMatchHeunDiscreteScheduler",
            {},
            "FlowMatchHeunDiscreteScheduler: the first run failed: ValueError",
        ),
        (
            XL,
            "EulerDiscreteScheduler",
            {"prediction_type": "v"},
            "EulerDiscreteScheduler: the first run failed: ValueError",
        ),
    ],
)
def test_an_unsuitable_scheduler_stops_the_start(
    *, family: str, scheduler: str, config: dict[str, Any], line: str, own_folder: Folder
) -> None:
    folder = with_scheduler(own_folder(family), scheduler, **config)
    assert load_error(folder).startswith(f"{family}: {line}")


@pytest.mark.parametrize(
    ("family", "scheduler", "config"),
    [
        (SD3, "FlowMatchLCMScheduler", {}),
        (SD3, "UniPCMultistepScheduler", OF_FLOW),
        (XL, "LCMScheduler", {}),
        # Some SDXL weights are trained with flow matching.
        (XL, "DPMSolverMultistepScheduler", OF_FLOW),
    ],
)
def test_an_unusual_scheduler_that_works_is_loaded(
    *, family: str, scheduler: str, config: dict[str, Any], own_folder: Folder, load: Load
) -> None:
    runner = load(with_scheduler(own_folder(family), scheduler, **config))
    assert pixels(run_small(runner)) == pixels(run_small(runner))


def test_a_scheduler_of_a_run_is_freed_without_the_garbage_collector(
    shared_runner: Callable[[str], ModelRunner],
) -> None:
    # A scheduler references tensors of its run, such as the outputs of the last steps.
    scheduler = fresh_scheduler(pipeline(shared_runner(SD3)).scheduler, [torch.Generator()])
    alive = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert alive() is None
    finally:
        gc.enable()


def test_fewer_steps_than_the_minimum_of_the_scheduler_are_refused(
    own_folder: Folder, load: Load
) -> None:
    runner = load(with_scheduler(own_folder(XL), "PNDMScheduler"), warm_up=True)
    with pytest.raises(UnsupportedParameter, match="num_inference_steps: must be at least 4"):
        run_small(runner, num_inference_steps=3)
    run_small(runner, num_inference_steps=4)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("EulerDiscreteScheduler", 1), ("UnCLIPScheduler", 2), ("HeliosScheduler", 1)],
)
def test_the_minimum_number_of_steps_is_1_if_it_is_unknown(scheduler: str, steps: int) -> None:
    # HeliosScheduler needs an argument of its pipeline for every number of steps.
    assert least_steps(getattr(diffusers, scheduler)()) == steps


@pytest.mark.parametrize(
    "kind", [diffusers.SanaPipeline, diffusers.SanaSprintPipeline], ids=["sana", "sana sprint"]
)
def test_a_flow_scheduler_of_a_pipeline_for_both_kinds_is_probed(kind: Any) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer"))
    pipe = kind(**parts, scheduler=scheduler)
    require_kind(pipe, "a model")
    assert is_unusual(pipe)
