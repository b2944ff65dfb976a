"""Tests of how a worker handles a request, for any bus and object store.

`Behaviour` is an abstract suite: a test module subclasses it and defines a `make_world` fixture.
Every world has a scripted model. Each world implements its deliveries, events and objects itself.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

import pytest

from consumer.inference import monitor
from consumer.inference.cancel_token import StopReason
from consumer.jobs import finalizer, image_stages
from consumer.jobs.executor import Executor
from consumer.jobs.outcomes import EXIT_DEVICE_LOST
from consumer.ports.bus import DeadLetter, ResultEvent
from consumer.ports.model import DeviceLost, GeneratedText, ModelError, RunnerOutput
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    FailureCode,
    ImageArtifact,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    Task,
    TextOutput,
)
from tests.support.daemon_logging import daemon_logging
from tests.support.memory_ports import (
    POLL,
    Hold,
    MemoryObserver,
    Run,
    Script,
    ScriptedRunner,
    make,
    out_of_memory,
    raising,
)

T = TypeVar("T")

SOON = 15.0  # seconds; only bounds a wait for something that must happen
INBOX, OTHER_INBOX = "_INBOX.sender.1", "_INBOX.sender.2"


class Service(Protocol):
    """A service that the worker depends on."""

    def begin(self) -> None:
        """Begin an outage."""

    def end(self) -> None:
        """End the outage."""


class World(Protocol):
    """One worker with its bus and store.

    Attributes:
        runner: The scripted model.
        executor: The object under test.
        observer: Records the notifications of the executor.
        image_file: An image file of 4 by 4 pixels that the worker's codec can read.
    """

    runner: ScriptedRunner
    executor: Executor
    observer: MemoryObserver
    image_file: bytes

    @property
    def store(self) -> Service:
        """The object store, which can become unavailable."""

    @property
    def bus(self) -> Service:
        """The bus, which can become unavailable."""

    async def send(
        self,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Publish a request. With an id, use the request subject that ends with the id."""

    async def work(self) -> int | None:
        """Handle the next delivery as the daemon does, and return the exit code, if any."""

    async def pending(self) -> int:
        """Return the number of requests in the streams."""

    async def result(self, request_id: str) -> ResultEvent | None:
        """Return the stored terminal event."""

    async def replies(self) -> list[tuple[str, ResultEvent]]:
        """Return all replies so far, with their subjects."""

    async def transient_events(self, request_id: str) -> list[StartedEvent | ProgressEvent]:
        """Return the transient events of a request so far."""

    async def dead_letters(self) -> list[tuple[DeadLetter, bytes]]:
        """Return the dead letters so far."""

    def source(self, name: str) -> dict[str, str]:
        """Return the source of an input image in a request."""

    async def put_object(self, name: str, data: bytes) -> None:
        """Store an input image."""

    async def object(self, bucket: str, key: str) -> bytes:
        """Return the bytes of an object."""

    async def objects(self) -> set[str]:
        """Return the keys of all objects."""

    async def until_store_call_fails(self) -> None:
        """Return once a call of the worker to the store has failed."""


MakeWorld = Callable[..., Awaitable[World]]


def request_body(request_id: str | None = "a", **fields: Any) -> bytes:
    """Return the JSON body of a request for an image."""
    identity = {} if request_id is None else {"request_id": request_id}
    return json.dumps({"prompt": "a red circle", **identity, **fields}).encode()


def from_now(**delay: float) -> str:
    """Return the time after a delay, in the RFC 3339 format."""
    return (datetime.now(UTC) + timedelta(**delay)).isoformat()


async def soon(value: Awaitable[T]) -> T:
    """Await something that must happen within `SOON` seconds."""
    async with asyncio.timeout(SOON):
        return await value


async def while_running(world: World, hold: Hold, act: Callable[[], object]) -> int | None:
    """Handle the next delivery, and call `act` once the run has started."""
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    act()
    return await soon(working)


def writing(*texts: str) -> Callable[[Run], None]:
    """Return a function that adds each text in a separate step of a run."""

    def write(run: Run) -> None:
        for step, text in enumerate(texts, start=1):
            run.on_step(step, len(texts))
            if run.on_text is not None:
                run.on_text(text)
        run.written.extend(texts)

    return write


def ending(last: str) -> Script:
    """Return a run that adds a last text and returns the complete text."""

    def end(run: Run) -> RunnerOutput:
        writing(last)(run)
        text = GeneratedText("".join(run.written), "stop", prompt_tokens=3, completion_tokens=2)
        return RunnerOutput(outputs=(text,))

    return end


def text_of(events: Iterable[StartedEvent | ProgressEvent]) -> str:
    """Return the joined text of the progress events."""
    return "".join(event.text or "" for event in events if isinstance(event, ProgressEvent))


def failure(event: ResultEvent | None) -> FailureCode:
    """Return the failure code of a failed event."""
    assert isinstance(event, FailedEvent)
    return event.failure.code


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the polling and retry intervals. No test depends on their length."""
    monkeypatch.setattr(monitor, "PROGRESS_INTERVAL", 0.002)
    monkeypatch.setattr(image_stages, "STORE_PAUSE_FIRST", 0.001)
    monkeypatch.setattr(image_stages, "STORE_PAUSE_MOST", 0.002)
    monkeypatch.setattr(finalizer, "COPY_DELAY", 0.0)


class Behaviour:
    """The tests that every world must pass."""

    @pytest.fixture(autouse=True)
    def _short_pauses_and_logs(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        shorten_pauses(monkeypatch)
        with daemon_logging():  # structlog's default takes seconds to format one traceback
            yield

    @pytest.fixture
    async def world(self, make_world: MakeWorld) -> World:
        """A worker that makes images."""
        return await make_world()

    # -- success ----------------------------------------------------------------------------------

    async def test_worker_runs_stores_publishes_and_replies(self, world: World) -> None:
        sent = request_body(num_images=2, seed=7, metadata={"customer": "42"}, reply_to=INBOX)
        await world.send(sent)
        assert await soon(world.work()) is None
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert (done.attempt, done.task, done.metadata) == (1, "text_to_image", {"customer": "42"})
        assert [output.seed for output in done.outputs if isinstance(output, ImageArtifact)] == [
            7,
            8,
        ]
        assert done.timings.inference > 0
        for output in done.outputs:
            assert isinstance(output, ImageArtifact)
            data = await world.object(output.bucket, output.key)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (output.size, output.sha256)
        assert await world.replies() == [(INBOX, done)]
        assert await world.pending() == 0
        assert await world.dead_letters() == []
        assert world.observer.outcomes == ["succeeded"]

    async def test_events_of_a_request_are_numbered_in_order(self, world: World) -> None:
        await world.send(request_body())
        await soon(world.work())
        started, progress = await world.transient_events("a")
        done = await world.result("a")
        assert isinstance(started, StartedEvent)
        assert isinstance(progress, ProgressEvent)
        assert (progress.step, progress.of, progress.eta) == (1, 1, 0.0)
        assert done is not None
        assert [started.sequence, progress.sequence, done.sequence] == [0, 1, 2]
        assert world.observer.steps == 1

    async def test_image_to_text_request_gets_a_text(self, make_world: MakeWorld) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        image = world.source("one")
        await world.send(request_body(images=[image, image]))
        await soon(world.work())
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        text = TextOutput(
            text="2 images", finish_reason="stop", prompt_tokens=3, completion_tokens=2, seed=None
        )
        assert done.outputs == (text,)
        assert done.ai_generated is True
        assert [image.size for image in world.runner.runs[0].images] == [(4, 4), (4, 4)]
        assert await world.pending() == 0

    async def test_started_event_has_the_defaults_of_the_model(self, world: World) -> None:
        await world.send(request_body())
        await soon(world.work())
        started, *_ = await world.transient_events("a")
        assert isinstance(started, StartedEvent)
        assert started.defaults == {"num_inference_steps": 1}  # the default width is None: no entry

    async def test_result_has_the_parameters_and_the_safety_flags(self, world: World) -> None:
        parameters = {"width": 4, "guidance_scale": 3.5, "adapters": {"pencil": 0.5}}

        def flag(run: Run) -> RunnerOutput:
            flags = zip(make(run).images, (True, False, None), strict=True)
            images = tuple(replace(image, flagged=flagged) for image, flagged in flags)
            return RunnerOutput(outputs=images, parameters=parameters)

        world.runner.script_runs(flag)
        await world.send(request_body(num_images=3))
        await soon(world.work())
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert done.parameters == parameters
        assert done.ai_generated is True
        flags = [one.flagged for one in done.outputs if isinstance(one, ImageArtifact)]
        assert flags == [True, False, None]

    async def test_text_output_has_its_sampling_seed(self, make_world: MakeWorld) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        text = GeneratedText("a circle", "stop", prompt_tokens=3, completion_tokens=2, seed=9)
        world.runner.script_runs(lambda _: RunnerOutput(outputs=(text,)))
        await world.send(request_body(images=[world.source("one")]))
        await soon(world.work())
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        (output,) = done.outputs
        assert isinstance(output, TextOutput)
        assert output.seed == 9

    # -- streamed text ----------------------------------------------------------------------------

    async def test_streamed_parts_of_a_text_are_the_complete_text(
        self, make_world: MakeWorld
    ) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        hold = world.runner.hold_next_run(
            before=writing("  A lighthouse", " at"), then=ending(" dusk.\n")
        )
        await world.send(request_body(images=[world.source("one")], stream=True))
        working = asyncio.create_task(world.work())
        while not text_of(await world.transient_events("a")) and not working.done():
            await asyncio.wait({working}, timeout=POLL)
        assert await world.result("a") is None  # the model is still writing
        hold.release()
        await soon(working)
        done, events = await world.result("a"), await world.transient_events("a")
        assert isinstance(done, SucceededEvent)
        (output,) = done.outputs
        assert isinstance(output, TextOutput)
        assert text_of(events) == output.text == "  A lighthouse at dusk.\n"
        assert max(event.sequence for event in events) < done.sequence

    async def test_text_is_not_streamed_unless_the_request_asks_for_it(
        self, make_world: MakeWorld
    ) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        world.runner.script_runs(ending("a text"))
        await world.send(request_body(images=[world.source("one")]))
        await soon(world.work())
        assert isinstance(await world.result("a"), SucceededEvent)
        assert text_of(await world.transient_events("a")) == ""

    async def test_second_run_restarts_the_text_at_step_0(self, make_world: MakeWorld) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        hold = world.runner.hold_next_run(
            before=writing("first", "words", "lost"), then=raising(out_of_memory)
        )
        world.runner.script_runs(
            lambda one: [writing("A", " lighthouse")(one), ending(".")(one)][1]
        )
        await world.send(request_body(images=[world.source("one")], stream=True))
        working = asyncio.create_task(world.work())
        while text_of(await world.transient_events("a")) != "firstwordslost" and not working.done():
            await asyncio.wait({working}, timeout=POLL)
        hold.release()
        await soon(working)
        events = [
            event for event in await world.transient_events("a") if isinstance(event, ProgressEvent)
        ]
        (restart,) = [number for number, event in enumerate(events) if event.step == 0]
        assert (events[restart].text, events[restart].of) == (None, 3)
        assert text_of(events[:restart]) == "firstwordslost"
        assert text_of(events[restart:]) == "A lighthouse."

    async def test_request_without_an_id_gets_the_same_id_at_every_delivery(
        self, world: World
    ) -> None:
        world.runner.script_runs(raising(lambda: ModelError("E")))
        await world.send(request_body(None, reply_to=INBOX))
        for _ in range(2):
            await soon(world.work())
        ((_, event),) = await world.replies()
        assert await world.result(event.request_id) == event
        assert event.attempt == 2

    # -- stored results ---------------------------------------------------------------------------

    async def test_second_copy_gets_the_stored_event_and_is_not_run(self, world: World) -> None:
        for reply_to in (INBOX, OTHER_INBOX):  # `reply_to` is not part of the request digest
            await world.send(request_body(reply_to=reply_to))
            await soon(world.work())
        done = await world.result("a")
        assert await world.replies() == [(INBOX, done), (OTHER_INBOX, done)]
        assert len(world.runner.runs) == 1
        assert await world.pending() == 0
        assert world.observer.outcomes == ["succeeded", "already_done"]

    async def test_only_the_sender_of_the_conflicting_request_gets_the_conflict(
        self, world: World
    ) -> None:
        await world.send(request_body())
        await world.send(request_body(width=32, reply_to=INBOX))
        await soon(world.work())
        first = await world.result("a")
        await soon(world.work())
        ((subject, conflict),) = await world.replies()
        assert (subject, failure(conflict)) == (INBOX, "request_id_conflict")
        assert await world.result("a") == first
        assert len(world.runner.runs) == 1
        assert await world.pending() == 0
        assert world.observer.outcomes == ["succeeded", "request_id_conflict"]

    # -- refusals ---------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"not json", "the body is not JSON"),
            (b'"text"', "object"),
            (b'{"prompt":"x","colour":"red"}', "colour: there is no such field"),
            (b'{"prompt":"x","width":"512"}', "width: "),
            (b'{"prompt":"x","width":100000}', "width: "),
            (b'{"prompt":"x","num_images":0}', "num_images: "),
            (b'{"prompt":"x","request_id":"a.b"}', "request_id: "),
            (b'{"prompt":"x","reply_to":"$JS.API.STREAM.DELETE.X"}', "reply_to: "),
        ],
    )
    async def test_invalid_request_fails_and_is_dead_lettered_without_a_run(
        self, world: World, body: bytes, message: str
    ) -> None:
        await world.send(body, request_id="a", headers={"Reply-To": INBOX})
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "invalid_request"
        assert isinstance(event, FailedEvent)
        assert message in event.failure.message
        assert await world.replies() == [(INBOX, event)]
        ((letter, original),) = await world.dead_letters()
        assert (letter.code, letter.request_id, original) == ("invalid_request", "a", body)
        assert world.runner.runs == []
        assert await world.pending() == 0

    async def test_unsupported_parameter_fails_the_request(self, world: World) -> None:
        await world.send(request_body(negative_prompt="text"))
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "unsupported_parameter"
        assert isinstance(event, FailedEvent)
        assert event.failure.details == {"parameter": "negative_prompt"}
        assert world.runner.runs == []
        assert (await world.pending(), await world.dead_letters()) == (0, [])

    async def test_images_with_too_many_pixels_together_are_refused(
        self, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("consumer.jobs.image_stages.MAX_INPUT_PIXELS", 2 * 4 * 4)
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        image = world.source("one")
        await world.send(request_body("a", images=[image] * 3))
        await soon(world.work())
        assert failure(await world.result("a")) == "input_unavailable"
        assert world.runner.runs == []
        await world.send(request_body("b", images=[image] * 2))
        await soon(world.work())
        assert isinstance(await world.result("b"), SucceededEvent)

    @pytest.mark.parametrize("second", ["gone", "broken"])
    async def test_error_message_names_the_unavailable_input(
        self, make_world: MakeWorld, second: str
    ) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("good", world.image_file)
        await world.put_object("broken", b"no image")
        images = [world.source(name) for name in ("good", second)]
        await world.send(request_body(images=images))
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "input_unavailable"
        assert isinstance(event, FailedEvent)
        assert event.failure.message.startswith("images.1: ")
        assert world.runner.runs == []
        assert (await world.pending(), await world.dead_letters()) == (0, [])

    # -- stops ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("deadline", ["0001-01-01T00:00:00Z", "2020-01-01T00:00:00+02:00"])
    async def test_request_after_its_deadline_fails_and_never_runs(
        self, world: World, deadline: str
    ) -> None:
        await world.send(request_body(deadline=deadline))
        await soon(world.work())
        assert failure(await world.result("a")) == "deadline_exceeded"
        assert world.runner.runs == []
        assert (await world.pending(), await world.dead_letters()) == (0, [])

    @pytest.mark.parametrize("deadline", ["9999-12-31T23:59:59Z", None])
    async def test_request_before_its_deadline_succeeds(
        self, world: World, deadline: str | None
    ) -> None:
        await world.send(request_body(deadline=deadline or from_now(hours=1)))
        await soon(world.work())
        assert isinstance(await world.result("a"), SucceededEvent)

    async def test_deadline_stops_the_run(self, world: World) -> None:
        world.runner.hold_next_run()
        await world.send(request_body(deadline=from_now(seconds=0.2)))
        await soon(world.work())
        assert failure(await world.result("a")) == "deadline_exceeded"
        assert await world.objects() == set()
        assert await world.pending() == 0

    async def test_cancelled_event_is_published_once_the_device_has_stopped(
        self, world: World
    ) -> None:
        hold = world.runner.hold_next_run()
        await world.send(request_body(reply_to=INBOX))
        assert not world.executor.interrupt(StopReason.CANCEL, "a")
        found: list[bool] = []

        def cancel() -> None:
            found.extend(world.executor.interrupt(StopReason.CANCEL, one) for one in ("other", "a"))

        await while_running(world, hold, cancel)
        assert found == [False, True]
        event = await world.result("a")
        assert isinstance(event, CancelledEvent)
        assert await world.replies() == [(INBOX, event)]
        assert await world.pending() == 0
        assert not world.executor.interrupt(StopReason.CANCEL, "a")
        assert world.observer.outcomes == ["cancelled"]

    async def test_drained_run_is_requeued_for_another_worker(self, world: World) -> None:
        hold = world.runner.hold_next_run()
        await world.send(request_body())
        code = await while_running(world, hold, lambda: world.executor.interrupt(StopReason.DRAIN))
        assert code is None
        assert await world.result("a") is None
        assert await world.pending() == 1
        await soon(world.work())
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert done.attempt == 2
        assert world.observer.outcomes == ["requeued", "succeeded"]

    async def test_requeued_delivery_does_not_count_as_an_attempt(self, world: World) -> None:
        await world.send(request_body())
        for _ in range(3):
            hold = world.runner.hold_next_run()
            await while_running(world, hold, lambda: world.executor.interrupt(StopReason.DRAIN))
        world.runner.script_runs(raising(lambda: ModelError("ValueError")))
        await soon(world.work())
        assert (await world.result("a"), await world.pending()) == (None, 1)
        await soon(world.work())
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert done.attempt == 5
        assert await world.dead_letters() == []

    async def test_cancelled_job_task_requeues_the_request(self, world: World) -> None:
        hold = world.runner.hold_next_run(polls_cancel=False)
        await world.send(request_body())
        working = asyncio.create_task(world.work())
        await soon(hold.started())
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(working)
        assert (await world.result("a"), await world.pending()) == (None, 1)
        hold.release()
        await soon(world.work())
        assert isinstance(await world.result("a"), SucceededEvent)
        assert world.observer.outcomes == ["requeued", "succeeded"]

    # -- model failures ---------------------------------------------------------------------------

    async def test_model_error_is_retried_up_to_three_attempts(self, world: World) -> None:
        world.runner.script_runs(*[raising(lambda: ModelError("ValueError"))] * 3)
        await world.send(sent := request_body(reply_to=INBOX))
        for _ in range(2):
            await soon(world.work())
            assert (await world.result("a"), await world.pending()) == (None, 1)
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "model_error"
        assert isinstance(event, FailedEvent)
        assert (event.attempt, event.failure.details) == (3, {"exception": "ValueError"})
        assert await world.replies() == [(INBOX, event)]
        ((letter, original),) = await world.dead_letters()
        assert (letter.code, original) == ("model_error", sent)
        assert await world.pending() == 0
        assert world.observer.outcomes == ["requeued", "requeued", "model_error"]

    async def test_second_attempt_succeeds_after_the_model_raised_once(self, world: World) -> None:
        world.runner.script_runs(raising(lambda: ModelError("ValueError")))
        await world.send(request_body())
        for _ in range(2):
            await soon(world.work())
        assert isinstance(await world.result("a"), SucceededEvent)
        assert (await world.pending(), await world.dead_letters()) == (0, [])

    async def test_run_without_an_output_is_a_model_error(self, world: World) -> None:
        world.runner.script_runs(*[lambda _: RunnerOutput()] * 3)
        await world.send(request_body())
        for _ in range(3):
            await soon(world.work())
        assert failure(await world.result("a")) == "model_error"

    async def test_run_out_of_memory_is_repeated_with_memory_saving(self, world: World) -> None:
        world.runner.script_runs(raising(out_of_memory))
        await world.send(request_body())
        await soon(world.work())
        assert [one.save_memory for one in world.runner.runs] == [False, True]
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert done.attempt == 1
        assert await world.pending() == 0

    async def test_run_out_of_memory_twice_fails_the_request(self, world: World) -> None:
        world.runner.script_runs(
            raising(lambda: out_of_memory("offload", "slices")),
            raising(lambda: out_of_memory("offload", "tiles")),
        )
        await world.send(request_body())
        await soon(world.work())
        assert [one.save_memory for one in world.runner.runs] == [False, True]
        event = await world.result("a")
        assert failure(event) == "out_of_memory"
        assert isinstance(event, FailedEvent)
        assert event.failure.details == {"tried": ["offload", "slices", "tiles"]}
        assert (await world.pending(), await world.dead_letters()) == (0, [])

    async def test_lost_device_ends_the_worker_and_requeues_the_request(self, world: World) -> None:
        world.runner.script_runs(raising(DeviceLost))
        await world.send(request_body())
        assert await soon(world.work()) == EXIT_DEVICE_LOST == 70
        assert await world.result("a") is None
        assert await world.pending() == 1
        assert await soon(world.work()) is None
        assert isinstance(await world.result("a"), SucceededEvent)

    async def test_request_that_loses_every_worker_is_dead_lettered_without_a_run(
        self, world: World
    ) -> None:
        world.runner.script_runs(*[raising(DeviceLost)] * 3)
        await world.send(sent := request_body(reply_to=INBOX))
        for _ in range(3):
            assert await soon(world.work()) == 70
        assert await soon(world.work()) is None
        event = await world.result("a")
        assert failure(event) == "worker_lost"
        assert event is not None
        assert event.attempt == 4
        assert len(world.runner.runs) == 3
        ((letter, original),) = await world.dead_letters()
        assert (letter.code, original) == ("worker_lost", sent)
        assert await world.pending() == 0

    async def test_stalled_run_ends_the_worker_and_settles_nothing(
        self, make_world: MakeWorld
    ) -> None:
        world = await make_world(stall_timeout=0.02)
        world.runner.hold_next_run(polls_cancel=False)
        await world.send(request_body())
        assert await soon(world.work()) == EXIT_DEVICE_LOST
        assert await world.result("a") is None
        assert await world.pending() == 1
        assert world.observer.outcomes == ["abandoned"]

    async def test_internal_error_is_retried_and_then_published(self, world: World) -> None:
        world.runner.script_runs(*[raising(lambda: KeyError("secret"))] * 3)
        await world.send(request_body())
        for _ in range(2):
            await soon(world.work())
            assert (await world.result("a"), await world.pending()) == (None, 1)
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "internal"
        assert isinstance(event, FailedEvent)
        assert event.failure.details == {"exception": "KeyError"}
        assert "secret" not in event.model_dump_json()
        assert await world.pending() == 0

    @pytest.mark.parametrize("position", [(3, 2), (1, 0)])
    async def test_step_beyond_the_total_does_not_fail_the_request(
        self, world: World, position: tuple[int, int]
    ) -> None:
        # Some schedulers take more steps than the request sets.
        hold = world.runner.hold_next_run(before=lambda one: one.on_step(*position))
        await world.send(request_body())
        working = asyncio.create_task(world.work())
        while len(await world.transient_events("a")) < 2 and not working.done():
            await asyncio.wait({working}, timeout=POLL)
        hold.release()
        await soon(working)
        assert isinstance(await world.result("a"), SucceededEvent)

    # -- store outages ----------------------------------------------------------------------------

    async def test_upload_waits_for_the_store_without_a_second_run(self, world: World) -> None:
        world.store.begin()
        await world.send(request_body(num_images=2))
        working = asyncio.create_task(world.work())
        await soon(world.until_store_call_fails())
        assert (await world.result("a"), await world.pending()) == (None, 1)
        world.store.end()
        await soon(working)
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert len(done.outputs) == 2
        assert len(world.runner.runs) == 1
        assert await world.pending() == 0

    async def test_input_fetch_waits_for_the_store(self, make_world: MakeWorld) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        await world.put_object("one", world.image_file)
        world.store.begin()
        await world.send(request_body(images=[world.source("one")]))
        working = asyncio.create_task(world.work())
        await soon(world.until_store_call_fails())
        world.store.end()
        await soon(working)
        assert isinstance(await world.result("a"), SucceededEvent)

    @pytest.mark.parametrize(
        ("reason", "left"),
        [(StopReason.DRAIN, 1), (StopReason.CANCEL, 0), (StopReason.DEADLINE, 0)],
    )
    async def test_stop_request_ends_the_wait_for_the_store(
        self, world: World, reason: StopReason, left: int
    ) -> None:
        world.store.begin()
        await world.send(request_body())
        working = asyncio.create_task(world.work())
        await soon(world.until_store_call_fails())
        world.executor.interrupt(reason)
        await soon(working)
        assert await world.pending() == left
        event = await world.result("a")
        if reason is StopReason.DRAIN:
            assert event is None
        elif reason is StopReason.CANCEL:
            assert isinstance(event, CancelledEvent)
        else:
            assert failure(event) == "deadline_exceeded"

    # -- bus outages ------------------------------------------------------------------------------

    async def test_result_waits_for_the_bus_without_a_second_run(self, world: World) -> None:
        hold = world.runner.hold_next_run()
        await world.send(request_body(reply_to=INBOX))
        working = asyncio.create_task(world.work())
        await soon(hold.started())
        world.bus.begin()
        hold.release()
        while not await world.objects():
            await asyncio.wait({working}, timeout=POLL)
        assert (await world.result("a"), await world.pending()) == (None, 1)
        world.bus.end()
        assert await soon(working) is None
        done = await world.result("a")
        assert isinstance(done, SucceededEvent)
        assert done.attempt == 1
        assert await world.replies() == [(INBOX, done)]
        assert len(world.runner.runs) == 1
        assert await world.pending() == 0

    # -- large results ----------------------------------------------------------------------------

    async def test_result_too_large_for_the_bus_fails_the_request(
        self, make_world: MakeWorld
    ) -> None:
        world = await make_world(task=Task.IMAGE_TO_TEXT)
        text = GeneratedText("x" * 2**21, "length", prompt_tokens=1, completion_tokens=1)
        world.runner.script_runs(lambda _: RunnerOutput(outputs=(text,)))
        await world.put_object("one", world.image_file)
        await world.send(request_body(images=[world.source("one")], reply_to=INBOX))
        await soon(world.work())
        event = await world.result("a")
        assert failure(event) == "internal"
        assert isinstance(event, FailedEvent)
        assert "too large" in event.failure.message
        assert await world.replies() == [(INBOX, event)]
        assert (await world.pending(), await world.dead_letters()) == (0, [])
        assert world.observer.outcomes == ["internal"]

    async def test_next_request_succeeds_after_every_failure(self, world: World) -> None:
        world.runner.script_runs(
            raising(lambda: ModelError("E")), raising(out_of_memory), raising(out_of_memory)
        )
        bodies = [b"no json", request_body("b", deadline="2020-01-01T00:00:00Z"), request_body("c")]
        for body in [*bodies, request_body("d"), request_body("e")]:
            await world.send(body)
        while await world.pending():
            await soon(world.work())
        assert failure(await world.result("d")) == "out_of_memory"
        for retried_or_next in "ce":
            assert isinstance(await world.result(retried_or_next), SucceededEvent)
