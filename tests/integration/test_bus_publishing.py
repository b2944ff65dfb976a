"""Publishing on a real server: stored once, whatever happens, and told where it can be told."""

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
    """A result that takes so many bytes of `max_payload`."""

    def of_length(length: int) -> SucceededEvent:
        text = TextOutput(
            text="x" * length, finish_reason="stop", prompt_tokens=1, completion_tokens=1
        )
        return result(outputs=(text,))

    headers = {**event_headers(of_length(0)), EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
    return of_length(size - wire_size(encode(of_length(0)), headers))


async def publish(installation: Installation, event: ResultEvent) -> bool:
    """Publish an event; whether it is the stored one."""
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


async def test_the_same_event_may_be_published_again_and_another_not(
    installation: Installation,
) -> None:
    """The first is a lost answer, the second another worker that had the same delivery."""
    event = result()
    assert await publish(installation, event)
    assert await publish(installation, event)
    assert not await publish(installation, result(worker="w-2"))
    assert not await publish(installation, result(attempt=event.attempt + 1))
    assert await installation.count(RESULTS) == 1
    assert await installation.events.find_result(TASK, "r-1") == event


async def test_an_event_of_the_same_worker_and_attempt_is_not_taken_for_this_one(
    installation: Installation,
) -> None:
    first = result()
    second = first.model_copy(update={"time": first.time + timedelta(seconds=1)})
    assert await publish(installation, first)
    assert await publish(installation, first), "a try whose answer was lost"
    assert not await publish(installation, second), "of a second copy in the same hands"


async def test_a_cancelled_event_is_fenced_like_every_terminal_event(
    installation: Installation,
) -> None:
    cancelled = EVENTS["cancelled"]
    assert isinstance(cancelled, CancelledEvent)
    assert await publish(installation, result("poster-0001"))
    assert not await publish(installation, cancelled)
    assert await installation.count(RESULTS) == 1


async def test_a_result_that_was_purged_can_be_stored_again(
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


async def test_a_result_is_found_or_not(installation: Installation) -> None:
    assert await soon(installation.events.find_result(TASK, "r-1")) is None
    assert await publish(installation, result())
    assert await soon(installation.events.find_result(TASK, "r-1")) == result()
    assert await soon(installation.events.find_result(TASK, "r-2")) is None


async def test_find_result_makes_a_deleted_stream_again(installation: Installation) -> None:
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


# -- the server or the stream is away -------------------------------------------------------------


async def test_a_result_waits_for_the_server_and_is_stored_once(
    installation: Installation,
) -> None:
    await installation.kill_server()
    publishing_it = asyncio.create_task(publish(installation, result()))
    await asyncio.wait({publishing_it}, timeout=0.2)
    assert not publishing_it.done()
    assert installation.bus.client.pending_data_size == 0, "it is not left to nats-py's buffer"
    returned = await installation.start_server()
    assert await soon(publishing_it)
    measured("server's return to a stored result", time.monotonic() - returned)
    await soon(installation.bus.client.flush())
    assert await installation.count(RESULTS) == 1


@pytest.mark.parametrize("what", ["publish", "find"])
async def test_a_question_under_way_when_the_server_dies_is_asked_again(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(publishing, "API_TIMEOUT", 1_000.0)
    await publish(installation, result("r-0"))
    events = installation.events
    with installation.frozen():
        asking: asyncio.Future[object] = asyncio.ensure_future(
            events.publish_result(result(), trace_parent=None)
            if what == "publish"
            else events.find_result(TASK, "r-0")
        )
        await asyncio.wait({asking}, timeout=0.05)
        await installation.kill_server()
    assert not asking.done()
    returned = await installation.start_server()
    assert await soon(asking)
    measured(f"server's return to the answer ({what})", time.monotonic() - returned)


async def test_a_series_of_results_survives_a_kill_in_its_middle(
    installation: Installation,
) -> None:
    series = 60
    at = asyncio.Event()

    async def publish_all(half: int) -> list[ResultEvent]:
        stored_all = []
        for n in range(series):
            if n == series // 2:
                at.set()
            event = result(f"r-{half}-{n}")
            stored_all.append(await installation.events.publish_result(event, trace_parent=None))
        return stored_all

    halves = [asyncio.create_task(publish_all(half)) for half in range(3)]
    await soon(at.wait())
    await installation.kill_server()
    await installation.start_server()
    for stored_all in await soon(asyncio.gather(*halves)):
        assert all(stored_all)

    state = await installation.api(f"STREAM.INFO.{RESULTS}", {"subjects_filter": ">"})
    counts = state["state"]["subjects"]
    assert len(counts) == 3 * series
    assert set(counts.values()) == {1}


async def test_a_deleted_stream_is_made_again_for_a_result(installation: Installation) -> None:
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await publish(installation, result())
    assert await installation.count(RESULTS) == 1


async def test_a_deleted_stream_is_made_again_though_someone_listens_to_its_subjects(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener takes the place of the missing stream: nobody says that there is none."""
    monkeypatch.setattr(publishing, "API_TIMEOUT", 0.2)
    await installation.listen("generation.result.>")
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await publish(installation, result())
    assert await installation.count(RESULTS) == 1


@pytest.mark.parametrize("answer", [b"thanks", b"{}", b'{"error":{}}', b"[]", b""])
async def test_a_listener_that_answers_in_the_streams_place_is_not_believed(
    installation: Installation, answer: bytes
) -> None:
    async def respond(message: Msg) -> None:
        await message.respond(answer)
        await listening.unsubscribe()

    listening = await installation.listen("generation.result.>", respond)
    await installation.api(f"STREAM.DELETE.{RESULTS}")
    assert await publish(installation, result())
    assert await installation.count(RESULTS) == 1


async def test_a_result_waits_until_the_stream_takes_it(installation: Installation) -> None:
    config = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**config, "max_msgs": 1})
    assert await publish(installation, result("r-0"))
    publishing_it = asyncio.create_task(publish(installation, result()))
    await asyncio.wait({publishing_it}, timeout=0.3)
    assert not publishing_it.done()
    await installation.api(f"STREAM.UPDATE.{RESULTS}", config)
    assert await soon(publishing_it)


# -- sizes ----------------------------------------------------------------------------------------


async def test_a_result_that_just_fits_is_stored_and_one_byte_more_is_refused(
    installation: Installation,
) -> None:
    limit = installation.bus.client.max_payload
    too_large = result_of_size(limit + 1)
    assert len(encode(too_large)) < limit, "it is the headers that make it too large"
    with pytest.raises(MessageTooLarge):
        await publish(installation, too_large)
    assert await publish(installation, result_of_size(limit))

    assert await publish(installation, result("r-2"))
    assert installation.bus.client.stats["reconnects"] == 0
    assert not installation.bus.closed.is_set()


async def test_a_result_over_the_streams_own_limit_is_too_large(
    installation: Installation,
) -> None:
    config = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**config, "max_msg_size": 4_096})
    with pytest.raises(MessageTooLarge):
        await publish(installation, result_of_size(5_000))
    assert await publish(installation, result())


# -- progress and replies -------------------------------------------------------------------------


async def test_progress_is_told_to_who_listens(installation: Installation) -> None:
    heard = await installation.listen("generation.progress.text_to_image.r-1")
    await installation.events.publish_progress(progress(), trace_parent=TRACE_PARENT)
    message = await heard.next_msg(timeout=5)
    assert decode_event(message.data) == progress()
    assert message.headers is not None
    assert message.headers[TRACE_PARENT_HEADER] == TRACE_PARENT
    assert MESSAGE_ID not in message.headers


async def test_progress_while_disconnected_is_not_kept_for_later(
    installation: Installation,
) -> None:
    await installation.kill_server()
    for _ in range(100):
        await soon(installation.events.publish_progress(progress("gone"), trace_parent=None))
    assert installation.bus.client.pending_data_size == 0

    await installation.start_server()
    await until_connected(installation.bus)
    await installation.events.publish_progress(progress(), trace_parent=None)


async def test_a_reply_is_the_event_without_a_message_id(installation: Installation) -> None:
    heard = await installation.listen("_INBOX.sender.1")
    await installation.events.reply("_INBOX.sender.1", result(), trace_parent=TRACE_PARENT)
    message = await heard.next_msg(timeout=5)
    assert decode_result(message.data) == result()
    assert message.headers is not None
    assert message.headers["ce-id"] == "r-1.done"
    assert MESSAGE_ID not in message.headers


async def test_what_cannot_be_told_is_let_go(installation: Installation) -> None:
    limit = installation.bus.client.max_payload
    too_large = result_of_size(limit + 200)  # a reply has some headers less than the stored one
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


async def test_a_dead_letter_keeps_the_request_and_says_why(installation: Installation) -> None:
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
    time_of_it = datetime.fromisoformat(headers.pop(DEAD_LETTER_TIME))
    assert time_of_it == delivered.stored_at
    assert headers.pop(MESSAGE_ID) != "m-1"
    kept = {name: text for name, text in headers.items() if not name.startswith("Nats-")}
    assert kept == {f"Original-{name}": text for name, text in original.items()}


async def test_a_dead_letter_is_kept_once_for_all_deliveries(installation: Installation) -> None:
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
    assert await installation.count(DEAD_LETTERS) == 2, "an equal request is another request"


async def test_a_dead_letter_waits_for_the_server(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    delivered = await take(worker)
    await installation.kill_server()
    putting = asyncio.create_task(dead_letter(installation, delivered))
    await asyncio.wait({putting}, timeout=0.1)
    assert not putting.done()
    await installation.start_server()
    assert (await soon(putting)).body == b"first"


async def test_a_dead_letter_that_does_not_fit_is_cut(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    limit = 4_096  # bytes
    installation = await installation_of(start_nats(f"max_payload: {limit}"))
    worker = await installation.worker()
    body = bytes(range(256)) * 15  # fits the server's limit, but not with a dead letter's headers
    await installation.publish(body, headers={"Title": "x" * 100})
    delivered = await take(worker)

    letter = await dead_letter(installation, delivered)

    assert body.startswith(letter.body)
    assert len(body) // 2 < len(letter.body) < len(body)
    assert letter.headers[DEAD_LETTER_TRUNCATED] == str(len(body))
    assert not any(name.startswith("Original-") for name in letter.headers)
    assert installation.bus.client.stats["reconnects"] == 0


async def test_originals_are_left_out_before_the_body_is_cut(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats("max_payload: 4096"))
    worker = await installation.worker()
    await installation.publish(b"x" * 2_000, headers={"Title": "x" * 1_900})
    letter = await dead_letter(installation, await take(worker))
    assert letter.body == b"x" * 2_000
    assert DEAD_LETTER_TRUNCATED not in letter.headers
    assert "Original-Title" not in letter.headers


async def test_a_reason_cannot_write_headers_or_fill_the_letter(
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


async def test_a_header_name_that_the_client_would_not_write_does_not_stop_a_dead_letter(
    installation: Installation,
) -> None:
    """Other clients, and whoever writes to the socket, publish such names."""
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
    """Writes to the server's socket, and returns when the server has had it."""
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
