"""Settling of deliveries on a real server: confirmation, retries, and the end of retries."""

import asyncio
import json
import time

import pytest

from consumer.bus import delivery
from consumer.bus.connection import BusUnavailable
from consumer.bus.lease_guard.guard import LeaseGuard
from tests.conftest import InstallationOf, StartNats
from tests.integration.bus_installation import (
    MUTE,
    REQUESTS,
    TASK,
    Installation,
    Worker,
    measured,
    soon,
    take,
    until_connected,
)

LEASE = 1.0  # seconds


async def test_an_acked_request_is_deleted(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    assert await installation.count(REQUESTS) == 1
    started = time.monotonic()
    await soon(delivered.ack())
    measured("ack", time.monotonic() - started)
    assert await installation.count(REQUESTS) == 0


async def test_a_request_is_redelivered_immediately_after_a_nak(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"again")
    for attempt in range(1, 6):
        delivered = await take(worker)
        assert (delivered.body, delivered.attempt) == (b"again", attempt)
        started = time.monotonic()
        await soon(delivered.nak())
    measured("nak", time.monotonic() - started)


async def test_a_requeued_request_is_redelivered_immediately_and_marked_uncounted(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"again")
    await installation.publish(b"other")
    for attempt, uncounted in ((1, 0), (2, 1), (3, 2)):
        delivered = await take(worker)
        assert (delivered.body, delivered.attempt) == (b"again", attempt)
        assert await soon(delivered.marked_uncounted()) == uncounted
        await soon(delivered.requeue())
    again = await take(worker)
    await soon(again.requeue())
    await soon(again.requeue())  # as after a lost confirmation: both calls count as one requeue
    again = await take(worker)
    assert await soon(again.marked_uncounted()) == 4
    await soon(again.nak())  # a NAK counts as an attempt
    again = await take(worker)
    assert await soon(again.marked_uncounted()) == 4
    await soon(again.ack())
    assert await soon((await take(worker)).marked_uncounted()) == 0


async def test_the_last_mark_of_a_delivery_decides_whether_it_counts(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish()
    first = await take(worker)
    for mark, uncounted in ((first.mark_uncounted, 1), (first.mark_counted, 0), (first.requeue, 1)):
        await soon(mark())
        assert await soon(first.marked_uncounted()) == uncounted
    again = await take(worker)
    await soon(again.mark_uncounted())
    assert await soon(again.marked_uncounted()) == 2
    await soon(again.requeue())
    assert await soon(again.marked_uncounted()) == 2, "two marks of one delivery count once"


async def test_a_second_mark_of_a_delivery_replaces_the_first_one(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await soon(delivered.mark_uncounted())
    stream = await installation.api("STREAM.INFO.GENERATION_RELEASES", {"subjects_filter": ">"})
    assert len(stream["state"]["subjects"]) == 1
    await soon(delivered.mark_uncounted())
    assert await soon(delivered.marked_uncounted()) == 1


async def test_a_requeue_without_the_stream_of_marks_requeues_the_request(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.api("STREAM.DELETE.GENERATION_RELEASES")
    await soon(delivered.requeue())
    again = await take(worker)
    assert (again.attempt, await soon(again.marked_uncounted())) == (2, 0)


async def test_a_requeue_ends_while_the_server_is_frozen(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    with installation.frozen():
        await soon(delivered.requeue())
    again = await take(worker)
    assert again.attempt == 2


async def test_each_delivery_of_a_request_has_the_same_message_fields(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(headers={"One": "1"})
    first = await take(worker)
    await first.nak()
    second = await take(worker)
    for name in ("stream", "stream_sequence", "stored_at", "subject", "headers", "body"):
        assert getattr(first, name) == getattr(second, name)


async def test_a_terminated_request_is_deleted_and_the_advisory_has_the_reason(
    installation: Installation,
) -> None:
    advisories = await installation.listen(
        f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{REQUESTS}.{TASK}"
    )
    worker = await installation.worker()
    sequence = await installation.publish()
    await soon((await take(worker)).term("invalid_request"))

    advisory = json.loads((await advisories.next_msg(timeout=5)).data)
    assert (advisory["stream_seq"], advisory["reason"]) == (sequence, "invalid_request")
    assert await installation.count(REQUESTS) == 0


async def test_extend_prevents_a_redelivery_after_ack_wait(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats(), ack_wait=LEASE, max_ack_pending=2)
    holder, other = await installation.worker(), await installation.worker()
    await installation.publish()
    delivered = await take(holder)
    pending = asyncio.create_task(other.loop.next())

    extends = 10
    for _ in range(extends):
        await asyncio.wait({pending}, timeout=2.5 * LEASE / extends)
        assert not pending.done()
        await delivered.extend()

    # Without a renewal, the other worker gets the request after the same time.
    again = await soon(pending)
    assert again is not None
    assert (again.stream_sequence, again.attempt) == (delivered.stream_sequence, 2)


async def test_header_values_beyond_ascii_are_delivered_unchanged(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(headers={"Title": "Grüße, 世界"})
    headers = (await take(worker)).headers
    assert headers == {"Title": "Grüße, 世界"}
    assert type(headers["Title"]) is str


async def test_a_request_without_headers_has_none(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    assert (await take(worker)).headers == {}


# -- ack subjects of the second version -----------------------------------------------------------


async def test_deliveries_with_ack_subjects_of_version_2_are_settled(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    server = start_nats("feature_flags { js_ack_fc_v2: true }")
    installation = await installation_of(server, ack_wait=LEASE)
    worker = await installation.worker()
    sequence = await installation.publish(b"v2")
    for attempt, settle in ((1, "nak"), (2, "requeue"), (3, "term")):
        delivered = await take(worker)
        assert len(delivered._message.reply.split(".")) > 9, "the server's flag has no effect"
        assert (delivered.stream, delivered.stream_sequence) == (REQUESTS, sequence)
        assert delivered.attempt == attempt
        await delivered.extend()
        if settle == "term":
            await soon(delivered.term("reason"))
        else:
            await soon(getattr(delivered, settle)())
    assert await installation.count(REQUESTS) == 0
    await installation.publish()
    delivered = await take(worker)
    pending = asyncio.create_task(worker.loop.next())
    for _ in range(8):
        await asyncio.wait({pending}, timeout=LEASE / 5)
        await delivered.extend()
    assert not pending.done(), "the lease was not renewed"
    await soon(delivered.ack())
    assert await installation.count(REQUESTS) == 0
    worker.loop.stop()
    await soon(pending)


# -- the lease guard ------------------------------------------------------------------------------


async def test_a_renewal_is_reported_to_the_guard_only_while_connected(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    monkeypatch.setattr(LeaseGuard, "alive", lambda *_: reports.append("alive"))
    monkeypatch.setattr(LeaseGuard, "renewed", lambda *_: reports.append("renewed"))
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await soon(delivered.extend())
    await installation.kill_server()
    await soon(delivered.extend())
    await installation.start_server()
    await until_connected(worker.bus)
    await soon(delivered.extend())
    assert reports == ["alive", "renewed", "alive", "alive", "renewed"]


# -- the server is down ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
async def test_an_ack_without_a_server_is_confirmed_after_the_restart(
    installation: Installation, how: str
) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await (installation.kill_server() if how == "SIGKILL" else installation.stop_server())
    settling = asyncio.create_task(delivered.ack())
    await asyncio.wait({settling}, timeout=2 * delivery.CONFIRM_PAUSE)
    assert not settling.done()

    returned = await installation.start_server()
    await soon(settling)
    measured("server's return to a confirmed ack", time.monotonic() - returned)
    await settle_forgotten_delivery(installation, worker, after=how)
    assert await installation.count(REQUESTS) == 0


async def test_an_unconfirmed_ack_is_sent_again_after_a_kill_of_the_server(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CONFIRM_TIMEOUT", 1_000.0)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    with installation.frozen():
        settling = asyncio.create_task(delivered.ack())
        await asyncio.wait({settling}, timeout=0.1)
        await installation.kill_server()
    assert not settling.done()
    await installation.start_server()
    await soon(settling)
    await settle_forgotten_delivery(installation, worker, after="SIGKILL")
    assert await installation.count(REQUESTS) == 0


async def settle_forgotten_delivery(
    installation: Installation, worker: Worker, *, after: str
) -> None:
    """Settle a redelivery: a killed server may have stored the request but not its delivery."""
    if after == "SIGKILL" and await installation.count(REQUESTS):
        again = await take(worker)
        assert again.attempt == 1
        await soon(again.ack())


async def test_a_nak_without_a_server_is_not_buffered_by_the_client(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second NAK after the reconnect would take the request from the worker that then has it."""
    monkeypatch.setattr(delivery, "CONFIRM_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "CONFIRM_TIMEOUT", 0.02)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.stop_server()
    settling = asyncio.create_task(delivered.nak())
    await asyncio.wait({settling}, timeout=0.2)
    assert not settling.done()
    assert worker.bus.client.pending_data_size == 0

    monkeypatch.undo()
    await installation.start_server()
    await soon(settling)
    assert (await take(worker)).attempt == 2


async def test_a_nak_gives_up_while_the_server_is_down(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 0.3)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.kill_server()
    await soon(delivered.nak())


@pytest.mark.parametrize("what", ["stream", "durable"])
async def test_settling_ends_when_the_stream_or_the_durable_is_deleted(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 1_000.0)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.api(
        f"STREAM.DELETE.{REQUESTS}" if what == "stream" else f"CONSUMER.DELETE.{REQUESTS}.{TASK}"
    )
    for settle in (delivered.ack, delivered.nak, lambda: delivered.term("reason")):
        started = time.monotonic()
        await soon(settle())
        measured(f"settling without a {what}", time.monotonic() - started)


async def test_settling_ends_when_the_server_does_not_know_the_delivery(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may lose deliveries in a kill; here the durable is deleted and created again."""
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 1_000.0)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.api(f"CONSUMER.DELETE.{REQUESTS}.{TASK}")
    await installation.topology.ensure(TASK)
    started = time.monotonic()
    await soon(delivered.ack())
    measured("settling an unknown delivery", time.monotonic() - started)
    again = await take(worker)
    assert (again.stream_sequence, again.attempt) == (delivered.stream_sequence, 1)


async def test_an_ack_without_permission_gives_up(
    start_nats: StartNats, installation_of: InstallationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CONFIRM_TIMEOUT", 0.1)
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 0.5)
    installation = await installation_of(start_nats(MUTE))
    worker = await installation.worker(installation.server.url.replace("//", "//mute:x@"))
    await installation.publish()
    await soon((await take(worker)).ack())
    assert (await installation.consumer_info()).num_ack_pending == 1


async def test_an_ack_on_a_closed_client_raises(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await worker.bus.client.close()
    with pytest.raises(BusUnavailable):
        await soon(delivered.ack())
    await soon(delivered.nak())
    await soon(delivered.extend())
