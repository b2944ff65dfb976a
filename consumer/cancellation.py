"""Cancelling a request wherever it is: in the queue, in a worker, or at its end.

The canceller asks all workers first. Each worker remembers the id, so a worker that receives the
request from then on does not run it; a worker that has it stops, and stores the terminal event when
the device is free. Then the canceller looks into the streams. It ends a request only if no worker
has ever received it: it stores the terminal event as a worker would, and deletes the message. It
marks any other request as cancelled, because a worker that does not answer may still run it. That
worker finds the question when it answers again; if it has died, its successor finds the mark.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import structlog

from consumer import job as outcomes
from consumer.admission import Admission
from consumer.conclusion import Conclusion
from consumer.job import decide
from consumer.ports.bus import Events, IdLookup, Queue, QueuedRequest, ResultEvent, StopAck, Workers
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    ChainLink,
    InvalidRequest,
    SucceededEvent,
    Task,
    request_digest,
)
from generation_contracts.chains import id_of, possible_links
from generation_contracts.headers import event_type

log = structlog.get_logger()

ENDS_WITHIN = 5.0  # seconds to wait for the event of a worker that is storing it
LOOK_EVERY = 0.05  # seconds

# At the same time, whatever the number of cancellations. Waiting for a worker's answer takes none
# of these places.
LOOKUPS = 64  # questions without bodies
LOADS = 4  # requests in memory, of up to a megabyte each
CHAINS = 2  # chains that are followed; each may have 64 branches


@dataclass(frozen=True)
class Ending:
    """How the requests of one task are read and ended."""

    admission: Admission
    conclusion: Conclusion


@dataclass
class _Stopped:
    """What has become of everything that is stored under one id.

    Attributes:
        ended: The terminal events, by task.
        in_flight: Tasks whose workers have received the request; it is marked as cancelled there.
    """

    ended: dict[Task, ResultEvent] = field(default_factory=dict)
    in_flight: set[Task] = field(default_factory=set)


class Cancellation:
    """Cancels requests by their ids, of every task of the installation.

    Args:
        queue: The requests in their streams.
        workers: All workers, this process's own among them.
        events: Where results are found.
        endings: For each task.
    """

    def __init__(
        self, *, queue: Queue, workers: Workers, events: Events, endings: Mapping[Task, Ending]
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._events = events
        self._endings = endings
        self._under_way: dict[str, asyncio.Task[CancelReply]] = {}
        self._lookups = _Places(LOOKUPS)
        self._loads = asyncio.Semaphore(LOADS)
        self._chains = asyncio.Semaphore(CHAINS)

    async def cancel(self, request_id: str) -> CancelReply:
        """Cancel the request with this id, or the chain that begins with it.

        Raises:
            Unavailable: The bus cannot be used.
        """
        under_way = self._under_way.get(request_id)
        if under_way is None:
            under_way = asyncio.create_task(self._cancel(request_id), name="cancellation")
            self._under_way[request_id] = under_way
            under_way.add_done_callback(lambda _: self._under_way.pop(request_id))
        return await asyncio.shield(under_way)

    async def _cancel(self, request_id: str) -> CancelReply:
        async with self._lookups:
            # First: a worker that receives the request after the lookup knows that it is cancelled.
            answer = await self._workers.request_stop(request_id)
            found = await self._queue.find(request_id)
        stopped = await self._stop_stored(request_id, found)
        stops = await self._heed_workers(request_id, answer, stopped)
        unfinished = [e for e in stopped.ended.values() if _leads_on(e, request_id, step=1)]
        if unfinished:
            return await self._cancel_chain(request_id, unfinished[0], in_flight=stops)
        return _reply(request_id, stopped.ended.values(), in_flight=stops)

    async def _heed_workers(
        self, request_id: str, answer: "asyncio.Future[StopAck | None]", stopped: _Stopped
    ) -> bool:
        """Wait for a worker's answer where one is needed; whether the request stops later."""
        if stopped.ended and not stopped.in_flight and not answer.done():
            return False  # no worker has it any more
        match await answer:
            case StopAck.STOPPING:
                log.info("cancellation", request_id=request_id, found="running")
                return True
            case StopAck.ENDING:
                stopped.ended |= await self._about_to_end(request_id)
                # Without an event the attempt has failed. It will be repeated, but by no worker
                # that has been asked: all of them remember the id.
                return not stopped.ended
            case None:
                stopped.ended |= await self._ended(request_id)
                if not stopped.ended and not stopped.in_flight:
                    await self._stop_retries(request_id, stopped)
                return bool(stopped.in_flight - stopped.ended.keys())

    async def _stop_retries(self, request_id: str, stopped: _Stopped) -> None:
        """Mark a request that waits for its next attempt: it is in no request stream."""
        async with self._lookups:
            for task in self._endings:
                if await self._queue.owner(task, request_id) is not None:
                    await self._queue.cancel_retry(task, request_id)
                    stopped.in_flight.add(task)

    async def _stop_stored(self, request_id: str, found: IdLookup) -> _Stopped:
        """End or mark what is in the streams under one id; read what has ended."""
        stopped = _Stopped()
        for task in found.requests:
            async with self._loads:
                await self._stop_oldest(task, request_id, stopped)
        for task in found.results - found.requests:
            await self._note_end(task, request_id, stopped)
        return stopped

    async def _stop_oldest(self, task: Task, request_id: str, stopped: _Stopped) -> None:
        # Copies behind the oldest message find its terminal event when they are delivered.
        oldest = await self._queue.oldest(task, request_id)
        if oldest is not None and not oldest.untouched:
            await oldest.delivery.mark_cancelled()
            stopped.in_flight.add(task)
            return
        if oldest is not None:
            await self._end(task, request_id, oldest.delivery)
            await self._workers.notify_stop(request_id)  # one may have started it meanwhile
        await self._note_end(task, request_id, stopped)

    async def _note_end(self, task: Task, request_id: str, stopped: _Stopped) -> None:
        result = await self._events.find_result(task, request_id)
        if result is not None:
            stopped.ended[task] = result

    async def _end(self, task: Task, request_id: str, delivery: QueuedRequest) -> None:
        ending = self._endings[task]
        job = ending.admission.open(delivery)
        try:
            job.request = ending.admission.request(delivery)
            job.digest = request_digest(job.request)
        except InvalidRequest:
            log.info("cancelled_request_is_invalid", request_id=request_id)
        log.info("cancellation", request_id=request_id, found="waiting")
        await ending.conclusion.conclude(
            job, decide(outcomes.Cancelled(), attempt=1, max_attempts=1)
        )

    async def _cancel_chain(
        self, chain: str, first: ResultEvent, *, in_flight: bool
    ) -> CancelReply:
        """Cancel the steps that wait or run, wherever the chain has come to.

        Args:
            chain: Its id.
            first: The event of its first step.
            in_flight: Whether a worker has said that it stops a step.
        """
        ends: list[ResultEvent] = []
        followed = [(ChainLink(id=chain, step=1), first)]
        async with self._chains:
            while followed:
                link, event = followed.pop()
                if not _leads_on(event, chain, step=link.step):
                    ends.append(event)
                    continue
                links = possible_links(link, event)
                steps = await asyncio.gather(*(self._stop_step(id_of(one)) for one in links))
                followed += [
                    (next_link, end)
                    for next_link, step in zip(links, steps, strict=True)
                    for end in step.ended.values()
                ]
                # A step that is not found has not been queued yet. All workers remember the chain.
                in_flight |= any(step.in_flight for step in steps)
                in_flight |= not any(step.ended for step in steps)
        return _reply(chain, ends, in_flight=in_flight)

    async def _stop_step(self, request_id: str) -> _Stopped:
        async with self._lookups:
            found = await self._queue.find(request_id)
        stopped = await self._stop_stored(request_id, found)
        if stopped.in_flight:
            await self._workers.notify_stop(request_id)  # an earlier version knows only this id
            stopped.ended |= await self._ended(request_id)
            stopped.in_flight -= stopped.ended.keys()
        return stopped

    async def _about_to_end(self, request_id: str) -> dict[Task, ResultEvent]:
        patience = time.monotonic() + ENDS_WITHIN
        while not (ended := await self._ended(request_id)):
            if time.monotonic() > patience:
                break
            await asyncio.sleep(LOOK_EVERY)  # the event comes from another process
        return ended

    async def _ended(self, request_id: str) -> dict[Task, ResultEvent]:
        stopped = _Stopped()
        async with self._lookups:
            for task in await self._queue.find_results(request_id):
                await self._note_end(task, request_id, stopped)
        return stopped.ended


class _Places:
    """A semaphore that serves the newest and the oldest waiter in turn.

    In a storm of cancellations a new one does not wait for all that came before, and none waits for
    ever.
    """

    def __init__(self, places: int) -> None:
        self._free = places
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
            if not waiter.cancelled():  # the place was given in the same moment
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        while self._waiting:
            waiter = self._waiting.pop() if self._newest_next else self._waiting.popleft()
            if not waiter.done():
                self._newest_next = not self._newest_next
                waiter.set_result(None)
                return
        self._free += 1


def _leads_on(event: ResultEvent, chain: str, *, step: int) -> TypeGuard[SucceededEvent]:
    """Whether a chain has a step after this event."""
    return (
        isinstance(event, SucceededEvent)
        and event.chain is not None
        and (event.chain.id, event.chain.step) == (chain, step)
        and event.chain.step < event.chain.of
    )


def _reply(request_id: str, ended: Iterable[ResultEvent], *, in_flight: bool) -> CancelReply:
    # One id may stand for a request of either task: what could be cancelled comes first.
    first = min(ended, key=lambda event: not isinstance(event, CancelledEvent), default=None)
    if first is None or in_flight:
        return CancelReply(request_id=request_id, status="stopping" if in_flight else "unknown")
    status = "cancelled" if isinstance(first, CancelledEvent) else "finished"
    return CancelReply(request_id=request_id, status=status, result=event_type(first))
