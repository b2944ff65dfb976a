"""Delayed retries of requests, and the marks of requests that reached `max_deliver`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import nats
import pytest

from consumer.bus import retries
from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.dead_letters.exhausted import find_exhausted
from consumer.bus.delivery import JetStreamDelivery
from consumer.bus.pull import PullLoop
from consumer.bus.retries import RetryMover
from consumer.bus.stored_request import RequestInStream
from consumer.ports.bus import MessageTooLarge, QueueFull
from generation_contracts.headers import MESSAGE_ID, REPLY_TO, RETRY_DELAY, TRACE_PARENT
from tests.integration.bus_installation import (
    REQUESTS,
    TASK,
    Installation,
    Worker,
    api,
    soon,
    take,
    until,
)

RETRIES = "GENERATION_RETRIES"
HEADERS = {MESSAGE_ID: "m-1", REPLY_TO: "_INBOX.x", "Title": "Grüße", "Nats-Expected-Stream": ""}
BODY = b'{"prompt":"a"}'


@asynccontextmanager
async def mover(installation: Installation) -> AsyncIterator[None]:
    """Run the retry mover of a worker."""
    bus, durable = installation.bus, installation.topology.retries(TASK)
    pull = PullLoop(
        bus,
        durable,
        ensure=partial(installation.topology.ensure, TASK),
        context=installation.context(bus, durable),
    )
    await pull.start()

    async def move() -> None:
        retry_mover = RetryMover(bus, TASK, durable, installation.events)
        while (retry := await pull.next()) is not None:
            await retry_mover.move(retry)

    task = asyncio.create_task(move())
    try:
        yield
    finally:
        pull.stop()
        await task
        await pull.close()


OWNER = f"sha256:{'0' * 64}"


async def request_retry(
    installation: Installation, delivered: JetStreamDelivery, *, delay: float, attempts: int = 1
) -> None:
    """Store a retry and acknowledge the request, as a worker does after a model error."""
    await soon(
        installation.events.retry_later(
            TASK,
            delivered,
            request_id="r-1",
            attempts=attempts,
            delay=delay,
            owner=OWNER,
        )
    )
    await delivered.ack()


async def test_a_request_is_redelivered_when_its_next_attempt_is_due(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    headers = {name: text for name, text in HEADERS.items() if text}
    await installation.publish(BODY, headers={**headers, TRACE_PARENT: "00-x"})
    began = asyncio.get_running_loop().time()
    await request_retry(installation, await take(worker), delay=0.4, attempts=2)
    async with mover(installation):
        again = await take(worker)
    assert asyncio.get_running_loop().time() - began >= 0.4
    assert (again.subject, again.body) == ("generation.request.text_to_image.r-1", BODY)
    assert again.attempt == 3
    assert again.headers[REPLY_TO] == "_INBOX.x"
    assert again.headers["Title"] == "Grüße"
    assert again.headers[TRACE_PARENT] == "00-x"
    assert again.headers[MESSAGE_ID] != "m-1"
    assert RETRY_DELAY not in again.headers
    assert await installation.count(RETRIES) == 0
    await again.ack()
    assert await installation.count(REQUESTS) == 0


async def test_a_delayed_retry_blocks_neither_the_queue_nor_other_retries(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(BODY)
    await request_retry(installation, await take(worker), delay=1_000.0)
    await installation.publish(b"next")
    async with mover(installation):
        delivered = await take(worker)
        assert delivered.body == b"next"
        await request_retry(installation, delivered, delay=0.0)
        assert (await take(worker)).body == b"next"
    assert await installation.count(RETRIES) == 1


async def test_a_retry_that_a_dead_worker_had_pulled_is_moved_by_another_worker(
    installation: Installation,
) -> None:
    """The durable has a short ack_wait, and no worker renews the lease of a retry."""
    worker = await installation.worker()
    await installation.publish(BODY)
    await request_retry(installation, await take(worker), delay=0.0)
    durable = installation.topology.retries(TASK)
    async with await nats.connect(installation.server.url) as dead:
        inbox = dead.new_inbox()
        deliveries = await dead.subscribe(inbox)
        pull = f"$JS.API.CONSUMER.MSG.NEXT.{durable.stream}.{durable.name}"
        await dead.publish(pull, b"", reply=inbox)
        pulled = await deliveries.next_msg(timeout=5)
    assert pulled.data == BODY
    async with mover(installation):
        assert (await take(worker)).body == BODY  # within `SOON`
    assert await installation.count(RETRIES) == 0


async def test_a_retry_survives_a_kill_of_the_server(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(BODY)
    await request_retry(installation, await take(worker), delay=0.5)
    await installation.kill_server()
    await installation.start_server()
    async with mover(installation):
        assert (await take(worker)).body == BODY
    assert await installation.count(RETRIES) == 0


async def test_a_retry_waits_while_the_request_queue_is_full(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSE_FULL", 0.05)
    worker = await installation.worker()
    await installation.publish(BODY)
    await request_retry(installation, await take(worker), delay=0.0)
    config = (await installation.api(f"STREAM.INFO.{REQUESTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{REQUESTS}", {**config, "max_msgs": 1})
    await installation.publish(b"next")
    delivered = await take(worker)
    async with mover(installation):

        async def refused() -> bool:
            info = await api(installation.bus, f"CONSUMER.INFO.{RETRIES}.{TASK}")
            return bool(info["num_redelivered"])

        await until(refused)
        await delivered.ack()
        assert (await take(worker)).body == BODY


@pytest.mark.parametrize(
    ("name", "answer"), [("r-1", b'{"stream":"X","seq":1}'), ("r-1", b""), ("*", b"")]
)
async def test_a_reply_of_the_server_in_the_retry_stream_is_deleted(
    installation: Installation, name: str, answer: bytes
) -> None:
    await installation.plain.publish(f"generation.retry.{TASK}.{name}", answer)
    async with mover(installation):

        async def gone() -> bool:
            info = await api(installation.bus, f"STREAM.INFO.{RETRIES}")
            return (info["state"]["last_seq"], info["state"]["messages"]) == (1, 0)

        await until(gone)
    assert await installation.count(REQUESTS) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [({"max_bytes": 100}, QueueFull), ({"max_msg_size": 10}, MessageTooLarge)],
)
async def test_a_retry_that_cannot_be_stored_raises(
    installation: Installation, change: dict[str, int], error: type[Exception]
) -> None:
    worker = await installation.worker()
    await installation.publish(BODY)
    delivered = await take(worker)
    config = (await installation.api(f"STREAM.INFO.{RETRIES}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RETRIES}", {**config, **change})
    with pytest.raises(error):
        await request_retry(installation, delivered, delay=1.0)


# -- max_deliver ----------------------------------------------------------------------------------


async def exhaust(
    installation: Installation, worker: Worker, *methods: str
) -> tuple[RequestInStream, Awaitable[JetStreamDelivery | None]]:
    """Let a request reach max_deliver; each delivery ends with one of the methods.

    Returns:
        The request, and the worker's pending next delivery: the server counts deliveries at a pull.
    """
    durable = f"{REQUESTS}.{TASK}"
    config = (await installation.api(f"CONSUMER.INFO.{durable}"))["config"]
    await installation.api(
        f"CONSUMER.CREATE.{durable}",
        {"stream_name": REQUESTS, "config": {**config, "max_deliver": len(methods)}},
    )
    advisories = await installation.listen("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>")
    for method in methods:
        await soon(getattr(await take(worker), method)())
    pending = asyncio.ensure_future(worker.loop.next())
    advisory = await advisories.next_msg(timeout=10)
    marks = AttemptMarks(installation.bus, installation.subjects, TASK)
    found = await soon(find_exhausted(installation.bus, REQUESTS, as_delivery(advisory), marks))
    assert found is not None
    return found, pending


def as_delivery(message: Any) -> Any:
    class Advisory:
        body = message.data

    return Advisory()


async def test_the_marks_of_a_max_deliver_exhausted_request_are_read(
    installation: Installation,
) -> None:
    """Requeues by draining workers must not count as attempts."""
    worker = await installation.worker()
    await installation.publish(BODY, request_id="r-1")
    found, pending = await exhaust(installation, worker, "nak", "requeue", "requeue")
    assert (found.deliveries, await soon(found.marked_uncounted())) == (3, 2)
    worker.loop.stop()
    assert await soon(pending) is None
