"""A job whose files are signed, cannot be signed, or wait for a signature."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from consumer.jobs import image_stages
from consumer.ports.bus import ResultEvent
from consumer.ports.media import EncodedImage, SigningFailed
from generation_contracts import CancelledEvent, FailedEvent, ImageArtifact, SucceededEvent
from tests.support.behaviour import request_body, soon
from tests.support.memory_ports import Tally
from tests.support.memory_world import MemoryWorld, Worlds

REASON = "http://tsa.internal does not answer"


class Signatures:
    """Signs by appending bytes, fails for some images, or never ends.

    Attributes:
        futures: One for each submitted file.
        provenance: The values of each submitted file.
    """

    def __init__(self, *, failing: set[int] | None = None, hangs: bool = False) -> None:
        self.futures: list[Future[EncodedImage]] = []
        self.provenance: list[Mapping[str, str]] = []
        self.submitted = Tally()
        self._failing = failing or set()
        self._hangs = hangs

    def submit(self, image: EncodedImage, provenance: Mapping[str, str]) -> Future[EncodedImage]:
        future: Future[EncodedImage] = Future()
        index = len(self.futures)
        self.futures.append(future)
        self.provenance.append(provenance)
        self.submitted.add()
        if index in self._failing:
            future.set_exception(SigningFailed(REASON))
        elif not self._hangs:
            marks = (*image.marks, "c2pa")
            future.set_result(replace(image, data=image.data + b"signed", marks=marks))
        return future


async def work(world: MemoryWorld, *, deliveries: int = 1) -> ResultEvent:
    await world.send(request_body(num_images=2, seed=3))
    for _ in range(deliveries):
        await soon(world.work())
    event = await world.result("a")
    assert event is not None
    return event


def outputs_of(event: ResultEvent) -> list[ImageArtifact]:
    assert isinstance(event, SucceededEvent)
    return [output for output in event.outputs if isinstance(output, ImageArtifact)]


async def test_signed_files_are_stored(make_world: Worlds) -> None:
    signatures = Signatures()
    world = await make_world(credentials=signatures)
    outputs = outputs_of(await work(world))
    assert [output.marks for output in outputs] == [("c2pa",)] * 2
    for output in outputs:
        assert (await world.object(output.bucket, output.key)).endswith(b"signed")
    assert [values["seed"] for values in signatures.provenance] == ["3", "4"]
    assert [values["request_id"] for values in signatures.provenance] == ["a", "a"]


async def test_best_effort_stores_the_unsigned_file_with_a_warning(make_world: Worlds) -> None:
    world = await make_world(credentials=Signatures(failing={1}))
    with capture_logs() as logs:
        event = await work(world)
    assert [output.marks for output in outputs_of(event)] == [("c2pa",), ()]
    assert isinstance(event, SucceededEvent)
    assert event.warnings == ("image 1 has no Content Credentials: it could not be signed",)
    assert [report.unsigned for report in world.observer.reports] == [1]
    (line,) = [line for line in logs if line["event"] == "image_not_signed"]
    assert (line["index"], line["reason"]) == (1, REASON)


async def test_required_signature_fails_after_the_last_attempt(make_world: Worlds) -> None:
    signatures = Signatures(failing=set(range(9)))
    world = await make_world(credentials=signatures, credentials_required=True)
    event = await work(world, deliveries=3)
    assert isinstance(event, FailedEvent)
    assert event.failure.code == "internal"
    assert event.failure.details == {"cause": "not_signed"}
    assert REASON not in event.failure.message, "the address is for the operator"
    assert len(await world.dead_letters()) == 1
    assert await world.objects() == set()


async def test_required_signature_succeeds_at_another_attempt(make_world: Worlds) -> None:
    world = await make_world(credentials=Signatures(failing={0, 1}), credentials_required=True)
    event = await work(world, deliveries=2)
    assert [output.marks for output in outputs_of(event)] == [("c2pa",)] * 2
    assert await world.dead_letters() == []


@pytest.mark.parametrize("required", [False, True], ids=["best effort", "required"])
async def test_signature_that_takes_too_long_counts_as_failed(
    required: bool, make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_stages, "SIGN_TIMEOUT", 0.0)
    signatures = Signatures(hangs=True)
    world = await make_world(credentials=signatures, credentials_required=required)
    event = await work(world, deliveries=3 if required else 1)
    if required:
        assert isinstance(event, FailedEvent)
    else:
        assert [output.marks for output in outputs_of(event)] == [(), ()]
    assert all(future.cancelled() for future in signatures.futures)


async def test_cancellation_ends_the_wait_for_a_signature(make_world: Worlds) -> None:
    signatures = Signatures(hangs=True)
    world = await make_world(credentials=signatures)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(signatures.submitted.until(1))
    assert await world.executor.request_stop("a") is not None
    await soon(working)
    assert isinstance(await world.result("a"), CancelledEvent)
    assert all(future.cancelled() for future in signatures.futures)
