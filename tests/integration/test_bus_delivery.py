"""Settling on a real server: confirmed, told with a reason, kept, and given up in the end."""

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


async def test_an_acked_request_is_gone(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    assert await installation.count(REQUESTS) == 1
    started = time.monotonic()
    await soon(delivered.ack())
    measured("ack", time.monotonic() - started)
    assert await installation.count(REQUESTS) == 0


async def test_a_nak_brings_the_request_again_at_once(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish(b"again")
    for attempt in range(1, 6):
        delivered = await take(worker)
        assert (delivered.body, delivered.attempt) == (b"again", attempt)
        started = time.monotonic()
        await soon(delivered.nak())
    measured("nak", time.monotonic() - started)


async def test_released_request_comes_again_at_once_and_knows_of_it(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"again")
    await installation.publish(b"other")
    for attempt, releases in ((1, 0), (2, 1), (3, 2)):
        delivered = await take(worker)
        assert (delivered.body, delivered.attempt) == (b"again", attempt)
        assert await soon(delivered.marked_uncounted()) == releases
        await soon(delivered.requeue())
    again = await take(worker)
    await soon(again.requeue())
    await soon(again.requeue())  # as after a confirmation that was lost: it is one release
    again = await take(worker)
    assert await soon(again.marked_uncounted()) == 4
    await soon(again.nak())  # a try that failed is no release
    again = await take(worker)
    assert await soon(again.marked_uncounted()) == 4
    await soon(again.ack())
    assert await soon((await take(worker)).marked_uncounted()) == 0


async def test_delivery_that_is_discounted_is_a_try_once_it_is_counted(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish()
    first = await take(worker)
    for note, releases in ((first.mark_uncounted, 1), (first.mark_counted, 0), (first.requeue, 1)):
        await soon(note())
        assert await soon(first.marked_uncounted()) == releases
    again = await take(worker)
    await soon(again.mark_uncounted())
    assert await soon(again.marked_uncounted()) == 2
    await soon(again.requeue())
    assert await soon(again.marked_uncounted()) == 2, (
        "one delivery counts once, whatever is noted of it"
    )


async def test_second_note_of_a_delivery_counts_once_however_late(
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


async def test_release_without_a_place_for_its_note_gives_back_all_the_same(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.api("STREAM.DELETE.GENERATION_RELEASES")
    await soon(delivered.requeue())
    again = await take(worker)
    assert (again.attempt, await soon(again.marked_uncounted())) == (2, 0)


async def test_release_over_a_dead_server_ends(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    with installation.frozen():
        await soon(delivered.requeue())
    again = await take(worker)
    assert again.attempt == 2


async def test_what_is_the_same_for_every_delivery_stays_the_same(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(headers={"One": "1"})
    first = await take(worker)
    await first.nak()
    second = await take(worker)
    for name in ("stream", "stream_sequence", "stored_at", "subject", "headers", "body"):
        assert getattr(first, name) == getattr(second, name)


async def test_a_terminated_request_is_gone_and_the_advisory_has_the_reason(
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


async def test_extend_keeps_a_request_beyond_ack_wait(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats(), ack_wait=LEASE, max_ack_pending=2)
    holder, other = await installation.worker(), await installation.worker()
    await installation.publish()
    held = await take(holder)
    coming = asyncio.create_task(other.loop.next())

    extends = 10
    for _ in range(extends):
        await asyncio.wait({coming}, timeout=2.5 * LEASE / extends)
        assert not coming.done()
        await held.extend()

    # The same wait without a renewal, to show that the other worker would have got it.
    again = await soon(coming)
    assert again is not None
    assert (again.stream_sequence, again.attempt) == (held.stream_sequence, 2)


async def test_header_values_beyond_ascii_come_as_they_were_sent(
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


async def test_deliveries_with_ack_subjects_v2_are_settled_like_others(
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
    coming = asyncio.create_task(worker.loop.next())
    for _ in range(8):
        await asyncio.wait({coming}, timeout=LEASE / 5)
        await delivered.extend()
    assert not coming.done(), "the lease was not renewed"
    await soon(delivered.ack())
    assert await installation.count(REQUESTS) == 0
    worker.loop.stop()
    await soon(coming)


# -- the lease guard ------------------------------------------------------------------------------


async def test_a_renewal_is_reported_only_when_the_connection_is_there(
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


# -- the server is away ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
async def test_an_ack_without_a_server_is_confirmed_after_its_return(
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
    await settle_what_is_forgotten(installation, worker, after=how)
    assert await installation.count(REQUESTS) == 0


async def test_an_ack_that_is_under_way_when_the_server_dies_is_asked_for_again(
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
    await settle_what_is_forgotten(installation, worker, after="SIGKILL")
    assert await installation.count(REQUESTS) == 0


async def settle_what_is_forgotten(
    installation: Installation, worker: Worker, *, after: str
) -> None:
    """A server that was killed may know the request but not its delivery, and give it once more."""
    if after == "SIGKILL" and await installation.count(REQUESTS):
        again = await take(worker)
        assert again.attempt == 1
        await soon(again.ack())


async def test_a_nak_without_a_server_is_not_kept_for_later(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent twice at the reconnect, it would take the request from the worker that has it then."""
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


async def test_a_nak_gives_up_while_the_server_stays_away(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 0.3)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.kill_server()
    await soon(delivered.nak())


@pytest.mark.parametrize("what", ["stream", "durable"])
async def test_settling_ends_when_the_stream_or_the_durable_is_gone(
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


async def test_settling_ends_when_the_server_has_forgotten_the_delivery(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it has after a kill; here the durable is another one of the same name."""
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 1_000.0)
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await installation.api(f"CONSUMER.DELETE.{REQUESTS}.{TASK}")
    await installation.topology.ensure(TASK)
    started = time.monotonic()
    await soon(delivered.ack())
    measured("settling what is forgotten", time.monotonic() - started)
    again = await take(worker)
    assert (again.stream_sequence, again.attempt) == (delivered.stream_sequence, 1)


async def test_an_ack_that_may_not_be_said_is_given_up(
    start_nats: StartNats, installation_of: InstallationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CONFIRM_TIMEOUT", 0.1)
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 0.5)
    installation = await installation_of(start_nats(MUTE))
    worker = await installation.worker(installation.server.url.replace("//", "//mute:x@"))
    await installation.publish()
    await soon((await take(worker)).ack())
    assert (await installation.consumer_info()).num_ack_pending == 1


async def test_a_client_that_has_given_up_cannot_settle(installation: Installation) -> None:
    worker = await installation.worker()
    await installation.publish()
    delivered = await take(worker)
    await worker.bus.client.close()
    with pytest.raises(BusUnavailable):
        await soon(delivered.ack())
    await soon(delivered.nak())
    await soon(delivered.extend())
