"""Progress of a run: written by the inference thread, read by the event loop."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """The changes since the previous update.

    Attributes:
        step: Number of completed steps; of generated tokens for text.
        of: Expected number of steps; at least 1.
        seconds_per_step: Mean of this run so far; None before the first step.
        text: New text since the previous update.
        preview: A JPEG file of the unfinished image; None: no new preview.
    """

    step: int
    of: int
    seconds_per_step: float | None = None
    text: str = ""
    preview: bytes | None = None


class Progress:
    """The progress of one request; implements `consumer.ports.model.RunProgress`.

    A request can run again, with less memory or alone after its batch failed. Then the next update
    has step 0: the text and the preview of the previous run are void. Times are in seconds of
    `time.monotonic`.

    Attributes:
        running: Whether the inference thread works on this request now.
        first_began: Start of the first run; None: no run has begun.
        ended: End of the last run.
        seconds: Total duration of the runs, in seconds.
        last_step: Time of the last step, or of the start if no step was made.
    """

    def __init__(self) -> None:
        self.running = False
        self.first_began: float | None = None
        self.ended = 0.0
        self.seconds = 0.0
        self.last_step = time.monotonic()
        self._lock = threading.Lock()  # costs 0.1 microseconds per step
        self._began = 0.0
        self._step, self._of = 0, 0
        self._taken_step = 0
        self._texts: list[str] = []
        self._preview: bytes | None = None
        self._void: Update | None = None  # the update of step 0 that a new run needs

    # -- in the inference thread ------------------------------------------------------------------

    def begin(self) -> None:
        """Record the start of a run. A further run starts at step 0 again."""
        with self._lock:
            if self._taken_step:
                self._void = Update(step=0, of=max(self._of, 1))
            self._step, self._taken_step = 0, 0
            self._texts.clear()
            self._preview = None
            self._began = self.last_step = time.monotonic()
            if self.first_began is None:
                self.first_began = self._began
            self.running = True

    def end(self) -> None:
        """Record the end of the run."""
        with self._lock:
            self.running = False
            self.ended = time.monotonic()
            self.seconds += self.ended - self._began

    def step(self, done: int, of: int) -> None:
        """Record a step. Some schedulers make more steps than requested."""
        with self._lock:
            self._step, self._of = done, of
            self.last_step = time.monotonic()

    def text(self, added: str) -> None:
        """Record new text."""
        with self._lock:
            self._texts.append(added)

    def preview(self, jpeg: bytes) -> None:
        """Record a preview; only the latest one is published."""
        with self._lock:
            self._preview = jpeg

    # -- in the event loop ------------------------------------------------------------------------

    def take(self) -> list[Update]:
        """Return the updates since the last call, oldest first."""
        with self._lock:
            updates = [] if self._void is None else [self._void]
            self._void = None
            if self._step != self._taken_step or self._texts:
                updates.append(self._update())
            return updates

    def _update(self) -> Update:
        step = self._taken_step = self._step
        update = Update(
            step=step,
            of=max(self._of, step, 1),
            seconds_per_step=(self.last_step - self._began) / step if step else None,
            text="".join(self._texts),
            preview=self._preview,
        )
        self._texts.clear()
        self._preview = None
        return update


class StallDetector:
    """Measures how long a run has made no step.

    Args:
        members: The progress of all requests of the run: one may end before the others.
        max_interval: Maximum number of seconds that count between two calls. While a process is
            frozen (a paused container, a suspended machine), its clock continues but its inference
            thread cannot run.
    """

    def __init__(self, members: Sequence[Progress], *, max_interval: float) -> None:
        self._members = members
        self._max_interval = max_interval
        self._step = self._checked = self._last_step()
        self._seconds = 0.0

    def seconds_without_step(self, now: float) -> float:
        """Return the seconds since the last step; `now` is in seconds of `time.monotonic`."""
        passed, self._checked = now - self._checked, now
        if (last := self._last_step()) != self._step:
            self._step = last
            self._seconds = 0.0
        else:
            self._seconds += min(passed, self._max_interval)
        return self._seconds

    def _last_step(self) -> float:
        return max(progress.last_step for progress in self._members)
