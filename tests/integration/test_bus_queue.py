"""Lookup of requests by id, and calls to all workers, on a real server."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from nats.aio.msg import Msg

from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.endpoints import worker_service as worker_service_module
from consumer.endpoints.worker_service import WorkerBackend, WorkerService
from consumer.jobs.served_model import ServedModel
from consumer.ports.bus import IdLookup, StopAck
from generation_contracts import ModelInfo, Subjects, Task, UploadReply, UploadRequest
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import QueueInfo
from tests.integration.bus_installation import TASK, Installation, soon, take
from tests.support.memory_ports import MemoryObserver

OTHER = Task.IMAGE_TO_TEXT
DURABLES = {task: str(task) for task in DEFAULT_QUEUES}
MODEL = ModelInfo(id="none", family="none", dtype="float32", device="cpu")


def queue_of(installation: Installation, durable: str = str(TASK)) -> JetStreamQueue:
    return JetStreamQueue(installation.bus, installation.subjects, {**DURABLES, TASK: durable})


def workers_of(installation: Installation) -> BroadcastWorkers:
    return BroadcastWorkers(installation.bus, installation.subjects, queue=TASK, durables=DURABLES)


@pytest.fixture
def api_calls(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the subjects of all calls to the server."""
    client = installation.bus.client
    request, subjects = client.request, []

    async def recorded(subject: str, *args: Any, **kwargs: Any) -> Msg:
        subjects.append(subject)
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(client, "request", recorded)
    return subjects


async def store_result(installation: Installation, task: Task, request_id: str) -> None:
    subject = installation.subjects.result(task, request_id)
    await installation.plain.jetstream().publish(subject, b"{}")


async def test_the_lookup_of_an_id_with_many_requests_loads_no_message(
    installation: Installation, api_calls: list[str]
) -> None:
    queue = queue_of(installation)
    await store_result(installation, OTHER, "a")
    for number in range(200):
        await installation.publish(str(number).encode(), request_id="a")
    found = await soon(queue.find("a"))
    assert found == IdLookup(requests=frozenset({TASK}), results=frozenset({OTHER}))
    # The queue reads the list of queues and the state of each stream, and no message.
    assert [subject.split(".")[3] for subject in api_calls] == ["LIST", *["INFO"] * 3]
    oldest = await soon(queue.oldest(TASK, "a"))
    assert oldest is not None
    assert (oldest.delivery.body, oldest.never_delivered) == (b"0", True)
    assert len(api_calls) == 6


async def test_an_unknown_id_is_not_found(installation: Installation, api_calls: list[str]) -> None:
    queue = queue_of(installation)
    await installation.publish(request_id="b")
    await installation.publish()  # without an id in the subject
    assert await soon(queue.find("a")) == await soon(queue.find("c"))
    assert (await soon(queue.find("a"))).requests == frozenset()
    assert await soon(queue.oldest(TASK, "a")) is None
    api_calls.clear()
    assert await soon(queue.older(TASK, "a", at(10, None))) is None
    assert len(api_calls) == 1


@pytest.mark.parametrize("durable", [str(TASK), "of-another-name"])
async def test_a_delivered_request_is_recognized(durable: str, installation: Installation) -> None:
    queue = queue_of(installation, durable)
    worker = await installation.worker()
    await installation.publish(request_id="delivered")
    await soon(take(worker))
    await installation.publish(request_id="waiting")
    states = {}
    for request_id in ("delivered", "waiting"):
        stored = await soon(queue.oldest(TASK, request_id))
        assert stored is not None
        states[request_id] = stored.never_delivered
    assert states == {"delivered": False, "waiting": durable == str(TASK)}


async def test_a_request_in_a_stream_without_consumers_was_never_delivered(
    installation: Installation,
) -> None:
    subject = installation.subjects.request(OTHER, "a")
    await installation.plain.jetstream().publish(subject, b"{}")
    stored = await soon(queue_of(installation).oldest(OTHER, "a"))
    assert stored is not None
    assert stored.never_delivered


async def test_an_older_request_with_the_same_id_is_found(installation: Installation) -> None:
    queue = queue_of(installation)
    first = await installation.publish(b"first", request_id="a")
    second = await installation.publish(b"second", request_id="a")
    without_id = await installation.publish(b"third")
    for sequence, older in ((first, None), (second, b"first"), (without_id, b"first")):
        own = None if sequence == without_id else "a"
        delivery = await soon(queue.older(TASK, "a", at(sequence, own)))
        assert (None if delivery is None else delivery.body) == older


async def test_only_the_first_owner_mark_of_an_id_is_stored(
    installation: Installation,
) -> None:
    marks = AttemptMarks(installation.bus, installation.subjects, TASK)
    queue = queue_of(installation)
    subject = f"{installation.subjects.releases(TASK)}.owner.a"
    await installation.plain.publish(subject, b"a reply of the server")
    assert await soon(queue.owner(TASK, "a")) is None
    for digest in ("sha256:first", "sha256:second"):
        await soon(marks.mark_owner("a", digest))
        assert await soon(queue.owner(TASK, "a")) == "sha256:first"


async def test_a_cancellation_mark_is_read_by_the_next_worker(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(request_id="a")
    delivery = await take(worker)
    assert not await soon(delivery.was_cancelled())
    stored = await soon(queue_of(installation).oldest(TASK, "a"))
    assert stored is not None
    await soon(stored.delivery.mark_cancelled())
    await soon(delivery.nak())
    assert await soon((await take(worker)).was_cancelled())


def at(sequence: int, request_id: str | None) -> Any:
    """Return a delivery with only the fields that `older` reads."""
    return SimpleNamespace(stream_sequence=sequence, subject=Subjects().request(TASK, request_id))


class RemoteWorker:
    """A worker service that has these requests in progress."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids
        self.stopped: list[str] = []

    async def request_stop(self, request_id: str) -> StopAck | None:
        self.stopped.append(request_id)
        return StopAck.STOPPING if request_id in self.ids else None

    async def start(self, installation: Installation) -> WorkerService:
        """Start the service on the connection of the installation."""

        async def cancel(_: str) -> Any:
            raise AssertionError("this test sends no cancellation")

        def sign_upload(_: UploadRequest) -> UploadReply:
            raise AssertionError("this test sends no upload request")

        backend = WorkerBackend(
            served=ServedModel(QueueInfo(str(TASK), TASK), MODEL.id),
            queue_for=queue_of(installation).queue_for,
            task=TASK,
            worker="w",
            model=MODEL,
            reply_prefixes=("_INBOX.",),
            check=lambda _: None,
            cancel=cancel,
            request_stop=self.request_stop,
            is_running=self.ids.__contains__,
            sign_upload=sign_upload,
            observer=MemoryObserver(),
        )
        service = WorkerService(installation.bus, installation.subjects, backend)
        await service.start()
        return service


async def test_the_lookup_of_a_request_in_progress_does_not_stop_the_request(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, other = workers_of(installation), RemoteWorker("a")
    service = await other.start(installation)
    assert not await soon(workers.is_in_progress("a"))  # the calling process ignores itself
    monkeypatch.setattr(worker_service_module, "PROCESS", b"another process")
    assert await soon(workers.is_in_progress("a"))
    assert not await soon(workers.is_in_progress("b"))
    assert other.stopped == []
    await service.close()


async def test_a_lookup_stops_no_request_of_a_worker_of_an_earlier_version(
    installation: Installation,
) -> None:
    subjects: list[str] = []

    async def interrupt(message: Msg) -> None:
        """Stop the request whose id is the last token, as the earlier version did."""
        subjects.append(message.subject.rpartition(".")[2])
        if subjects[-1] == "a":
            await message.respond(b"stopping")

    await installation.listen(Subjects().interrupts, interrupt)
    assert not await soon(workers_of(installation).is_in_progress("a"))
    assert len(subjects) == 1
    assert await soon(await workers_of(installation).request_stop("a")) is StopAck.STOPPING


async def test_a_stop_request_is_sent_before_its_reply_is_awaited(
    installation: Installation,
) -> None:
    received = asyncio.Event()

    async def interrupt(_: Msg) -> None:
        received.set()

    await installation.listen(Subjects().interrupts, interrupt)
    answer = await workers_of(installation).request_stop("a")
    assert not answer.done()
    await soon(received.wait())
    assert await soon(answer) is None


async def test_an_idle_worker_is_detected_by_its_waiting_pull_request(
    installation: Installation,
) -> None:
    workers = workers_of(installation)
    assert not await soon(workers.others_idle())
    other = await installation.worker()
    waiting = asyncio.create_task(other.loop.next())
    await installation.until_pulls_wait(1)
    assert await soon(workers.others_idle())
    other.loop.stop()
    assert await soon(waiting) is None
