"""The pace of each queue, measured from the results of the last minutes."""

import time
from collections import defaultdict, deque

from generation_client import AnyEvent
from generation_contracts import ProgressEvent, SucceededEvent, TerminalEvent

WINDOW = 600.0  # seconds
MOST_SAMPLES = 64  # per queue


class Pace:
    """Measures the seconds from one result to the next while requests are queued."""

    def __init__(self) -> None:
        self._run_ends: dict[str, float] = {}  # estimated end of the run of the last event
        self._ended: dict[str, float] = {}  # time of the last terminal event
        self._samples: defaultdict[str, deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=MOST_SAMPLES)
        )

    def add(self, event: AnyEvent) -> None:
        """Update the measurements with an event."""
        now = self._now()
        if isinstance(event, ProgressEvent) and event.eta is not None:
            self._run_ends[event.queue_name] = now + event.eta
        if not isinstance(event, TerminalEvent):
            return
        self._run_ends.pop(event.queue_name, None)
        if isinstance(event, SucceededEvent):
            # The queue may have been empty before this run; then only the run itself counts.
            timings = event.timings
            took = timings.inference + timings.encode + timings.upload
            since = now - self._ended.get(event.queue_name, 0.0)
            self._samples[event.queue_name].append((now, min(since, took)))
        self._ended[event.queue_name] = now

    def seconds(self, queue: str) -> float | None:
        """Return the mean of the last minutes, or None without a measurement."""
        oldest = self._now() - WINDOW
        samples = [seconds for at, seconds in self._samples[queue] if at >= oldest]
        return sum(samples) / len(samples) if samples else None

    def until_start(self, queue: str, before: int) -> float | None:
        """Return the estimated seconds until a request starts with `before` requests before it.

        The current run ends at the time of its latest estimate. Each other request takes the mean
        of the last minutes. None without a measurement.
        """
        pace = self.seconds(queue)
        if pace is None:
            return None
        left = self._run_ends.get(queue, 0.0) - self._now()
        return max(left, pace) + pace * before

    def _now(self) -> float:
        return time.monotonic()
