"""A message under a result subject counts only if it is the event of that request."""

import asyncio
import json
from typing import Any

import pytest
from nats.js.errors import APIError

from consumer.app.probes import NullObserver
from consumer.bus import publishing
from consumer.bus.publishing import JetStreamEvents
from consumer.ports.bus import ResultUnreadable
from generation_contracts import Task, TextToImageRequest, encode
from generation_contracts.headers import EXPECTED_LAST_SUBJECT_SEQUENCE, MESSAGE_ID
from tests.integration.bus_installation import (
    DEAD_LETTERS,
    OTHER_REQUESTS,
    REQUESTS,
    RESULTS,
    TASK,
    Installation,
    soon,
    take,
    until,
)
from tests.integration.test_bus_publishing import LETTER, SUBJECT, result

REPLY = "generation.result.text_to_image.r-1"


async def put(installation: Installation, body: bytes, subject: str = SUBJECT) -> None:
    """Store a message under a result subject, as a reply of the server would be stored."""
    await installation.plain.publish(subject, body)
    await installation.plain.flush()


async def pub_ack(installation: Installation) -> None:
    await installation.plain.publish("generation.request.text_to_image", b"x", reply=REPLY)


async def stored_message(installation: Installation) -> None:
    await installation.publish(b"x")
    await installation.plain.publish(
        f"$JS.API.STREAM.MSG.GET.{REQUESTS}", b'{"seq":1}', reply=REPLY
    )


async def missing_message(installation: Installation) -> None:
    await installation.plain.publish(
        f"$JS.API.STREAM.MSG.GET.{REQUESTS}", b'{"seq":99}', reply=REPLY
    )


async def trace_event(installation: Installation) -> None:
    await installation.plain.publish("somewhere", b"", headers={"Nats-Trace-Dest": REPLY})


async def event_of_another_request(installation: Installation) -> None:
    await put(installation, encode(result("r-2")))


async def event_of_another_task(installation: Installation) -> None:
    await put(installation, encode(result().model_copy(update={"task": Task.IMAGE_TO_TEXT})))


@pytest.mark.parametrize(
    "forge",
    [
        pub_ack,
        stored_message,
        missing_message,
        trace_event,
        event_of_another_request,
        event_of_another_task,
    ],
    ids=lambda forge: forge.__name__,
)
async def test_a_foreign_message_is_replaced_by_the_event_of_the_request(
    installation: Installation, forge: Any
) -> None:
    """The message is stored before the first lookup, or between the lookup and the event."""
    events = installation.events
    for find_first in (True, False):
        await forge(installation)

        async def stored() -> bool:
            return await installation.count(RESULTS) == 1

        await until(stored)
        if find_first:
            assert await soon(events.find_result(TASK, "r-1")) is None
            assert await installation.count(RESULTS) == 0
    event = result()
    assert await soon(events.publish_result(event, trace_parent=None)) == event
    await forge(installation)
    await installation.plain.flush()
    assert await soon(events.find_result(TASK, "r-1")) == event, "a later message replaces no event"
    assert await installation.count(RESULTS) == 1


async def test_an_event_is_stored_while_a_sender_refills_its_subject(
    installation: Installation,
) -> None:
    stop = asyncio.Event()

    async def fill() -> None:
        while not stop.is_set():
            await pub_ack(installation)
            await installation.plain.flush()

    filling = asyncio.create_task(fill())
    try:
        for number in range(2):
            event = result(worker=f"w-{number}")
            await installation.api(f"STREAM.PURGE.{RESULTS}")
            assert await soon(installation.events.publish_result(event, trace_parent=None)) == event
            assert await soon(installation.events.find_result(TASK, "r-1")) == event
    finally:
        stop.set()
        await filling


async def test_an_event_of_a_later_version_is_not_replaced(installation: Installation) -> None:
    """The run of this version is in vain: its event is not stored."""
    later = {"type": "generation.v9.done", "request_id": "r-1", "task": "text_to_image"}
    await put(installation, json.dumps(later).encode())
    assert await soon(installation.events.find_result(TASK, "r-1")) is None
    with pytest.raises(ResultUnreadable):
        await soon(installation.events.publish_result(result(), trace_parent=None))
    assert await installation.count(RESULTS) == 1


@pytest.mark.parametrize("wrong", ["request_id", "task", "type"])
async def test_an_unknown_event_of_another_request_is_replaced(
    installation: Installation, wrong: str
) -> None:
    other = {"type": "generation.v9.done", "request_id": "r-1", "task": "text_to_image"}
    await put(installation, json.dumps({**other, wrong: "io.nats"}).encode())
    event = result()
    assert await soon(installation.events.publish_result(event, trace_parent=None)) == event


async def test_the_stream_refuses_a_second_message_under_a_subject(
    installation: Installation,
) -> None:
    """With and without an expected sequence."""
    await soon(installation.events.publish_result(result(), trace_parent=None))
    jetstream = installation.plain.jetstream()
    for headers, code in (
        (None, 10077),
        ({EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}, 10071),
        ({EXPECTED_LAST_SUBJECT_SEQUENCE: "1"}, 10077),
    ):
        with pytest.raises(APIError) as refused:
            await jetstream.publish(SUBJECT, b"second", headers=headers)
        assert refused.value.err_code == code
    assert await installation.count(RESULTS) == 1


async def test_a_result_waits_for_a_full_stream_and_the_observer_is_notified(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_PAUSE", 0.05)
    reports: list[tuple[bool, str]] = []

    class Recorder(NullObserver):
        def bus_writable(self, writable: bool, reason: str = "") -> None:
            reports.append((writable, reason))

    async def ensure() -> None:
        """Do nothing: the streams exist."""

    events = JetStreamEvents(
        installation.bus, installation.subjects, ensure=ensure, observer=Recorder()
    )
    assert await soon(events.publish_result(result(), trace_parent=None))
    config = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**config, "max_bytes": 1000})
    second = result("r-2")
    publishing_it = asyncio.create_task(events.publish_result(second, trace_parent=None))

    async def reported() -> bool:
        return bool(reports)

    await until(reported)
    assert reports[-1] == (False, f"{RESULTS}: maximum bytes exceeded")
    assert not publishing_it.done()
    assert await soon(events.find_result(TASK, "r-1")) == result(), (
        "the stream drops no older event"
    )
    await installation.api(f"STREAM.UPDATE.{RESULTS}", config)
    assert await soon(publishing_it) == second
    assert reports[-1] == (True, "")


# -- message ids ----------------------------------------------------------------------------------


async def test_the_next_step_of_a_chain_is_stored_if_a_sender_has_used_its_message_id(
    installation: Installation,
) -> None:
    jetstream = installation.plain.jetstream()
    for reply_to in ("", "_INBOX.x"):
        await jetstream.publish(
            "generation.request.text_to_image.foreign",
            b"{}",
            headers={MESSAGE_ID: f"text_to_image.tour-2.{reply_to}"},
        )
    before = await installation.count(REQUESTS)
    request = TextToImageRequest(request_id="tour-2", prompt="a")
    for reply_to in (None, "_INBOX.x"):
        await soon(
            installation.events.publish_request(TASK, request, reply_to=reply_to, trace_parent=None)
        )
    assert await installation.count(REQUESTS) == before + 2
    assert await installation.count(OTHER_REQUESTS) == 0


async def test_a_dead_letter_is_stored_if_its_message_id_is_in_use(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    delivered = await take(worker)
    await soon(installation.events.dead_letter(TASK, delivered, LETTER))
    letter = await installation.plain.jetstream().get_msg(DEAD_LETTERS, 1)
    assert letter.headers is not None
    message_id = letter.headers[MESSAGE_ID]
    await delivered.nak()

    await installation.api(f"STREAM.DELETE.{DEAD_LETTERS}")
    await installation.topology.ensure(TASK)
    await installation.plain.jetstream().publish(
        "generation.dead.text_to_image", b"other", headers={MESSAGE_ID: message_id}
    )
    await soon(installation.events.dead_letter(TASK, await take(worker), LETTER))
    assert await installation.count(DEAD_LETTERS) == 2
    stored = await installation.plain.jetstream().get_msg(DEAD_LETTERS, 2)
    assert stored.data == b"first"
    assert stored.headers is not None
    assert stored.headers[MESSAGE_ID].startswith(f"{message_id}-")
