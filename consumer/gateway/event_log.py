"""The events of the last minutes, from which a client can resume an event stream.

Progress events are published once and not stored. Each running gateway receives all of them and
keeps those of its tenants for a time, within a limit of bytes. The id of an event is made of its
attempt and sequence, so a stream that broke at one gateway can be resumed at another.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from generation_client import AnyEvent
from generation_contracts import TerminalEvent, encode

LAST = 2**31  # the number of every terminal event, so that it sorts after all others
OVERHEAD = 2_000  # bytes of memory of an event in addition to its bytes on the wire
QUIET = 5.0  # seconds
MAX_ID = 32  # characters

ReadResult = Callable[[], Awaitable[AnyEvent | None]]


@dataclass(frozen=True, order=True)
class EventId:
    """The position of an event among the events of its request.

    Attributes:
        attempt: Attempt of the request; `LAST` for the terminal event.
        sequence: Number within the attempt; `LAST` for the terminal event.
    """

    attempt: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.sequence}"

    @property
    def is_terminal(self) -> bool:
        """Whether no event follows; a client may also send a larger number."""
        return self.attempt >= LAST

    @classmethod
    def parse(cls, text: str) -> "EventId | None":
        """Parse the value of `Last-Event-ID`; return None if it is not the id of an event."""
        attempt, _, sequence = text.partition("-")
        if len(text) <= MAX_ID and all(n.isascii() and n.isdecimal() for n in (attempt, sequence)):
            return cls(int(attempt), int(sequence))
        return None

    @classmethod
    def of(cls, event: AnyEvent) -> "EventId":
        """Return the id of an event."""
        if isinstance(event, TerminalEvent):
            return cls(LAST, LAST)
        return cls(event.attempt, event.sequence)


@dataclass(frozen=True)
class Entry:
    """One event in the log.

    Attributes:
        size: Bytes on the wire and `OVERHEAD`.
        at: Time of arrival, in seconds of `time.monotonic`.
    """

    id: EventId
    event: AnyEvent
    size: int
    at: float


@dataclass
class _RequestEvents:
    """The kept events of one request, oldest first.

    Attributes:
        dropped: Number of dropped events, which is also the number of the first kept event.
        latest: The id of the last added event, kept or not.
        changed: Set and replaced when the readers must check for new events.
        interruptions: How many times events may have been missed.
        readers: How many readers follow the request now.
    """

    entries: deque[Entry] = field(default_factory=deque)
    dropped: int = 0
    latest: EventId | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    interruptions: int = 0
    readers: int = 0

    @property
    def ended(self) -> bool:
        """Whether the terminal event is kept."""
        return bool(self.entries) and self.entries[-1].id.is_terminal

    def accepts(self, event_id: EventId) -> bool:
        """Return whether an event comes after all events that were added before."""
        if self.latest is None or event_id > self.latest:
            return True
        return event_id.is_terminal and not self.ended  # it was dropped and then read again

    def wake(self) -> None:
        """Wake every reader."""
        self.changed.set()
        self.changed = asyncio.Event()


class EventLog:
    """Keeps recent events in memory.

    Args:
        seconds: How long an event is kept.
        most_bytes: Limit for all events together; the oldest are dropped first.
        quiet: Approximate seconds without an event after which a reader reads the stored result.
    """

    def __init__(self, *, seconds: float, most_bytes: int, quiet: float = QUIET) -> None:
        self._seconds = seconds
        self._quiet = quiet
        self._most_bytes = most_bytes
        self._requests: dict[str, _RequestEvents] = {}
        self._order: deque[str] = deque()  # the request of each entry, oldest entry first
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of all kept events."""
        self._drop_old()
        return self._bytes

    def add(self, event: AnyEvent, size: int) -> None:
        """Add an event and wake the readers of its request.

        The event ids of a request only grow. Events of an earlier attempt, repeated events, and
        events after the terminal event are ignored.

        Args:
            event: The received event.
            size: Bytes on the wire.
        """
        events = self._requests.setdefault(event.request_id, _RequestEvents())
        entry = Entry(EventId.of(event), event, size + OVERHEAD, self._now())
        if not events.accepts(entry.id):
            return
        events.latest = entry.id
        events.entries.append(entry)
        self._order.append(event.request_id)
        self._bytes += entry.size
        self._drop_old()
        events.wake()

    def latest(self, request_id: str) -> AnyEvent | None:
        """Return the last kept event of a request, or None."""
        self._drop_old()
        events = self._requests.get(request_id)
        return events.entries[-1].event if events is not None and events.entries else None

    def interrupt(self) -> None:
        """Make every reader read its stored result: a lost connection may have lost events."""
        for events in self._requests.values():
            events.interruptions += 1
            events.wake()

    async def follow(
        self,
        request_id: str,
        *,
        after: EventId | None = None,
        read_result: ReadResult,
        read_first: bool = True,
    ) -> AsyncGenerator[Entry, None]:
        """Yield the events of a request, first the kept ones, and end after the terminal event.

        The terminal event may be missed, or dropped before a slow reader has received it. So the
        reader reads the stored result at the start, after an interruption, and after `quiet`
        seconds without an event. The log keeps no events for slow readers.

        Args:
            request_id: Id of the request.
            after: Yield only events after this one.
            read_result: Returns the stored terminal event of the request, or None.
            read_first: Whether to read the stored result at the start; False for a new request.
        """
        if after is not None and after.is_terminal:
            return
        with self._reading(request_id) as events:
            number = events.dropped
            interruptions = events.interruptions - read_first
            while True:
                changed = events.changed
                if number < events.dropped:
                    number = events.dropped
                    interruptions = events.interruptions - 1
                if number < events.dropped + len(events.entries):
                    entry = events.entries[number - events.dropped]
                    number += 1
                    # The client may have received this event from another gateway already.
                    if after is None or entry.id > after:
                        yield entry
                    if entry.id.is_terminal:
                        return
                elif interruptions < events.interruptions or not await _is_set(
                    changed, self._quiet
                ):
                    interruptions = events.interruptions
                    found = await read_result()
                    if found is not None:
                        self.add(found, len(encode(found)))

    @contextmanager
    def _reading(self, request_id: str) -> Iterator[_RequestEvents]:
        self._drop_old()
        events = self._requests.setdefault(request_id, _RequestEvents())
        events.readers += 1
        try:
            yield events
        finally:
            events.readers -= 1
            self._forget(request_id, events)

    def _drop_old(self) -> None:
        oldest = self._now() - self._seconds
        while self._order:
            request_id = self._order[0]
            events = self._requests[request_id]
            too_many = self._bytes > self._most_bytes and len(self._order) > 1
            if not too_many and events.entries[0].at >= oldest:
                return
            self._order.popleft()
            self._bytes -= events.entries.popleft().size
            events.dropped += 1
            self._forget(request_id, events)

    def _forget(self, request_id: str, events: _RequestEvents) -> None:
        if not events.entries and not events.readers:
            self._requests.pop(request_id, None)

    def _now(self) -> float:
        return time.monotonic()


async def _is_set(event: asyncio.Event, within: float) -> bool:
    try:
        # Random, so that readers that started together do not read their results together.
        async with asyncio.timeout(within * random.uniform(0.8, 1.2)):  # noqa: S311 - no secret
            await event.wait()
    except TimeoutError:
        return False
    return True
