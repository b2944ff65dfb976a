"""The events of the last minutes, so that a stream of events can be resumed.

Progress events are published once and not stored. Each gateway receives all of them while it runs,
and keeps those of its tenants for a while, within a bound of bytes. An event's id consists of the
event's own numbers, so a stream that was broken off at one gateway can be resumed at another.
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

LAST = 2**31  # a terminal event comes after all others, whatever its own number
OVERHEAD = 2_000  # bytes of memory that an event takes besides its bytes on the wire
QUIET = 5.0  # seconds
MAX_ID = 32  # characters

Look = Callable[[], Awaitable[AnyEvent | None]]


@dataclass(frozen=True, order=True)
class EventId:
    """Where an event stands among the events of its request.

    Attributes:
        attempt: Of the request.
        sequence: Within the attempt; `LAST` for the terminal event.
    """

    attempt: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.sequence}"

    @property
    def is_terminal(self) -> bool:
        """Whether no event follows. A client may send any number."""
        return self.attempt >= LAST

    @classmethod
    def parse(cls, text: str) -> "EventId | None":
        """Read the value of `Last-Event-ID`; None where it is not the id of an event."""
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
        size: Bytes that it counts for.
        at: Seconds on the clock of `time.monotonic`.
    """

    id: EventId
    event: AnyEvent
    size: int
    at: float


@dataclass
class _Story:
    """The events of one request that are kept, oldest first.

    Attributes:
        dropped: How many have been dropped; the number of the first one that is kept.
        latest: The id of the last one that was added, kept or not.
        changed: Set, and replaced, when there is news for the readers.
        interruptions: How often events may have been missed.
        readers: How many follow the request now.
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

    def takes(self, event_id: EventId) -> bool:
        """Whether an event comes after those that were added before."""
        if self.latest is None or event_id > self.latest:
            return True
        return event_id.is_terminal and not self.ended  # it was dropped, and has been looked up

    def wake(self) -> None:
        """Let every reader go on."""
        self.changed.set()
        self.changed = asyncio.Event()


class EventLog:
    """Keeps events for a while.

    Args:
        seconds: How long.
        most_bytes: Of all events together; the oldest are dropped first.
        quiet: Seconds without an event, about, after which a reader looks up the terminal event.
    """

    def __init__(self, *, seconds: float, most_bytes: int, quiet: float = QUIET) -> None:
        self._seconds = seconds
        self._quiet = quiet
        self._most_bytes = most_bytes
        self._stories: dict[str, _Story] = {}
        self._order: deque[str] = deque()  # the request of each entry, oldest entry first
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of all events that are kept."""
        self._drop_old()
        return self._bytes

    def add(self, event: AnyEvent, size: int) -> None:
        """Keep an event and wake the readers of its request.

        The ids of a request's events only grow: an event of an earlier attempt, a repeated one, and
        whatever comes after the terminal event is left out.

        Args:
            event: As it was received.
            size: Bytes on the wire.
        """
        story = self._stories.setdefault(event.request_id, _Story())
        entry = Entry(EventId.of(event), event, size + OVERHEAD, self._now())
        if not story.takes(entry.id):
            return
        story.latest = entry.id
        story.entries.append(entry)
        self._order.append(event.request_id)
        self._bytes += entry.size
        self._drop_old()
        story.wake()

    def latest(self, request_id: str) -> AnyEvent | None:
        """Return the last event of a request, if it is kept."""
        self._drop_old()
        story = self._stories.get(request_id)
        return story.entries[-1].event if story is not None and story.entries else None

    def interrupt(self) -> None:
        """Let every reader look up its result: the connection was lost, and events with it."""
        for story in self._stories.values():
            story.interruptions += 1
            story.wake()

    async def follow(
        self,
        request_id: str,
        *,
        after: EventId | None = None,
        look: Look,
        look_first: bool = True,
    ) -> AsyncGenerator[Entry, None]:
        """Yield the events of a request, those that are kept first, and end after the terminal one.

        The terminal event may be missed, or dropped before a slow reader has taken it. So it is
        looked up at the beginning, after an interruption, and when nothing has come for long. The
        log keeps nothing for a slow reader.

        Args:
            request_id: Its id.
            after: Only events after this one.
            look: Returns the terminal event of the request, or None while there is none.
            look_first: False for a request that has just been queued.
        """
        if after is not None and after.is_terminal:
            return
        with self._reading(request_id) as story:
            number = story.dropped
            interruptions = story.interruptions - look_first
            while True:
                changed = story.changed
                if number < story.dropped:
                    number = story.dropped
                    interruptions = story.interruptions - 1
                if number < story.dropped + len(story.entries):
                    entry = story.entries[number - story.dropped]
                    number += 1
                    # This gateway may receive later what its client has from another one.
                    if after is None or entry.id > after:
                        yield entry
                    if entry.id.is_terminal:
                        return
                elif interruptions < story.interruptions or not await _is_set(changed, self._quiet):
                    interruptions = story.interruptions
                    found = await look()
                    if found is not None:
                        self.add(found, len(encode(found)))

    @contextmanager
    def _reading(self, request_id: str) -> Iterator[_Story]:
        self._drop_old()
        story = self._stories.setdefault(request_id, _Story())
        story.readers += 1
        try:
            yield story
        finally:
            story.readers -= 1
            self._forget(request_id, story)

    def _drop_old(self) -> None:
        oldest = self._now() - self._seconds
        while self._order:
            request_id = self._order[0]
            story = self._stories[request_id]
            too_many = self._bytes > self._most_bytes and len(self._order) > 1
            if not too_many and story.entries[0].at >= oldest:
                return
            self._order.popleft()
            self._bytes -= story.entries.popleft().size
            story.dropped += 1
            self._forget(request_id, story)

    def _forget(self, request_id: str, story: _Story) -> None:
        if not story.entries and not story.readers:
            self._stories.pop(request_id, None)

    def _now(self) -> float:
        return time.monotonic()


async def _is_set(event: asyncio.Event, within: float) -> bool:
    try:
        # Readers that began together do not look together.
        async with asyncio.timeout(within * random.uniform(0.8, 1.2)):  # noqa: S311 - no secret
            await event.wait()
    except TimeoutError:
        return False
    return True
