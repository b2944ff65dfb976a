"""Cancels a request that is queued, in progress, or about to end.

The canceller first sends a stop request to all workers. Each worker stores the id, and does not
run the request if it receives it later. A worker that runs the request stops it, and stores the
terminal event when the device is free. Then the canceller reads the streams. If no worker has ever
received the request, the canceller stores the terminal event and deletes the message. Otherwise it
marks the request as cancelled, because a worker that does not reply may still run it. That worker
receives the stop request when it recovers; if it has died, the next worker reads the mark.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeGuard

import structlog

from consumer.jobs.admission import Admission
from consumer.jobs.finalizer import Finalizer
from consumer.jobs.outcomes import Cancelled
from consumer.ports.bus import Events, IdLookup, Queue, QueuedRequest, ResultEvent, StopAck, Workers
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    ChainLink,
    InvalidRequest,
    SucceededEvent,
    request_digest,
)
from generation_contracts.chains import id_of, possible_links
from generation_contracts.headers import event_type

log = structlog.get_logger()

RESULT_TIMEOUT = 5.0  # seconds to wait for the event of a worker that is storing it
POLL_INTERVAL = 0.05  # seconds

# Limits of what all cancellations do at the same time. A cancellation that waits for the reply of
# a worker does not count.
LOOKUPS = 64  # reads without message bodies
LOADS = 4  # requests in memory, of up to a megabyte each
CHAINS = 2  # chains that are followed; each may have 64 branches


@dataclass(frozen=True)
class QueueFinalizer:
    """Reads and finalizes the requests of one queue."""

    admission: Admission
    finalizer: Finalizer


@dataclass
class _StoredState:
    """The state of everything that is stored under one id.

    Attributes:
        ended: The terminal events, by queue.
        in_flight: Queues whose workers have received the request; it is marked as cancelled.
    """

    ended: dict[str, ResultEvent] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)


class Cancellation:
    """Cancels requests by their ids, of every queue of the installation.

    Args:
        queue: The requests in their streams.
        workers: All workers, including this process.
        events: Finds stored results.
        finalizer_of: Returns the finalizer of a queue that `queue` has found.
    """

    def __init__(
        self,
        *,
        queue: Queue,
        workers: Workers,
        events: Events,
        finalizer_of: Callable[[str], QueueFinalizer],
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._events = events
        self._finalizer_of = finalizer_of
        self._in_progress: dict[str, asyncio.Task[CancelReply]] = {}
        self._lookups = _FairSemaphore(LOOKUPS)
        self._loads = asyncio.Semaphore(LOADS)
        self._chains = asyncio.Semaphore(CHAINS)

    async def cancel(self, request_id: str) -> CancelReply:
        """Cancel the request with this id, or the chain that begins with it.

        Raises:
            Unavailable: The bus cannot be used.
        """
        task = self._in_progress.get(request_id)
        if task is None:
            task = asyncio.create_task(self._cancel(request_id), name="cancellation")
            self._in_progress[request_id] = task
            task.add_done_callback(lambda _: self._in_progress.pop(request_id))
        return await asyncio.shield(task)

    async def _cancel(self, request_id: str) -> CancelReply:
        async with self._lookups:
            # Before the lookup: a worker that receives the request after the lookup knows the id.
            reply = await self._workers.request_stop(request_id)
            found = await self._queue.find(request_id)
        stored = await self._stop_stored(request_id, found)
        in_flight = await self._await_workers(request_id, reply, stored)
        unfinished = [e for e in stored.ended.values() if _has_next_step(e, request_id, step=1)]
        if unfinished:
            return await self._cancel_chain(request_id, unfinished[0], in_flight=in_flight)
        return _reply(request_id, stored.ended.values(), in_flight=in_flight)

    async def _await_workers(
        self, request_id: str, reply: "asyncio.Future[StopAck | None]", stored: _StoredState
    ) -> bool:
        """Wait for a worker's reply if it matters; return whether the request is in flight."""
        if stored.ended and not stored.in_flight and not reply.done():
            return False  # no worker has the request
        match await reply:
            case StopAck.STOPPING:
                log.info("cancellation", request_id=request_id, found="running")
                return True
            case StopAck.ENDING:
                stored.ended |= await self._wait_for_results(request_id)
                # Without an event the attempt has failed. The request is delivered again, but
                # every worker that received the stop request has stored the id and does not run it.
                return not stored.ended
            case None:
                stored.ended |= await self._read_results(request_id)
                if not stored.ended and not stored.in_flight:
                    await self._stop_retries(request_id, stored)
                return bool(stored.in_flight - stored.ended.keys())

    async def _stop_retries(self, request_id: str, stored: _StoredState) -> None:
        """Mark a request that waits for its next attempt, outside the request streams."""
        async with self._lookups:
            for queue in await self._queue.names():
                if await self._queue.owner(queue, request_id) is not None:
                    await self._queue.cancel_retry(queue, request_id)
                    stored.in_flight.add(queue)

    async def _stop_stored(self, request_id: str, found: IdLookup) -> _StoredState:
        """Cancel or mark the requests with one id in the streams, and read their results."""
        stored = _StoredState()
        for queue in found.requests:
            async with self._loads:
                await self._stop_oldest(queue, request_id, stored)
        for queue in found.results - found.requests:
            await self._read_result(queue, request_id, stored)
        return stored

    async def _stop_oldest(self, queue: str, request_id: str, stored: _StoredState) -> None:
        # The copies behind the oldest message get its terminal event when they are delivered.
        oldest = await self._queue.oldest(queue, request_id)
        if oldest is not None and not oldest.never_delivered:
            await oldest.delivery.mark_cancelled()
            stored.in_flight.add(queue)
            return
        if oldest is not None:
            await self._cancel_untouched(queue, request_id, oldest.delivery)
            # A worker may have started it after the first message.
            await self._workers.notify_stop(request_id)
        await self._read_result(queue, request_id, stored)

    async def _read_result(self, queue: str, request_id: str, stored: _StoredState) -> None:
        result = await self._events.find_result(queue, request_id)
        if result is not None:
            stored.ended[queue] = result

    async def _cancel_untouched(self, queue: str, request_id: str, delivery: QueuedRequest) -> None:
        of_queue = self._finalizer_of(queue)
        admission = of_queue.admission
        job = admission.open(delivery)
        try:
            job.request = admission.request(delivery)
            job.digest = request_digest(job.request)
        except InvalidRequest:
            log.info("cancelled_request_is_invalid", request_id=request_id)
        log.info("cancellation", request_id=request_id, found="waiting")
        await of_queue.finalizer.finalize(job, Cancelled().decision)

    async def _cancel_chain(
        self, chain: str, first: ResultEvent, *, in_flight: bool
    ) -> CancelReply:
        """Cancel the queued and running steps of a chain.

        Args:
            chain: Id of the chain.
            first: The event of the first step.
            in_flight: Whether a worker has replied that it stops a step.
        """
        ends: list[ResultEvent] = []
        pending = [(ChainLink(id=chain, step=1), first)]
        async with self._chains:
            while pending:
                link, event = pending.pop()
                if not _has_next_step(event, chain, step=link.step):
                    ends.append(event)
                    continue
                links = possible_links(link, event)
                steps = await asyncio.gather(*(self._stop_step(id_of(one)) for one in links))
                pending += [
                    (next_link, end)
                    for next_link, step in zip(links, steps, strict=True)
                    for end in step.ended.values()
                ]
                # A step that is not found is not queued yet. All workers have stored the chain id.
                in_flight |= any(step.in_flight for step in steps)
                in_flight |= not any(step.ended for step in steps)
        return _reply(chain, ends, in_flight=in_flight)

    async def _stop_step(self, request_id: str) -> _StoredState:
        async with self._lookups:
            found = await self._queue.find(request_id)
        stored = await self._stop_stored(request_id, found)
        if stored.in_flight:
            # Workers of earlier versions know only the id of the step, not that of the chain.
            await self._workers.notify_stop(request_id)
            stored.ended |= await self._read_results(request_id)
            stored.in_flight -= stored.ended.keys()
        return stored

    async def _wait_for_results(self, request_id: str) -> dict[str, ResultEvent]:
        deadline = time.monotonic() + RESULT_TIMEOUT
        while not (ended := await self._read_results(request_id)):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_INTERVAL)  # another process stores the event
        return ended

    async def _read_results(self, request_id: str) -> dict[str, ResultEvent]:
        stored = _StoredState()
        async with self._lookups:
            for queue in await self._queue.find_results(request_id):
                await self._read_result(queue, request_id, stored)
        return stored.ended


class _FairSemaphore:
    """A semaphore that serves the newest and the oldest waiter in turn.

    Under heavy load a new cancellation does not wait for all earlier ones, and each one is served
    at some time.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._newest_next = True

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it was served in the meantime
                self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        while self._waiting:
            waiter = self._waiting.pop() if self._newest_next else self._waiting.popleft()
            if not waiter.done():
                self._newest_next = not self._newest_next
                waiter.set_result(None)
                return
        self._free += 1


def _has_next_step(event: ResultEvent, chain: str, *, step: int) -> TypeGuard[SucceededEvent]:
    """Return whether a chain has a step after this event."""
    return (
        isinstance(event, SucceededEvent)
        and event.chain is not None
        and (event.chain.id, event.chain.step) == (chain, step)
        and event.chain.step < event.chain.of
    )


def _reply(request_id: str, ended: Iterable[ResultEvent], *, in_flight: bool) -> CancelReply:
    # One id may name a request of each queue: a cancelled one takes precedence.
    first = min(ended, key=lambda event: not isinstance(event, CancelledEvent), default=None)
    if first is None or in_flight:
        return CancelReply(request_id=request_id, status="stopping" if in_flight else "unknown")
    status = "cancelled" if isinstance(first, CancelledEvent) else "finished"
    return CancelReply(request_id=request_id, status=status, result=event_type(first))
