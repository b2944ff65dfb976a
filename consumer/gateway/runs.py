"""Which requests run: those whose model has begun, as far as their events say.

The server only shows which requests have been delivered. A worker receives some in advance, which
wait in the worker.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from generation_contracts import Task

FRESH = (
    60.0  # seconds without an event after which a run is not counted: its attempt may have ended
)
MOST = 10_000  # runs that are remembered, and ended ones


class Runs:
    """The runs in progress. A gateway notices each of them at its next event.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # The time of the last event; the latest is the last one.
        self._heard: OrderedDict[tuple[Task, str], float] = OrderedDict()
        self._ended: OrderedDict[tuple[Task, str], float] = OrderedDict()

    def add(self, task: Task, request_id: str) -> None:
        """Note that a request runs."""
        # Progress and results have subscriptions of their own: progress may come after the result.
        if (task, request_id) not in self._ended:
            self._note(self._heard, (task, request_id))

    def remove(self, task: Task, request_id: str) -> None:
        """Note that a request has ended."""
        self._heard.pop((task, request_id), None)
        self._note(self._ended, (task, request_id))

    def has(self, task: Task, request_id: str) -> bool:
        """Whether a request has begun to run and has not ended."""
        return (task, request_id) in self._heard

    def count(self, task: Task) -> int:
        """Count the requests of a task that run now."""
        oldest, found = self._now() - FRESH, 0
        for (of, _), heard in reversed(self._heard.items()):
            if heard < oldest:
                break
            found += of == task
        return found

    def _note(self, times: OrderedDict[tuple[Task, str], float], key: tuple[Task, str]) -> None:
        times[key] = self._now()
        times.move_to_end(key)
        if len(times) > MOST:
            times.popitem(last=False)
