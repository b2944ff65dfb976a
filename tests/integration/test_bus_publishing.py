"""Publishing on a real server: each event is stored once, whatever fails in between."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from nats.aio.msg import Msg

from consumer.bus import publishing
from consumer.bus.delivery import JetStreamDelivery
from consumer.bus.reading import StoredMessage, read_message
from consumer.ports.bus import DeadLetter, MessageTooLarge, ResultEvent
from generation_contracts import (
    CancelledEvent,
    ProgressEvent,
    SucceededEvent,
    TextOutput,
    decode_event,
    decode_result,
    encode,
)
from generation_contracts.examples import EVENTS, TRACE_PARENT
from generation_contracts.headers import (
    DEAD_LETTER_ATTEMPTS,
    DEAD_LETTER_CODE,
    DEAD_LETTER_REASON,
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_SUBJECT,
    DEAD_LETTER_TIME,
    DEAD_LETTER_TRUNCATED,
    DEAD_LETTER_WORKER,
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    MESSAGE_ID,
    event_headers,
    wire_size,
)
from generation_contracts.headers import (
    TRACE_PARENT as TRACE_PARENT_HEADER,
)
from tests.conftest import InstallationOf, StartNats
from tests.integration.bus_installation import (
    DEAD_LETTERS,
    RESULTS,
    TASK,
    Installation,
    measured,
    soon,
    take,
    until_connected,
)

LETTER = DeadLetter(
    code="invalid_request", reason="width: too large", request_id="r-1", worker="w-1"
)
SUBJECT = "generation.result.text_to_image.r-1"


def result(request_id: str = "r-1", *, worker: str = "w-1", **changes: Any) -> SucceededEvent:
    event = EVENTS["succeeded_image"]
    assert isinstance(event, SucceededEvent)
    return event.model_copy(update={"request_id": request_id, "worker": worker, **changes})


def progress(request_id: str = "r-1") -> ProgressEvent:
    event = EVENTS["progress_image"]
    assert isinstance(event, ProgressEvent)
    return event.model_copy(update={"request_id": request_id})


def result_of_size(size: int) -> SucceededEvent:
    """Return a result with a wire size of `size` bytes."""

    def of_length(length: int) -> SucceededEvent:
        text = TextOutput(
            text="x" * length, finish_reason="stop", prompt_tokens=1, completion_tokens=1
        )
        return result(outputs=(text,))

    headers = {**event_headers(of_length(0)), EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
    return of_length(size - wire_size(encode(of_length(0)), headers))


async def publish(installation: Installation, event: ResultEvent) -> bool:
    """Publish an event; return whether it is the stored one."""
    stored = await soon(installation.events.publish_result(event, trace_parent=None))
    assert stored == await soon(installation.events.find_result(TASK, event.request_id))
    return stored == event


async def stored(installation: Installation, subject: str = SUBJECT) -> StoredMessage:
    stream = RESULTS if ".result." in subject else DEAD_LETTERS
    found = await read_message(installation.bus, stream, subject=subject)
    assert found is not None
    return found


# -- results --------------------------------------------------------------------------------------


async def test_a_result_is_stored_with_its_headers(installation: Installation) -> None:
    event = result()
    started = time.monotonic()
    assert await soon(installation.events.publish_result(event, trace_parent=TRACE_PARENT))
    measured("publish_result", time.monotonic() - started)

    message = await stored(installation)
    assert decode_result(message.body) == event
    assert MESSAGE_ID not in message.headers
    assert message.headers["ce-type"] == "generation.v1.succeeded"
    assert message.headers[TRACE_PARENT_HEADER] == TRACE_PARENT


async def test_an_event_can_be_published_again_but_not_replaced(
    installation: Installation,
) -> None:
    """A worker publishes again after a lost answer; another worker had the same delivery."""
    event = result()
    assert await publish(installation, event)
    assert await publish(installation, event)
    assert not await publish(installation, result(worker="w-2"))
    assert not await publish(installation, result(attempt=event.attempt + 1))
    assert await installation.count(RESULTS) == 1
    assert await installation.events.find_result(TASK, "r-1") == event


async def test_a_later_event_of_the_same_worker_and_attempt_is_not_stored(
    installation: Installation,
) -> None:
    first = result()
    second = first.model_copy(update={"time": first.time + timedelta(seconds=1)})
    assert await publish(installation, first)
    assert await publish(installation, first), "an attempt whose answer was lost"
    assert not await publish(installation, second), (
        "a second copy of the request at the same worker"
    )


async def test_a_cancelled_event_does_not_replace_a_result(
    installation: Installation,
) -> None:
    cancelled = EVENTS["cancelled"]
    assert isinstance(cancelled, CancelledEvent)
    assert await publish(installation, result("poster-0001"))
    assert not await publish(installation, cancelled)
    assert await installation.count(RESULTS) == 1


async def test_a_result_can_be_stored_again_after_a_purge(
    installation: Installation,
) -> None:
    assert await publish(installation, result())
    await installation.api(f"STREAM.PURGE.{RESULTS}")
    assert await publish(installation, result(worker="w-2"))
    assert await installation.count(RESULTS) == 1
    assert not await publish(installation, result(worker="w-3"))


async def test_many_workers_at_once_store_one_result(installation: Installation) -> None:
    won = await soon(
        asyncio.gather(*(publish(installation, result(worker=f"w-{n}")) for n in range(20)))
    )
    assert won.count(True) == 1
    assert await installation.count(RESULTS) == 1
    found = await installation.events.find_result(TASK, "r-1")
    assert found is not None
    assert found.worker == f"w-{won.index(True)}"


# -- finding --------------------------------------------------------------------------------------


async def test_only_the_result_of_the_id_is_found(installation: Installation) -> None:
    assert await soon(installation.events.find_result(TASK, "r-1")) is None
    assert await publish(installation, result())
    assert await soon(installation.events.find_result(TASK, "r-1")) == result()
    assert await soon(installation.events.find_result(TASK, "r-2")) is None


async def test_find_result_recreates_a_deleted_stream(installation: Installation) -> None:
    assert await publish(installation, result())
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await soon(installation.events.find_result(TASK, "r-1")) is None
    assert await installation.count(RESULTS) == 0


async def test_find_result_waits_for_the_server(installation: Installation) -> None:
    assert await publish(installation, result())
    await installation.kill_server()
    finding = asyncio.create_task(installation.events.find_result(TASK, "r-1"))
    await asyncio.wait({finding}, timeout=0.1)
    assert not finding.done()
    await installation.start_server()
    assert await soon(finding) == result()


# -- the server or the stream is missing ----------------------------------------------------------


async def test_a_result_waits_for_the_server_and_is_stored_once(
    installation: Installation,
) -> None:
    await installation.kill_server()
    publishing_it = asyncio.create_task(publish(installation, result()))
    await asyncio.wait({publishing_it}, timeout=0.2)
    assert not publishing_it.done()
    assert installation.bus.client.pending_data_size == 0, "nats-py does not buffer the event"
    returned = await installation.start_server()
    assert await soon(publishing_it)
    measured("server's return to a stored result", time.monotonic() - returned)
    await soon(installation.bus.client.flush())
    assert await installation.count(RESULTS) == 1


@pytest.mark.parametrize("what", ["publish", "find"])
async def test_a_call_in_progress_is_repeated_after_a_kill_of_the_server(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(publishing, "API_TIMEOUT", 1_000.0)
    await publish(installation, result("r-0"))
    events = installation.events
    with installation.frozen():
        call: asyncio.Future[object] = asyncio.ensure_future(
            events.publish_result(result(), trace_parent=None)
            if what == "publish"
            else events.find_result(TASK, "r-0")
        )
        await asyncio.wait({call}, timeout=0.05)
        await installation.kill_server()
    assert not call.done()
    returned = await installation.start_server()
    assert await soon(call)
    measured(f"server's return to the answer ({what})", time.monotonic() - returned)


async def test_a_series_of_results_survives_a_kill_of_the_server(
    installation: Installation,
) -> None:
    series = 60
    half_done = asyncio.Event()

    async def publish_all(number: int) -> list[ResultEvent]:
        stored_all = []
        for n in range(series):
            if n == series // 2:
                half_done.set()
            event = result(f"r-{number}-{n}")
            stored_all.append(await installation.events.publish_result(event, trace_parent=None))
        return stored_all

    all_series = [asyncio.create_task(publish_all(number)) for number in range(3)]
    await soon(half_done.wait())
    await installation.kill_server()
    await installation.start_server()
    for stored_all in await soon(asyncio.gather(*all_series)):
        assert all(stored_all)

    state = await installation.api(f"STREAM.INFO.{RESULTS}", {"subjects_filter": ">"})
    counts = state["state"]["subjects"]
    assert len(counts) == 3 * series
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="no answer"),
        pytest.param(b"thanks", id="text"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(b'{"error":{}}', id="empty error"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"stream":"ANOTHER","seq":1}', id="another stream"),
    ],
)
async def test_a_deleted_stream_is_recreated_for_a_result_although_a_subscriber_answers(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    """With a subscriber of the subject, the server does not report that no stream has it."""

    async def respond(message: Msg) -> None:
        if answer is not None:
            await message.respond(answer)
            await subscription.unsubscribe()

    if answer is None:
        monkeypatch.setattr(publishing, "API_TIMEOUT", 0.2)
    subscription = await installation.listen("generation.result.>", respond)
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await publish(installation, result())
    assert await installation.count(RESULTS) == 1


async def test_a_deleted_stream_is_recreated_for_a_result(installation: Installation) -> None:
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await publish(installation, result())
    assert await installation.count(RESULTS) == 1


async def test_a_result_waits_while_the_stream_is_full(installation: Installation) -> None:
    config = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**config, "max_msgs": 1})
    assert await publish(installation, result("r-0"))
    publishing_it = asyncio.create_task(publish(installation, result()))
    await asyncio.wait({publishing_it}, timeout=0.3)
    assert not publishing_it.done()
    await installation.api(f"STREAM.UPDATE.{RESULTS}", config)
    assert await soon(publishing_it)


# -- sizes ----------------------------------------------------------------------------------------


async def test_a_result_of_max_payload_is_stored_and_a_larger_one_is_refused(
    installation: Installation,
) -> None:
    limit = installation.bus.client.max_payload
    too_large = result_of_size(limit + 1)
    assert len(encode(too_large)) < limit, "only the headers exceed the limit"
    with pytest.raises(MessageTooLarge):
        await publish(installation, too_large)
    assert await publish(installation, result_of_size(limit))

    assert await publish(installation, result("r-2"))
    assert installation.bus.client.stats["reconnects"] == 0
    assert not installation.bus.closed.is_set()


async def test_a_result_above_the_limit_of_the_stream_is_too_large(
    installation: Installation,
) -> None:
    config = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**config, "max_msg_size": 4_096})
    with pytest.raises(MessageTooLarge):
        await publish(installation, result_of_size(5_000))
    assert await publish(installation, result())


# -- progress and replies -------------------------------------------------------------------------


async def test_progress_is_published_to_subscribers(installation: Installation) -> None:
    subscription = await installation.listen("generation.progress.text_to_image.r-1")
    await installation.events.publish_progress(progress(), trace_parent=TRACE_PARENT)
    message = await subscription.next_msg(timeout=5)
    assert decode_event(message.data) == progress()
    assert message.headers is not None
    assert message.headers[TRACE_PARENT_HEADER] == TRACE_PARENT
    assert MESSAGE_ID not in message.headers


async def test_progress_is_not_buffered_while_disconnected(
    installation: Installation,
) -> None:
    await installation.kill_server()
    for _ in range(100):
        await soon(installation.events.publish_progress(progress("gone"), trace_parent=None))
    assert installation.bus.client.pending_data_size == 0

    await installation.start_server()
    await until_connected(installation.bus)
    await installation.events.publish_progress(progress(), trace_parent=None)


async def test_a_reply_has_the_event_and_no_message_id(installation: Installation) -> None:
    subscription = await installation.listen("_INBOX.sender.1")
    await installation.events.reply("_INBOX.sender.1", result(), trace_parent=TRACE_PARENT)
    message = await subscription.next_msg(timeout=5)
    assert decode_result(message.data) == result()
    assert message.headers is not None
    assert message.headers["ce-id"] == "r-1.done"
    assert MESSAGE_ID not in message.headers


async def test_progress_and_replies_that_cannot_be_sent_are_dropped(
    installation: Installation,
) -> None:
    limit = installation.bus.client.max_payload
    too_large = result_of_size(limit + 200)  # a reply has fewer headers than a stored event
    assert len(encode(too_large)) < limit
    await soon(installation.events.reply("_INBOX.sender.1", too_large, trace_parent=None))
    huge = progress().model_copy(update={"preview": "x" * 2_000_000})
    await soon(installation.events.publish_progress(huge, trace_parent=None))
    assert await publish(installation, result())
    assert installation.bus.client.stats["reconnects"] == 0

    await installation.bus.client.close()
    await soon(installation.events.reply("_INBOX.sender.1", result(), trace_parent=None))
    await soon(installation.events.publish_progress(progress(), trace_parent=None))


# -- dead letters ---------------------------------------------------------------------------------


async def dead_letter(
    installation: Installation, delivered: JetStreamDelivery, letter: DeadLetter = LETTER
) -> StoredMessage:
    await soon(installation.events.dead_letter(TASK, delivered, letter))
    return await stored(installation, "generation.dead.text_to_image")


async def test_a_dead_letter_has_the_request_and_the_reason(installation: Installation) -> None:
    worker = await installation.worker()
    original = {MESSAGE_ID: "m-1", "Reply-To": "_INBOX.x", "Title": "Grüße"}
    await installation.publish(b"\x00not json\xff", request_id="r-1", headers=original)
    first = await take(worker)
    await first.nak()
    delivered = await take(worker)

    letter = await dead_letter(installation, delivered)

    assert letter.body == b"\x00not json\xff"
    headers = dict(letter.headers or {})
    assert headers.pop(DEAD_LETTER_CODE) == "invalid_request"
    assert headers.pop(DEAD_LETTER_REASON) == "width: too large"
    assert headers.pop(DEAD_LETTER_REQUEST_ID) == "r-1"
    assert headers.pop(DEAD_LETTER_ATTEMPTS) == "2"
    assert headers.pop(DEAD_LETTER_WORKER) == "w-1"
    assert headers.pop(DEAD_LETTER_SUBJECT) == "generation.request.text_to_image.r-1"
    assert datetime.fromisoformat(headers.pop(DEAD_LETTER_TIME)) == delivered.stored_at
    assert headers.pop(MESSAGE_ID) != "m-1"
    originals = {name: text for name, text in headers.items() if not name.startswith("Nats-")}
    assert originals == {f"Original-{name}": text for name, text in original.items()}


async def test_a_dead_letter_is_stored_once_for_all_deliveries(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    for _ in range(3):
        delivered = await take(worker)
        await dead_letter(installation, delivered)
        await delivered.nak()
    assert await installation.count(DEAD_LETTERS) == 1

    await (await take(worker)).ack()
    await installation.publish(b"first")
    await dead_letter(installation, await take(worker))
    assert await installation.count(DEAD_LETTERS) == 2, "a second request with the same body"


async def test_a_dead_letter_waits_for_the_server(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    delivered = await take(worker)
    await installation.kill_server()
    storing = asyncio.create_task(dead_letter(installation, delivered))
    await asyncio.wait({storing}, timeout=0.1)
    assert not storing.done()
    await installation.start_server()
    assert (await soon(storing)).body == b"first"


async def test_the_body_of_a_dead_letter_that_is_too_large_is_truncated(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    limit = 4_096  # bytes
    installation = await installation_of(start_nats(f"max_payload: {limit}"))
    worker = await installation.worker()
    body = bytes(range(256)) * 15  # too large with the headers of a dead letter
    await installation.publish(body, headers={"Title": "x" * 100})
    delivered = await take(worker)

    letter = await dead_letter(installation, delivered)

    assert body.startswith(letter.body)
    assert len(body) // 2 < len(letter.body) < len(body)
    assert letter.headers[DEAD_LETTER_TRUNCATED] == str(len(body))
    assert not any(name.startswith("Original-") for name in letter.headers)
    assert installation.bus.client.stats["reconnects"] == 0


async def test_a_large_dead_letter_loses_original_headers_before_its_body(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats("max_payload: 4096"))
    worker = await installation.worker()
    await installation.publish(b"x" * 2_000, headers={"Title": "x" * 1_900})
    letter = await dead_letter(installation, await take(worker))
    assert letter.body == b"x" * 2_000
    assert DEAD_LETTER_TRUNCATED not in letter.headers
    assert "Original-Title" not in letter.headers


async def test_a_reason_cannot_add_headers_and_its_length_is_limited(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"body")
    reason = "é\r\nNats-Rollup: all\r\n\r\n{}" + "x" * 2_000_000
    letter = await dead_letter(
        installation,
        await take(worker),
        DeadLetter(code="internal", reason=reason, request_id="r-1", worker="w-1"),
    )
    assert letter.body == b"body"
    assert "Nats-Rollup" not in letter.headers
    text = letter.headers[DEAD_LETTER_REASON]
    assert text.startswith("?  Nats-Rollup: all    {}xxx")
    assert len(text) == publishing.MAX_REASON
    assert text.isascii()


async def test_a_dead_letter_renames_a_header_that_nats_py_cannot_write(
    installation: Installation,
) -> None:
    """Other clients can publish such names."""
    async with raw_client(installation) as write:
        headers = b"NATS/1.0\r\nodd(name)/x: 1\r\nGood: 2\r\n\r\n"
        await write(
            b"HPUB generation.request.text_to_image %d %d\r\n%sbody\r\n"
            % (len(headers), len(headers) + 4, headers)
        )
    worker = await installation.worker()
    delivered = await take(worker)
    assert delivered.headers == {"odd(name)/x": "1", "Good": "2"}

    letter = await dead_letter(installation, delivered)

    assert letter.body == b"body"
    assert letter.headers["Original-Good"] == "2"
    assert letter.headers["Original-odd_name__x"] == "1"


@asynccontextmanager
async def raw_client(installation: Installation) -> AsyncIterator[Any]:
    """Return a function that writes to the server and waits until the server has processed it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", installation.server.ports["client"])

    async def write(data: bytes) -> None:
        writer.write(data + b"PING\r\n")
        while await soon(reader.readline()) != b"PONG\r\n":
            pass

    await write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    try:
        yield write
    finally:
        writer.close()
        await writer.wait_closed()
