"""How far a run has come: written by the inference thread, read by the event loop."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """What is new since the update before it.

    Attributes:
        step: Steps done, or tokens written.
        of: Steps in all, as far as the run knows; at least 1.
        seconds_per_step: Mean of this run so far; None before the first step.
        text: What has been added to the text.
        preview: A small JPEG file of how the image looks; None: nothing new.
    """

    step: int
    of: int
    seconds_per_step: float | None = None
    text: str = ""
    preview: bytes | None = None


class Progress:
    """The progress of one request: a `consumer.ports.model.RunProgress`.

    A request can be run again (with less memory, or alone after its batch failed). Readers then get
    an update of step 0, which says that what they have of the run before is void.

    Attributes:
        running: Whether the inference thread works on this request now.
        first_began: When its first run began, in seconds of `time.monotonic`; None: it has not.
        ended: When its last run ended.
        seconds: Duration of all of its runs together.
        last_step: When the run under way began or made its last step.
    """

    def __init__(self) -> None:
        self.running = False
        self.first_began: float | None = None
        self.ended = 0.0
        self.seconds = 0.0
        self.last_step = time.monotonic()
        self._lock = threading.Lock()  # 0.1 microseconds for each step
        self._began = 0.0
        self._step, self._of = 0, 0
        self._taken_step = 0
        self._texts: list[str] = []
        self._preview: bytes | None = None
        self._void: Update | None = None  # says that what was taken belongs to a run before

    # -- in the inference thread ------------------------------------------------------------------

    def begin(self) -> None:
        """Note that a run begins now; one after another one starts at step 0."""
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
        """Note that the run has ended."""
        with self._lock:
            self.running = False
            self.ended = time.monotonic()
            self.seconds += self.ended - self._began

    def step(self, done: int, of: int) -> None:
        """Note a step. Some schedulers make more steps than they were asked for."""
        with self._lock:
            self._step, self._of = done, of
            self.last_step = time.monotonic()

    def text(self, added: str) -> None:
        """Note what has been added to a text."""
        with self._lock:
            self._texts.append(added)

    def preview(self, jpeg: bytes) -> None:
        """Note how the image looks; the latest one counts."""
        with self._lock:
            self._preview = jpeg

    # -- in the event loop ------------------------------------------------------------------------

    def take(self) -> list[Update]:
        """Return what is new since the last call, oldest first; empty when nothing is."""
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
    """How long a run has made no step, as far as this process could see it.

    Args:
        members: The progress of all requests of the run: one may end before the others.
        longest_look: Seconds that count between two looks at most. A process that was frozen (a
            paused container, a suspended machine) finds the time gone, and its inference thread
            has not had it.
    """

    def __init__(self, members: Sequence[Progress], *, longest_look: float) -> None:
        self._members = members
        self._longest_look = longest_look
        self._step = self._looked = self._last_step()
        self._seconds = 0.0

    def seconds_without_step(self, now: float) -> float:
        """Look at `now`, in seconds of `time.monotonic`."""
        passed, self._looked = now - self._looked, now
        if (last := self._last_step()) != self._step:
            self._step = last
            self._seconds = 0.0
        else:
            self._seconds += min(passed, self._longest_look)
        return self._seconds

    def _last_step(self) -> float:
        return max(progress.last_step for progress in self._members)
