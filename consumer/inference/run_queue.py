"""The queue between the event loop and the inference thread.

The event loop puts a ticket for each delivery, in the order of the deliveries, and marks it as
ready once its inputs are loaded. The inference thread takes the ticket at the head as soon as a run
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
    """One request in the queue, created by `RunQueue.put`.

    Attributes:
        progress: Progress of the run.
        run: Argument of the runner, from `mark_ready` to the end of the run. Once the inference
            thread has taken the ticket, only that thread changes this attribute.
        key: Equal for requests that can run in one batch; None: the request runs alone.
        ready_since: Seconds of `time.monotonic`; None: the ticket is not ready.
        context: The context variables of the caller of `RunQueue.mark_ready`.
        batch: The progress of all requests of the batch, once the run has begun.
        began: Done once the run has begun.
        ended: Done once `take` can be called.
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
        """Resolve `began`."""
        if not self.began.done():
            self.began.set_result(None)

    def finish(self, result: RunnerOutput | BaseException) -> None:
        """Store the output or the exception of the run for `take`, and resolve `ended`."""
        if not self._is_abandoned:
            self._result = result
        if not self.ended.done():
            self.ended.set_result(None)

    def take(self) -> RunnerOutput:
        """Return the output, once. The ticket does not refer to it any more.

        Raises:
            BaseException: The exception of the run.
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
            del result  # the traceback of the exception refers to this frame

    def abandon(self) -> None:
        """Discard the output of the run, now or later: no caller waits for it."""
        self._is_abandoned = True
        self._result = None


class RunQueue:
    """Tickets in the order of their deliveries.

    The inference thread calls `next_batch`; the event loop calls everything else.

    Args:
        max_batch: Maximum number of requests in one run.
        window: Seconds that a ready request waits for others with the same key, unless the batch is
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
        """Whether the queue is closed: `next_batch` returns no more tickets."""
        return self._closed

    def put(self) -> Ticket:
        """Append a ticket. Later tickets wait until it is ready or removed."""
        ticket = Ticket()
        with self._changed:
            self._tickets.append(ticket)
        return ticket

    def mark_ready(self, ticket: Ticket, run: RunRequest, key: Hashable | None = None) -> None:
        """Allow the inference thread to take a ticket.

        Args:
            ticket: A ticket of `put`.
            run: Argument of the runner.
            key: Equal for requests that can run in one batch; None: the request runs alone.
        """
        with self._changed:
            ticket.run, ticket.key = run, key
            ticket.context = contextvars.copy_context()
            ticket.ready_since = time.monotonic()
            self._changed.notify()

    def remove(self, ticket: Ticket) -> bool:
        """Remove a ticket; False: the inference thread has taken it, or it was removed before."""
        with self._changed:
            if ticket not in self._tickets:
                return False
            self._tickets.remove(ticket)
            ticket.run = None
            self._changed.notify()
            return True

    def close(self) -> None:
        """Close the queue: `next_batch` returns no more tickets."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def next_batch(self, *, wait: bool = True) -> list[Ticket]:
        """Take the ticket at the head, and the tickets directly behind it with the same key.

        Args:
            wait: Wait until the head is ready and its window is over.

        Returns:
            The tickets in the order of the queue. Empty: the queue is closed, or `wait` is False
            and no batch is complete.
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
        """Return the seconds to wait for another ticket of the batch."""
        if not batch or batch[0].key is None or len(batch) == self.max_batch:
            return 0.0
        behind = self._tickets[len(batch)] if len(batch) < len(self._tickets) else None
        if behind is not None and behind.ready_since is not None:  # it has another key
            return 0.0
        return (batch[0].ready_since or 0.0) + self._window - time.monotonic()
