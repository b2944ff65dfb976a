"""The provenance metadata of an image file."""

import json
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from consumer.app.daemon import Daemon
from consumer.jobs.image_stages import ImageStages
from consumer.jobs.served_model import ServedModel
from consumer.media.provenance import provenance_of
from consumer.ports.model import GeneratedImage, RunnerOutput
from consumer.settings import Settings
from generation_contracts import ModelInfo, TextToImageRequest
from generation_contracts.events import ParameterValue
from tests.support.behaviour import request_body, soon
from tests.support.memory_ports import Run, raising
from tests.support.memory_world import MemoryWorld, Worlds

MODEL = ModelInfo(
    id="someone/model",
    revision="7f3c",
    family="flux",
    dtype="float32",
    device="cuda",
    libraries={"torch": "2.15.0+cpu", "diffusers": "0.42.0"},
)
PARAMETERS: dict[str, ParameterValue] = {"width": 64, "adapters": {"b": 0.5, "a": 1.0}}


def written(
    *, model: ModelInfo = MODEL, flagged: bool | None = None, with_prompt: bool = False
) -> dict[str, str]:
    return provenance_of(
        GeneratedImage(Image.new("RGB", (4, 4)), seed=8, flagged=flagged),
        request_id="poster-0001",
        request=TextToImageRequest(prompt="a lighthouse", negative_prompt="frame", seed=7),
        model=model,
        parameters=PARAMETERS,
        with_prompt=with_prompt,
    )


def test_provenance_has_the_model_and_no_prompt() -> None:
    assert written() == {
        "software": f"generation-consumer {version('generation-consumer')}",
        "request_id": "poster-0001",
        "seed": "8",
        "model": "someone/model",
        "revision": "7f3c",
        "libraries": '{"diffusers":"0.42.0","torch":"2.15.0+cpu"}',
        "parameters": '{"adapters":{"a":1.0,"b":0.5},"width":64}',
    }


def test_provenance_has_the_prompt_if_enabled() -> None:
    with_text = written(with_prompt=True)
    assert (with_text.pop("prompt"), with_text.pop("negative_prompt")) == ("a lighthouse", "frame")
    assert with_text == written()


@pytest.mark.parametrize(("flagged", "value"), [(True, "true"), (False, "false")])
def test_provenance_has_the_safety_flag(flagged: bool, value: str) -> None:
    assert written(flagged=flagged) == {**written(), "flagged": value}


@pytest.mark.parametrize("name", ["revision", "libraries"])
def test_model_without_a_value_has_none(name: str) -> None:
    assert name not in written(model=MODEL.model_copy(update={name: None}))


# -- in the life of a job -------------------------------------------------------------------------


def two_pictures(_: Run) -> RunnerOutput:
    images = [GeneratedImage(Image.new("RGB", (4, 4)), seed, flagged=False) for seed in (3, 4)]
    return RunnerOutput(outputs=tuple(images), parameters=PARAMETERS)


async def test_each_image_has_its_seed_and_the_used_parameters(
    world: MemoryWorld,
) -> None:
    world.runner.script_runs(two_pictures)
    await world.send(request_body(num_images=2, seed=3))
    await soon(world.work())
    one, other = world.images.provenance
    assert (one["seed"], other["seed"]) == ("3", "4")
    assert {**one, "seed": ""} == {**other, "seed": ""}
    assert (one["request_id"], one["model"], one["flagged"]) == ("a", "scripted", "false")
    assert json.loads(one["parameters"]) == PARAMETERS
    assert one.keys().isdisjoint({"prompt", "negative_prompt"})


async def test_prompt_is_in_images_if_the_worker_enables_it(make_world: Worlds) -> None:
    world = await make_world(prompt_in_images=True)
    await world.send(request_body())
    await soon(world.work())
    assert [one["prompt"] for one in world.images.provenance] == ["a red circle"]


async def test_provenance_does_not_depend_on_attempt_and_worker(
    make_world: Worlds,
) -> None:
    every: list[Any] = []
    for failures in (0, 2):
        world = await make_world()
        world.runner.script_runs(*[raising(lambda: KeyError("x"))] * failures)
        await world.send(request_body())
        for _ in range(failures + 1):
            await soon(world.work())
        every += world.images.provenance
    assert every == [every[0]] * 2


def stages_of(world: MemoryWorld, **settings_of_images: bool) -> ImageStages:
    settings = Settings(
        model_type="text_to_image",
        s3_access_key="a",
        s3_secret_key=SecretStr("b"),
        **settings_of_images,
    )
    daemon = Daemon(settings, lambda _: world.runner)
    durable = SimpleNamespace(ack_wait=1.0, max_ack_pending=1, max_attempts=3)
    services: Any = SimpleNamespace(
        durable=durable,
        events=world.events,
        queue=world.queue,
        workers=world.workers,
        artifacts=world.artifacts,
    )
    executor = daemon._make_executor(
        services,
        model=world.runner.description,
        runner=world.runner,
        served=ServedModel(settings.queue, world.runner.description.info.id),
    )
    return executor._image_stages


@pytest.mark.parametrize("setting", [True, False])
async def test_prompt_setting_reaches_the_worker(setting: bool, world: MemoryWorld) -> None:
    assert stages_of(world, consumer_prompt_in_pictures=setting).prompt_in_files is setting


@pytest.mark.parametrize(("setting", "marks"), [(True, ("iptc",)), (False, ())])
async def test_mark_setting_reaches_the_worker(
    setting: bool, marks: tuple[str, ...], world: MemoryWorld
) -> None:
    images = stages_of(world, consumer_ai_mark=setting).images
    assert images.encode(Image.new("RGB", (4, 4)), "png", seed=0).marks == marks
