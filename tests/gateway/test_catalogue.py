"""The model catalogue: models of the workers, and models known without workers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from nats.aio.msg import Msg

from consumer.bus import services
from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.nats_internals import RobustClient
from consumer.bus.services import worker_metadata
from consumer.devstack import NatsServer
from consumer.gateway.catalogue import Catalogue
from consumer.gateway.errors import ApiError
from consumer.settings import Settings
from generation_contracts import Task
from generation_contracts.queues import QueueInfo, default_queues

FLUX = {"task": "text_to_image", "id": "black-forest-labs/FLUX.1-schnell", "worker": "a"}
QWEN = {"task": "image_to_text", "id": "Qwen/Qwen2.5-VL-7B-Instruct", "worker": "b"}


class Workers:
    """Workers and a clock, controlled by the test."""

    def __init__(self, *answers: Mapping[str, str]) -> None:
        self.answers: Sequence[Mapping[str, str]] = answers
        self.queries = 0
        self.down = False
        self.time = 100.0

    async def query(self) -> Sequence[Mapping[str, str]]:
        self.queries += 1
        await asyncio.sleep(0)
        if self.down:
            raise BusUnavailable("NATS: away")
        return self.answers

    def catalogue(self) -> Catalogue:
        return Catalogue(self.query, lambda: self.time)


async def names_of(catalogue: Catalogue) -> list[str]:
    return [model.name for model in await catalogue.models()]


async def test_the_catalogue_lists_the_models_of_the_workers() -> None:
    catalogue = Workers(FLUX, FLUX, QWEN).catalogue()
    assert await names_of(catalogue) == [FLUX["id"], QWEN["id"]]


@pytest.mark.parametrize(
    "name", [None, "", FLUX["id"], "FLUX.1-schnell", "flux.1-schnell", "text_to_image"]
)
async def test_a_model_has_several_names(name: str | None) -> None:
    catalogue = Workers(FLUX, QWEN).catalogue()
    assert await catalogue.name_of(name, Task.TEXT_TO_IMAGE) == FLUX["id"]


@pytest.mark.parametrize("name", [QWEN["id"], "image_to_text", "gpt-image-2", "FLUX"])
async def test_unknown_names_are_not_found(name: str) -> None:
    catalogue = Workers(FLUX, QWEN).catalogue()
    with pytest.raises(ApiError) as raised:
        await catalogue.name_of(name, Task.TEXT_TO_IMAGE)
    assert (raised.value.status, raised.value.code) == (404, "model_not_found")


async def test_without_workers_the_task_is_the_name_of_its_model() -> None:
    workers = Workers()
    catalogue = workers.catalogue()
    assert await names_of(catalogue) == ["text_to_image", "image_to_text"]
    assert await catalogue.name_of(None, Task.TEXT_TO_IMAGE) == "text_to_image"
    workers.down = True
    workers.time += 10
    assert await names_of(catalogue) == ["text_to_image", "image_to_text"]


async def test_an_unknown_name_is_unavailable_without_a_connection_to_workers() -> None:
    workers = Workers(FLUX)
    workers.down = True
    catalogue = workers.catalogue()
    for _ in range(2):
        with pytest.raises(ApiError) as raised:
            await catalogue.name_of(FLUX["id"], Task.TEXT_TO_IMAGE)
        assert (raised.value.status, raised.value.code) == (503, "unavailable")
        assert raised.value.headers["x-should-retry"] == "true"
    assert await catalogue.name_of(None, Task.TEXT_TO_IMAGE) == "text_to_image"
    workers.down = False
    assert await catalogue.name_of(FLUX["id"], Task.TEXT_TO_IMAGE) == FLUX["id"]
    with pytest.raises(ApiError) as raised:
        await catalogue.name_of("other", Task.TEXT_TO_IMAGE)
    assert raised.value.status == 404


async def test_a_model_remains_in_the_catalogue_after_its_workers_stop() -> None:
    workers = Workers(FLUX, QWEN)
    catalogue = workers.catalogue()
    before = await catalogue.models()
    workers.answers = [QWEN]
    workers.time += 10
    assert await names_of(catalogue) == [FLUX["id"], QWEN["id"]]
    assert await catalogue.name_of(FLUX["id"], Task.TEXT_TO_IMAGE) == FLUX["id"]
    assert [model.created for model in await catalogue.models()] == [
        model.created for model in before
    ]
    assert [model.is_loaded for model in await catalogue.models()] == [False, True]


async def test_a_new_model_replaces_the_former_model_of_its_task() -> None:
    workers = Workers(FLUX)
    catalogue = workers.catalogue()
    await catalogue.models()
    workers.answers = [{**FLUX, "id": "other"}]
    workers.time += 10
    assert (await names_of(catalogue))[0] == "other"
    with pytest.raises(ApiError):
        await catalogue.name_of(FLUX["id"], Task.TEXT_TO_IMAGE)


async def test_concurrent_callers_share_one_query() -> None:
    workers = Workers(FLUX)
    catalogue = workers.catalogue()
    await asyncio.gather(*(catalogue.name_of(None, Task.TEXT_TO_IMAGE) for _ in range(50)))
    await asyncio.gather(*(catalogue.models() for _ in range(50)))
    assert workers.queries == 1


async def test_a_known_model_is_returned_without_waiting_for_the_workers() -> None:
    workers = Workers(FLUX)
    catalogue = workers.catalogue()
    await catalogue.models()
    workers.time += 10
    found = catalogue.name_of(FLUX["id"], Task.TEXT_TO_IMAGE)
    with pytest.raises(StopIteration):  # the coroutine returns without a suspension
        found.send(None)
    await asyncio.sleep(0)
    assert workers.queries == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"task": "text_to_video", "id": "a"},
        {"id": "a"},
        {"task": "text_to_image"},
        {"task": "text_to_image", "id": "a" * 500},
        {"task": "text_to_image", "id": "a\nb"},
    ],
)
async def test_invalid_worker_metadata_is_ignored(answer: dict[str, str]) -> None:
    assert await names_of(Workers(answer).catalogue()) == ["text_to_image", "image_to_text"]


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    bus = await connect(Settings(nats_url=nats_server.url), name="test", within=10)
    yield bus
    await bus.close()


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[RobustClient]:
    """A connection that simulates workers; `flush` waits until its subscription is active."""
    connection = RobustClient()
    await connection.connect(nats_server.url)
    yield connection
    await connection.close()


async def test_a_query_without_workers_returns_at_once(bus: Bus) -> None:
    async with asyncio.timeout(0.5):
        assert await worker_metadata(bus) == []


async def test_a_query_waits_for_a_slow_worker(
    bus: Bus, client: RobustClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "QUERY_TIMEOUT", 30.0)

    async def answer(message: Msg) -> None:
        await asyncio.sleep(2 * services.QUIET)
        await message.respond(json.dumps({"metadata": FLUX}).encode())

    await client.subscribe("$SRV.INFO.generation", cb=answer)
    await client.flush()
    assert await worker_metadata(bus) == [FLUX]


async def test_a_query_without_replies_raises_an_error(
    bus: Bus, client: RobustClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "QUERY_TIMEOUT", 0.1)
    await client.subscribe("$SRV.INFO.generation")
    await client.flush()
    with pytest.raises(BusUnavailable, match="no worker has replied"):
        await worker_metadata(bus)


async def test_a_query_returns_every_valid_reply(bus: Bus, client: RobustClient) -> None:

    async def answer(message: Msg) -> None:
        for body in (
            b"junk",
            b"[1]",
            b'{"metadata": 5}',
            json.dumps({"metadata": FLUX}).encode(),
            json.dumps({"metadata": {**QWEN, "other": 5}}).encode(),
        ):
            await message.respond(body)

    await client.subscribe("$SRV.INFO.generation", cb=answer)
    await client.flush()
    assert await worker_metadata(bus) == [FLUX, QWEN]


SDXL = QueueInfo("sdxl", Task.TEXT_TO_IMAGE, "stabilityai/sdxl-turbo")


def catalogue_with_queue(workers: Workers) -> Catalogue:
    async def queues() -> Mapping[str, QueueInfo]:
        return {**default_queues(), SDXL.name: SDXL}

    return Catalogue(workers.query, lambda: workers.time, queues)


async def test_a_queue_is_listed_by_its_declared_model_without_workers() -> None:
    catalogue = catalogue_with_queue(Workers())
    assert await names_of(catalogue) == ["text_to_image", "image_to_text", SDXL.model]
    for name in ("stabilityai/sdxl-turbo", "SDXL-Turbo", "sdxl"):
        found = await catalogue.find(name, Task.TEXT_TO_IMAGE)
        assert (found.queue, found.name, found.is_loaded) == ("sdxl", SDXL.model, False)
    assert (await catalogue.find("sdxl-turbo", Task.IMAGE_TO_TEXT)).queue == "image_to_text"


async def test_workers_of_a_queue_do_not_change_its_name_and_the_default_queue_keeps_its_own() -> (
    None
):
    own = {"task": "text_to_image", "queue": "sdxl", "id": "folder", "worker": "c"}
    catalogue = catalogue_with_queue(Workers(FLUX, own))
    assert await names_of(catalogue) == [FLUX["id"], "image_to_text", SDXL.model]
    assert (await catalogue.find("sdxl", Task.TEXT_TO_IMAGE)).is_loaded
    assert (await catalogue.find(None, Task.TEXT_TO_IMAGE)).queue == "text_to_image"
    with pytest.raises(ApiError) as raised:
        await catalogue.find("other", Task.TEXT_TO_IMAGE)
    assert raised.value.status == 404


async def test_an_undeclared_default_queue_still_accepts_any_name() -> None:
    catalogue = catalogue_with_queue(Workers())
    assert (await catalogue.find("other", Task.TEXT_TO_IMAGE)).queue == "text_to_image"
