"""In every family, a request and its seed determine the image, also after other jobs."""

# mypy: allow-untyped-calls

from collections.abc import Callable
from typing import Any

import pytest

from consumer.ports.model import Interrupted, ModelError
from consumer.runners import ModelRunner
from tests.support.family_table import FAMILIES, Family
from tests.support.image_runs import pipeline, pixels, run_small, small_request
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

OLD_CALLBACK = Family(
    title="PixArt, with the old callback",
    name="pixart",
    pipeline="PixArtSigmaPipeline",
    steps=20,
    guidance="guidance_scale",
    scale=4.5,
    negative=True,
    side=64,
    multiple=16,
    adapters=False,
)

each_family = pytest.mark.parametrize(
    "family", [*FAMILIES, OLD_CALLBACK], ids=lambda family: family.title
)


@pytest.fixture
def fresh(family: Family, model_folder: Folder, load: Load) -> ModelRunner:
    """Return a model that has run no job."""
    return load(model_folder(family.name, **family.options))


@pytest.fixture
def used(family: Family, shared_runner: Callable[..., ModelRunner]) -> ModelRunner:
    """Return the model that many tests share."""
    return shared_runner(family.name, **family.options)


def cancel(runner: ModelRunner, *, at_step: int, **fields: Any) -> None:
    steps: list[int] = []
    with pytest.raises(Interrupted):
        run_model(
            runner,
            small_request(**fields),
            [],
            on_step=lambda step, _: steps.append(step),
            cancelled=lambda: len(steps) == at_step,
        )
    assert steps == list(range(1, at_step + 1))  # no step follows the cancellation


def fail(runner: ModelRunner) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("raised by the test")

    hook = pipeline(runner).vae.decoder.register_forward_pre_hook(refuse)
    with pytest.raises(ModelError):
        run_small(runner, seed=9, num_inference_steps=2)
    hook.remove()


@each_family
def test_an_image_is_the_same_alone_and_after_other_jobs(
    family: Family, fresh: ModelRunner, used: ModelRunner
) -> None:
    alone = pixels(run_small(fresh))
    run_small(fresh, seed=8, num_inference_steps=5, height=96, prompt="another, longer prompt")
    assert pixels(run_small(fresh)) == alone  # three steps after five
    cancel(fresh, at_step=2, seed=8, num_inference_steps=5)
    assert pixels(run_small(fresh)) == alone
    fail(fresh)
    assert pixels(run_small(fresh)) == alone
    assert pixels(run_small(used)) == alone


@each_family
def test_a_job_within_another_job_changes_neither_image(family: Family, used: ModelRunner) -> None:
    # A scheduler that jobs share would raise an IndexError or change the images.
    inner_alone = pixels(run_small(used, seed=8, num_inference_steps=2))
    outer_alone = pixels(run_small(used))
    inner: list[list[bytes]] = []

    def between(step: int, _: int) -> None:
        if step == 1:
            inner.append(pixels(run_small(used, seed=8, num_inference_steps=2)))

    outer = run_model(used, small_request(), [], on_step=between)
    assert inner == [inner_alone]
    assert pixels(outer) == outer_alone


@each_family
def test_a_run_does_not_change_the_state_of_the_shared_pipeline(
    family: Family, used: ModelRunner
) -> None:
    shared = pipeline(used)

    def state() -> str:
        return str((shared.__dict__, shared.scheduler.__dict__, dict(shared.config)))

    before = state()
    scale = {} if family.guidance is None else {"guidance_scale": 2.0}
    run_small(used, num_inference_steps=4, **scale)
    cancel(used, at_step=1)
    assert state() == before


@each_family
def test_a_random_seed_is_reported_and_reproduces_the_image(
    family: Family, used: ModelRunner
) -> None:
    output = run_small(used, seed=None, num_inference_steps=2)
    (image,) = output.images
    assert output.parameters["seed"] == image.seed
    assert run_small(used, seed=None, num_inference_steps=2).images[0].seed != image.seed
    assert pixels(run_small(used, seed=image.seed, num_inference_steps=2)) == pixels(output)
