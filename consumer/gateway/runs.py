"""The requests that are running, according to their events.

The server only reports which requests have been delivered. A worker prefetches requests, so a
delivered request may still wait in the worker.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

FRESH = 60.0  # seconds after its last event for which a run is counted; its attempt may have ended
MOST = 10_000  # runs in memory, and as many ended runs


class Runs:
    """The runs in progress; a new gateway learns of each run with its next event.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # The time of the last event of each run, in order.
        self._last_events: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._ended: OrderedDict[tuple[str, str], float] = OrderedDict()

    def add(self, queue: str, request_id: str) -> None:
        """Record an event of a running request."""
        # Progress and results have separate subscriptions, so progress may follow the result.
        if (queue, request_id) not in self._ended:
            self._note(self._last_events, (queue, request_id))

    def remove(self, queue: str, request_id: str) -> None:
        """Record that a request has ended."""
        self._last_events.pop((queue, request_id), None)
        self._note(self._ended, (queue, request_id))

    def has(self, queue: str, request_id: str) -> bool:
        """Return whether a request has started to run and has not ended."""
        return (queue, request_id) in self._last_events

    def count(self, queue: str) -> int:
        """Count the running requests of a queue."""
        oldest, found = self._now() - FRESH, 0
        for (of, _), last_event in reversed(self._last_events.items()):
            if last_event < oldest:
                break
            found += of == queue
        return found

    def _note(self, times: OrderedDict[tuple[str, str], float], key: tuple[str, str]) -> None:
        times[key] = self._now()
        times.move_to_end(key)
        if len(times) > MOST:
            times.popitem(last=False)
