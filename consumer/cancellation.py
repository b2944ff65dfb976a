"""Cancelling a request wherever it is: waiting, in a worker's hands, or at its end.

Whoever is asked to cancel looks where the request is. One that no worker has been given is ended
here as a worker would end it: its terminal event is stored behind the same fence, then it is
deleted. A worker that has it is asked to stop, and its own terminal event says when the device is
free. Between the two lies a race, a request that is fetched while it is looked at: then the event
stands already, the worker is told to stop, and its own word on the request is dropped at the fence.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from consumer import job as outcomes
from consumer.admission import Admission
from consumer.conclusion import Conclusion
from consumer.job import decide
from consumer.ports import Events, Grip, Queue, ResultEvent, StoredRequest, Workers
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    InvalidRequest,
    Task,
    request_digest,
)
from generation_contracts.headers import event_type

log = structlog.get_logger()

ENDS_WITHIN = 5.0  # seconds to wait for the event of a worker that is at its end
LOOK_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class Ending:
    """How the requests of one task are read and ended."""

    admission: Admission
    conclusion: Conclusion


class Cancellation:
    """Cancels requests by their ids, of every task of the installation.

    Args:
        queue: The requests in their stream.
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

    async def cancel(self, request_id: str) -> CancelReply:
        """Cancel whatever has this id.

        Raises:
            Unavailable: The bus cannot be used.
        """
        ended = await self._ended(request_id)
        found = [r for r in await self._queue.find(request_id) if r.task not in ended]
        if ended and not found:
            return _reply(request_id, ended)
        if not all(request.untouched for request in found) or not found:
            # A request that is not in the stream under its id may be in a worker's hands all the
            # same: its sender may not have put the id into the subject.
            match await self._workers.ask(request_id):
                case Grip.STOPPING:
                    log.info("cancellation", request_id=request_id, found="running")
                    return CancelReply(request_id=request_id, status="stopping")
                case Grip.ENDING:
                    return _reply(request_id, await self._about_to_end(request_id))
        for request in found:
            await self._end(request)
        if found:
            await self._workers.tell(request_id)  # one may have been given it in the meantime
        return _reply(request_id, await self._ended(request_id))

    async def _end(self, request: StoredRequest) -> None:
        ending, delivery = self._endings[request.task], request.delivery
        job = ending.admission.open(delivery)
        try:
            job.request = ending.admission.request(delivery)
        except InvalidRequest:
            return  # its body may name another id; a worker will say what is wrong with it
        job.digest = request_digest(job.request)
        log.info("cancellation", request_id=job.request_id, found="waiting")
        await ending.conclusion.conclude(
            job, decide(outcomes.Cancelled(), attempt=1, max_attempts=1)
        )

    async def _about_to_end(self, request_id: str) -> dict[Task, ResultEvent]:
        patience = time.monotonic() + ENDS_WITHIN
        while not (ended := await self._ended(request_id)):
            if time.monotonic() > patience:
                break
            await asyncio.sleep(LOOK_EVERY)  # the event comes from another process
        return ended

    async def _ended(self, request_id: str) -> dict[Task, ResultEvent]:
        results = {task: await self._events.find_result(task, request_id) for task in self._endings}
        return {task: result for task, result in results.items() if result is not None}


def _reply(request_id: str, ended: Mapping[Task, ResultEvent]) -> CancelReply:
    if not ended:
        return CancelReply(request_id=request_id, status="unknown")
    # One id may stand for a request of either task: what could be cancelled is said first.
    result = min(ended.values(), key=lambda event: not isinstance(event, CancelledEvent))
    status = "cancelled" if isinstance(result, CancelledEvent) else "finished"
    return CancelReply(request_id=request_id, status=status, result=event_type(result))
