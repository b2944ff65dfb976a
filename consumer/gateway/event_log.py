"""The events of the last minutes, so that whoever lost its connection misses and repeats none.

Progress is published once and not stored. Each gateway hears all of it, and keeps it for a while,
within a bound of bytes. An event's id is made of the event itself, so that a stream that was broken
off at one gateway can be resumed at another.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from generation_client import AnyEvent
from generation_contracts import TerminalEvent

LAST = 2**31  # a terminal event comes after all others, whatever its own number


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

    @classmethod
    def parse(cls, text: str) -> "EventId | None":
        """Read what `Last-Event-ID` says; None where it is not one of ours."""
        attempt, _, sequence = text.partition("-")
        if attempt.isdecimal() and sequence.isdecimal() and len(text) <= 32:
            return cls(int(attempt), int(sequence))
        return None

    @classmethod
    def of(cls, event: AnyEvent) -> "EventId":
        """The id of an event."""
        if isinstance(event, TerminalEvent):
            return cls(LAST, LAST)
        return cls(event.attempt, event.sequence)


@dataclass(frozen=True)
class Entry:
    """One event in the log."""

    id: EventId
    event: AnyEvent
    size: int  # bytes on the wire
    at: float  # on the clock of time.monotonic


@dataclass
class _Story:
    """The events of one request that are kept, and who waits for more."""

    entries: deque[Entry] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    readers: int = 0


class EventLog:
    """Keeps events for a while.

    Args:
        seconds: How long.
        most_bytes: Of all events together; the oldest go first.
    """

    def __init__(self, *, seconds: float, most_bytes: int) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._stories: OrderedDict[str, _Story] = OrderedDict()
        self._order: deque[tuple[str, Entry]] = deque()  # oldest first
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of all events that are kept."""
        return self._bytes

    def add(self, event: AnyEvent, size: int) -> None:
        """Keep an event, and wake those who wait for it."""
        raise NotImplementedError

    def follow(
        self, request_id: str, *, after: EventId | None = None
    ) -> AsyncIterator[Entry | None]:
        """Yield the events after one, those that are kept first; None where nothing came for long.

        A slow reader is not waited for: it misses what is dropped meanwhile.
        """
        raise NotImplementedError

    def _now(self) -> float:
        return time.monotonic()
