"""The event log: stored events, readers, and bounded memory."""

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.gateway.event_log import LAST, OVERHEAD, Entry, EventId, EventLog
from generation_client import AnyEvent
from generation_contracts import CancelledEvent, ProgressEvent, Task, encode

SIZE = 300  # bytes on the wire
LONG = 60.0  # seconds; no test waits that long
TERMINAL = EventId(LAST, LAST)


class Clock(EventLog):
    """A log with a clock that the test sets."""

    time = 0.0

    def _now(self) -> float:
        return self.time


def progress(sequence: int, *, attempt: int = 1, request: str = "a", text: str = "") -> AnyEvent:
    return ProgressEvent(
        request_id=request,
        task=Task.TEXT_TO_IMAGE,
        sequence=sequence,
        time=datetime.now(UTC),
        worker="w",
        attempt=attempt,
        step=sequence,
        of=9,
        text=text or None,
    )


def end(request: str = "a") -> CancelledEvent:
    return CancelledEvent(
        request_id=request,
        task=Task.TEXT_TO_IMAGE,
        sequence=9,
        time=datetime.now(UTC),
        worker="w",
        attempt=1,
        request_digest="sha256:" + "0" * 64,
    )


async def nothing() -> AnyEvent | None:
    return None


async def stored() -> AnyEvent | None:
    return end()


async def forbidden() -> AnyEvent | None:
    raise AssertionError("unexpected lookup")


def log_of(
    *events: AnyEvent, seconds: float = LONG, most_bytes: int = 2**20, quiet: float = LONG
) -> Clock:
    log = Clock(seconds=seconds, most_bytes=most_bytes, quiet=quiet)
    for event in events:
        log.add(event, SIZE)
    return log


async def ids(entries: AsyncGenerator[Entry, None]) -> list[str]:
    async with aclosing(entries):
        return [str(entry.id) async for entry in entries]


async def one(entries: AsyncGenerator[Entry, None]) -> str:
    return str((await asyncio.wait_for(anext(entries), 5)).id)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_id_survives_formatting_and_parsing(attempt: int, sequence: int) -> None:
    event_id = EventId(attempt, sequence)
    assert EventId.parse(str(event_id)) == event_id


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "1-2-3", "a-b", "٣-٤", "1-2 ", "1" * 40, "²-1"]
)
def test_an_invalid_id_is_not_parsed(text: str) -> None:
    assert EventId.parse(text) is None


async def test_a_reader_gets_stored_events_first_and_stops_after_the_terminal_event() -> None:
    log = log_of(progress(0), progress(1))
    reading = log.follow("a", read_result=nothing)
    assert [await one(reading), await one(reading)] == ["1-0", "1-1"]
    log.add(progress(2), SIZE)
    log.add(end(), SIZE)
    assert await ids(reading) == ["1-2", str(TERMINAL)]


async def test_events_of_other_requests_wake_no_reader() -> None:
    log = log_of()
    reading = log.follow("a", read_result=nothing)
    waiting = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    log.add(progress(0, request="b"), SIZE)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    log.add(end(), SIZE)
    assert (await waiting).id == TERMINAL
    await reading.aclose()


async def test_a_reader_resumes_after_its_last_event() -> None:
    log = log_of(progress(0), progress(1), progress(0, attempt=2), progress(1, attempt=2), end())
    for after, rest in [
        ("1-0", ["1-1", "2-0", "2-1"]),
        ("1-7", ["2-0", "2-1"]),  # the other gateway has received more of this attempt
        ("2-1", []),
        ("3-0", []),
    ]:
        found = await ids(log.follow("a", after=EventId.parse(after), read_result=forbidden))
        assert found == [*rest, str(TERMINAL)]


async def test_a_reader_ahead_of_the_log_gets_no_event_twice() -> None:
    log = log_of(progress(0))
    reading = log.follow("a", after=EventId(1, 2), read_result=nothing)
    waiting = asyncio.ensure_future(anext(reading))
    for sequence in (1, 2, 3):
        await asyncio.sleep(0)
        log.add(progress(sequence), SIZE)
    assert (await asyncio.wait_for(waiting, 5)).id == EventId(1, 3)
    await reading.aclose()


@pytest.mark.parametrize("after", [TERMINAL, EventId(9_999_999_999, 0)])
async def test_nothing_follows_the_terminal_event(after: EventId) -> None:
    log = log_of(progress(0), end())
    assert await ids(log.follow("a", after=after, read_result=forbidden)) == []


async def test_event_ids_are_strictly_increasing() -> None:
    log = log_of(
        progress(0),
        progress(1),
        progress(1),
        progress(0, attempt=2),
        progress(2),  # from a worker that continues after the loss of its lease
        end(),
        progress(1, attempt=2),
        end(),
    )
    assert await ids(log.follow("a", read_result=forbidden)) == ["1-0", "1-1", "2-0", str(TERMINAL)]


async def test_a_reader_first_looks_up_the_terminal_event() -> None:
    assert await ids(log_of().follow("a", read_result=stored)) == [str(TERMINAL)]


async def test_a_reader_of_a_new_job_does_not_look_up_the_terminal_event_first() -> None:
    reading = log_of().follow("a", read_result=forbidden, read_first=False)
    waiting = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})


async def test_a_missed_terminal_event_is_looked_up() -> None:
    log = log_of(progress(0), quiet=0.01)
    reading = log.follow("a", read_result=stored, read_first=False)
    assert await ids(reading) == ["1-0", str(TERMINAL)]


async def test_after_an_interruption_every_reader_looks_up_the_terminal_event() -> None:
    log = log_of()
    reading = log.follow("a", read_result=stored, read_first=False)
    waiting = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    log.interrupt()
    assert (await asyncio.wait_for(waiting, 5)).id == TERMINAL


async def test_a_looked_up_terminal_event_wakes_other_readers() -> None:
    log = log_of()
    other = asyncio.ensure_future(ids(log.follow("a", read_result=forbidden, read_first=False)))
    await asyncio.sleep(0)
    assert await ids(log.follow("a", read_result=stored)) == [str(TERMINAL)]
    assert await asyncio.wait_for(other, 5) == [str(TERMINAL)]


async def test_a_lookup_error_is_raised_in_the_reader() -> None:
    async def broken() -> AnyEvent | None:
        raise OSError

    with pytest.raises(OSError):
        await ids(log_of().follow("a", read_result=broken))


async def test_old_events_are_dropped_and_the_terminal_event_is_looked_up() -> None:
    log = log_of(progress(0), progress(1), end(), seconds=10)
    log.time = 3_600.0
    after = EventId(1, 0)
    assert log.latest("a") is None
    assert log.size == 0
    assert await ids(log.follow("a", after=after, read_result=stored)) == [str(TERMINAL)]


async def test_the_log_returns_the_latest_event() -> None:
    log = log_of(progress(0), progress(1))
    assert log.latest("a") == progress(1).model_copy(update={"time": log.latest("a").time})  # type: ignore[union-attr] # there is one event
    assert log.latest("b") is None


async def test_a_slow_reader_misses_dropped_events_but_not_the_terminal_event() -> None:
    """The log is too small for the stream and drops the terminal event before it is read."""
    log = log_of(progress(0), most_bytes=3 * (SIZE + OVERHEAD))
    reading = log.follow("a", read_result=stored)
    assert await one(reading) == "1-0"
    for sequence in range(1, 50):
        log.add(progress(sequence), SIZE)
    log.add(end(), SIZE)
    for sequence in range(50):
        log.add(progress(sequence, request="b"), SIZE)
    assert await ids(reading) == [str(TERMINAL)]


async def test_a_slow_reader_gets_the_remaining_events_in_order() -> None:
    log = log_of(progress(0), most_bytes=3 * (SIZE + OVERHEAD))
    reading = log.follow("a", read_result=nothing)
    assert await one(reading) == "1-0"
    for sequence in range(1, 50):
        log.add(progress(sequence), SIZE)
    log.add(end(), SIZE)
    assert await ids(reading) == ["1-48", "1-49", str(TERMINAL)]


async def test_a_reader_gets_an_event_larger_than_the_log() -> None:
    log = log_of(most_bytes=2**10)
    log.add(end(), 2**20)
    assert await ids(log.follow("a", read_result=forbidden)) == [str(TERMINAL)]


async def test_memory_is_bounded_with_idle_readers() -> None:
    bound = 2**20
    log = log_of(most_bytes=bound)
    slow = [log.follow("slow", read_result=nothing) for _ in range(100)]
    log.add(progress(0, request="slow"), SIZE)
    for reading in slow:
        await one(reading)
    tracemalloc.start()
    try:
        for number in range(2_000):
            event = progress(1, request=f"r{number}", text="x" * 500)
            log.add(event, len(encode(event)))
            log.add(progress(number + 1, request="slow"), SIZE)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert log.size <= bound
    assert used < bound * 1.5, "OVERHEAD is smaller than the real overhead of an event"
    for reading in slow:
        await reading.aclose()


async def test_the_log_has_no_record_of_a_request_without_events_and_readers() -> None:
    log = log_of(seconds=10)
    for number in range(100):
        reading = log.follow(f"r{number}", read_result=nothing)
        waiting = asyncio.ensure_future(anext(reading))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        await reading.aclose()
    for number in range(100):
        log.add(progress(0, request=f"s{number}"), SIZE)
    log.time = 11.0
    assert log.size == 0
    assert not log._requests


async def test_five_hundred_readers_of_one_request_get_each_event_once() -> None:
    log = log_of()
    readings = [
        asyncio.ensure_future(ids(log.follow("a", read_result=nothing))) for _ in range(500)
    ]
    for sequence in range(50):
        await asyncio.sleep(0)
        log.add(progress(sequence), SIZE)
    log.add(end(), SIZE)
    expected = [*(f"1-{sequence}" for sequence in range(50)), str(TERMINAL)]
    assert all(found == expected for found in await asyncio.gather(*readings))
