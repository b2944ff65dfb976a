"""How fast each queue moves, measured by the results of the last minutes."""

import time
from collections import deque

from generation_client import AnyEvent
from generation_contracts import ProgressEvent, SucceededEvent, Task, TerminalEvent

WINDOW = 600.0  # seconds
MOST_SAMPLES = 64  # of each task


class Pace:
    """The seconds from one result to the next while requests wait."""

    def __init__(self) -> None:
        self._run_ends: dict[Task, float] = {}  # of the run that was heard of last
        self._ended: dict[Task, float] = {}
        self._samples: dict[Task, deque[tuple[float, float]]] = {
            task: deque(maxlen=MOST_SAMPLES) for task in Task
        }

    def add(self, event: AnyEvent) -> None:
        """Measure by an event."""
        now = self._now()
        if isinstance(event, ProgressEvent) and event.eta is not None:
            self._run_ends[event.task] = now + event.eta
        if not isinstance(event, TerminalEvent):
            return
        self._run_ends.pop(event.task, None)
        if isinstance(event, SucceededEvent):
            # The queue may have been empty since the event before: then the run itself counts.
            timings = event.timings
            took = timings.inference + timings.encode + timings.upload
            since = now - self._ended.get(event.task, 0.0)
            self._samples[event.task].append((now, min(since, took)))
        self._ended[event.task] = now

    def seconds(self, task: Task) -> float | None:
        """Return the mean of the last minutes, or None where nothing was measured."""
        oldest = self._now() - WINDOW
        samples = [seconds for at, seconds in self._samples[task] if at >= oldest]
        return sum(samples) / len(samples) if samples else None

    def until_start(self, task: Task, before: int) -> float | None:
        """Return in how many seconds a request starts that has so many others before it.

        The run that is under way ends when its progress says, the others take the mean of the last
        minutes. None where nothing was measured.
        """
        pace = self.seconds(task)
        if pace is None:
            return None
        left = self._run_ends.get(task, 0.0) - self._now()
        return max(left, pace) + pace * before

    def _now(self) -> float:
        return time.monotonic()
