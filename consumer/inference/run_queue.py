"""The queue between the event loop and the inference thread.

The event loop puts a ticket for each delivery, in the order of the deliveries, and marks it as
ready once its inputs are there. The inference thread takes the ticket at the head as soon as a run
ends. The event loop is not involved, so encoding and uploading the previous result never delay the
device.
"""

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence

from consumer.inference.progress import Progress
from consumer.ports.model import RunnerOutput, RunRequest


class Ticket:
    """One request in the queue; `RunQueue.put` makes it.

    Attributes:
        progress: How far its run has come.
        run: What the runner gets, from `mark_ready` to the end of the run. Once the inference
            thread has taken the ticket, only that thread changes it.
        key: Equal for requests that can run in one batch; None: this one runs alone.
        ready_since: Seconds of `time.monotonic`; None: it is not ready.
        context: The context variables of the caller of `RunQueue.mark_ready`.
        batch: The progress of all requests of its run, once that has begun.
        began: Done once its run has begun.
        ended: Done once `take` gives what came of the run.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.run: RunRequest | None = None
        self.key: Hashable | None = None
        self.ready_since: float | None = None
        self.context = contextvars.Context()
        self.batch: Sequence[Progress] = (self.progress,)
        loop = asyncio.get_running_loop()
        self.began: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._result: RunnerOutput | BaseException | None = None
        self._is_abandoned = False

    def begin(self) -> None:
        """Let the waiter of `began` go on."""
        if not self.began.done():
            self.began.set_result(None)

    def finish(self, result: RunnerOutput | BaseException) -> None:
        """Keep what came of the run for `take`, and let the waiter of `ended` go on."""
        if not self._is_abandoned:
            self._result = result
        if not self.ended.done():
            self.ended.set_result(None)

    def take(self) -> RunnerOutput:
        """Return the output once; the ticket keeps nothing of it.

        Raises:
            BaseException: What the run raised.
            AssertionError: The run has not ended, or its output was taken before.
        """
        result, self._result = self._result, None
        try:
            if isinstance(result, BaseException):
                raise result
            if result is None:
                raise AssertionError("there is no output to take")
            return result
        finally:
            del result  # the traceback of what is raised refers to this frame

    def abandon(self) -> None:
        """Drop what came or will come of the run: its waiter is gone."""
        self._is_abandoned = True
        self._result = None


class RunQueue:
    """Tickets in the order of their deliveries.

    `next_batch` is for the inference thread, everything else for the event loop.

    Args:
        max_batch: Requests in one run at most.
        window: Seconds that a ready request waits for others with its key, while the batch is not
            full.
    """

    def __init__(self, *, max_batch: int = 1, window: float = 0.0) -> None:
        self.max_batch = max_batch
        self._window = window
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the inference thread takes no more."""
        return self._closed

    def put(self) -> Ticket:
        """Add a ticket behind all others. Those behind it wait until it is ready or removed."""
        ticket = Ticket()
        with self._changed:
            self._tickets.append(ticket)
        return ticket

    def mark_ready(self, ticket: Ticket, run: RunRequest, key: Hashable | None = None) -> None:
        """Let the inference thread take a ticket.

        Args:
            ticket: From `put`.
            run: What the runner gets.
            key: Equal for requests that can run in one batch; None: this one runs alone.
        """
        with self._changed:
            ticket.run, ticket.key = run, key
            ticket.context = contextvars.copy_context()
            ticket.ready_since = time.monotonic()
            self._changed.notify()

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out; False: it is not in the queue, the inference thread has it."""
        with self._changed:
            if ticket not in self._tickets:
                return False
            self._tickets.remove(ticket)
            ticket.run = None
            self._changed.notify()
            return True

    def close(self) -> None:
        """Give nothing to the inference thread any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def next_batch(self, *, wait: bool = True) -> list[Ticket]:
        """Take the ticket at the head, and those right behind it that fit into its batch.

        Args:
            wait: Wait until the head is ready and its window is over.

        Returns:
            The tickets in their order. Empty: the queue is closed, or nothing is ready without
            waiting.
        """
        with self._changed:
            while not self._closed:
                batch = self._batch_at_head()
                left = self._window_left(batch)
                if batch and left <= 0:
                    for _ in batch:
                        self._tickets.popleft()
                    return batch
                if not wait:
                    return []
                self._changed.wait(left if batch else None)
            return []

    def _batch_at_head(self) -> list[Ticket]:
        batch: list[Ticket] = []
        for ticket in self._tickets:
            fits = not batch or ticket.key == batch[0].key is not None
            if ticket.ready_since is None or not fits or len(batch) == self.max_batch:
                break
            batch.append(ticket)
        return batch

    def _window_left(self, batch: Sequence[Ticket]) -> float:
        """Seconds that it is worth to wait for one more."""
        if not batch or batch[0].key is None or len(batch) == self.max_batch:
            return 0.0
        behind = self._tickets[len(batch)] if len(batch) < len(self._tickets) else None
        if behind is not None and behind.ready_since is not None:  # it does not fit
            return 0.0
        return (batch[0].ready_since or 0.0) + self._window - time.monotonic()
