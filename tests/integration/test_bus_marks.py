"""Attempt marks: senders can neither forge marks nor slow down the reads of marks."""

import asyncio
from typing import Any

import pytest

from consumer.bus.attempt_marks import AttemptMark
from consumer.bus.delivery import JetStreamDelivery, message_key
from generation_contracts.headers import EARLIER_ATTEMPTS, MARK
from tests.integration.bus_installation import (
    REQUESTS,
    RESULTS,
    TASK,
    Installation,
    measured,
    soon,
    take,
    until,
)

RELEASES = "GENERATION_RELEASES"
JUNK = 20_000


def subject(delivery: JetStreamDelivery, attempt: int, kind: str) -> str:
    return f"generation.released.{TASK}.{message_key(delivery)}.{attempt}.{kind}"


async def forge(installation: Installation, reply: str) -> None:
    """Make the server store its own replies under a subject."""
    plain = installation.plain
    before = await installation.count(RELEASES)
    await plain.publish("generation.request.text_to_image", b"x", reply=reply)
    await plain.publish(f"$JS.API.STREAM.MSG.GET.{REQUESTS}", b'{"seq":1}', reply=reply)
    await plain.publish(f"$JS.API.DIRECT.GET.{RESULTS}", b'{"seq":99}', reply=reply)
    await plain.publish("somewhere", b"", headers={"Nats-Trace-Dest": reply})

    async def stored() -> bool:
        return await installation.count(RELEASES) > before

    await until(stored)


async def test_replies_of_the_server_are_not_marks(installation: Installation) -> None:
    """Forged marks would let a request that kills its workers run without limit."""
    worker = await installation.worker()
    await installation.publish(b"{}")
    delivered = await take(worker)
    for kind in (AttemptMark.REQUEUED, AttemptMark.UNCOUNTED):
        await forge(installation, subject(delivered, 1, kind))
    await forge(installation, f"generation.withdrawn.{TASK}.{message_key(delivered)}")
    await delivered.nak()
    again = await take(worker)
    assert (await soon(again.marked_uncounted()), await soon(again.was_cancelled())) == (0, False)


async def test_a_mark_replaces_a_reply_of_the_server(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"{}")
    delivered = await take(worker)
    await forge(installation, subject(delivered, 1, AttemptMark.REQUEUED))
    await forge(installation, f"generation.withdrawn.{TASK}.{message_key(delivered)}")
    await soon(delivered.mark_cancelled())
    await soon(delivered.requeue())
    again = await take(worker)
    assert (await soon(again.marked_uncounted()), await soon(again.was_cancelled())) == (1, True)
    await forge_after(installation, again)
    assert (await soon(again.marked_uncounted()), await soon(again.was_cancelled())) == (1, True)


async def forge_after(installation: Installation, delivery: JetStreamDelivery) -> None:
    for reply in (
        subject(delivery, 1, AttemptMark.REQUEUED),
        subject(delivery, 1, AttemptMark.COUNTED),
        f"generation.withdrawn.{TASK}.{message_key(delivery)}",
    ):
        await installation.plain.publish("generation.request.text_to_image", b"x", reply=reply)
    await installation.plain.flush()


@pytest.mark.parametrize("below", ["message", "task"])
async def test_other_messages_do_not_slow_the_reads_of_marks(
    installation: Installation, below: str
) -> None:
    worker = await installation.worker()
    await installation.publish(b"{}")
    delivered = await take(worker)
    key = f"{message_key(delivered)}." if below == "message" else ""
    for number in range(JUNK):
        await installation.plain.publish(f"generation.released.{TASK}.{key}9{number}.released")

    async def stored() -> bool:
        return await installation.count(RELEASES) == JUNK

    await until(stored)
    await delivered.requeue()
    again = await take(worker)
    before = again._bus.client.stats["in_msgs"], again._bus.client.stats["in_bytes"]
    started = asyncio.get_running_loop().time()
    assert await soon(again.marked_uncounted()) == 1
    measured("marks read", asyncio.get_running_loop().time() - started)
    read = again._bus.client.stats
    assert read["in_msgs"] - before[0] <= 3 * again.attempt
    assert read["in_bytes"] - before[1] < 10_000


async def test_the_first_delivery_needs_no_read_of_marks(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"{}")
    sent = worker.bus.client.stats["out_msgs"]
    delivered = await take(worker)
    assert delivered.attempt == 1
    assert worker.bus.client.stats["out_msgs"] - sent <= 2, "one pull request, and the next one"


@pytest.mark.parametrize(
    ("header", "attempt"),
    [("2", 3), ("0", 1), ("99", 100), ("100", 100), ("-1", 1), ("1.5", 1), ("", 1), ("²", 1)],
)
async def test_attempts_of_a_republished_request_are_added_to_the_deliveries(
    installation: Installation, header: str, attempt: int
) -> None:
    worker = await installation.worker()
    await installation.publish(b"{}", headers={EARLIER_ATTEMPTS: header})
    delivered = await take(worker)
    assert delivered.attempt == attempt
    await soon(delivered.requeue())
    again = await take(worker)
    assert again.attempt == attempt + 1
    assert await soon(again.marked_uncounted()) == 1, "marks use the delivery count of the server"


async def test_the_header_of_a_message_determines_the_mark(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"{}")
    delivered = await take(worker)
    await soon(delivered.mark_uncounted())
    mark = await stored_mark(installation, subject(delivered, 1, AttemptMark.UNCOUNTED))
    assert mark == {MARK: "discounted"}


async def stored_mark(installation: Installation, name: str) -> dict[str, Any]:
    message = await installation.plain.jetstream().get_last_msg(RELEASES, name)
    headers: dict[str, Any] = dict(message.headers or {})
    return {key: text for key, text in headers.items() if not key.startswith("Nats-")}
