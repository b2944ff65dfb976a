"""Which delivery a request id belongs to.

A sender can publish an id twice, and every sender that knows an id can publish other bytes under
it. The id belongs to the delivery that came first, until the id has its terminal event. Only that
delivery may store the event. Every other one is a copy: it is answered with the stored event, or
with a failure that is not stored.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from consumer.admission import Admission, Job
from consumer.ports.bus import Events, Message, Queue, Workers
from consumer.verdict import EarlierCopyInProgress, IdConflict, ResultExists
from generation_contracts import InvalidRequest, request_digest
from generation_contracts.requests import digest_of_bytes


class RequestIds:
    """The request ids of the jobs of one worker.

    Args:
        admission: How deliveries are read.
        events: Where results are found.
        queue: The requests in their stream.
        workers: All workers.
    """

    def __init__(
        self, *, admission: Admission, events: Events, queue: Queue, workers: Workers
    ) -> None:
        self._admission = admission
        self._task = admission.task
        self._events = events
        self._queue = queue
        self._workers = workers
        self._owners: dict[str, Job] = {}

    async def acquire(self, job: Job) -> None:
        """Return once the job's request id belongs to its delivery.

        A copy of a request that this worker has waits for the end of that request, and does not
        keep the device from others meanwhile.

        Raises:
            ResultExists: The request has ended.
            IdConflict: The id belongs to a request with another content.
            EarlierCopyInProgress: The id belongs to a copy that this worker does not have.
            Stopped: The job was asked to stop while it waited.
        """
        while (owner := self._owners.setdefault(job.request_id, job)) is not job:
            job.is_copy = True
            job.place.step_aside()
            await job.interrupt.during(owner.decided.wait())
            if not owner.is_copy and owner.digest != job.digest:
                raise IdConflict
            await job.interrupt.during(owner.over.wait())
        job.is_copy = False
        job.place.rejoin()
        try:
            await self._look_outside(job)
        finally:
            job.decided.set()

    async def belongs_to_another(self, job: Job) -> bool:
        """Whether a job that has failed before its run must leave its id to another delivery."""
        if not job.is_copy and self._owners.setdefault(job.request_id, job) is job:
            older, owner = await _all(
                self._queue.older(self._task, job.request_id, job.delivery),
                self._queue.owner(self._task, job.request_id),
            )
            if owner is None:
                return older is not None
            # The request that the id is marked for is itself only after a retry.
            is_it = owner == job.digest and job.delivery.attempt > job.delivery.deliveries
            return not is_it or (older is not None and self._digest(older) == owner)
        return True

    async def in_progress(self, delivery: Message, request_id: str) -> bool:
        """Whether the id of a request that is delivered no more is in progress all the same."""
        return (
            request_id in self._owners
            or await self._queue.older(self._task, request_id, delivery) is not None
            or await self._workers.is_in_progress(request_id)
        )

    def release(self, job: Job) -> None:
        """Free the id of a job that has ended."""
        if self._owners.get(job.request_id) is job:
            del self._owners[job.request_id]
        job.decided.set()

    async def _look_outside(self, job: Job) -> None:
        """Ask the streams whether the id has ended, or belongs to another message."""
        job.existing, older, owner = await _all(
            self._events.find_result(self._task, job.request_id),
            self._queue.older(self._task, job.request_id, job.delivery),
            self._queue.owner(self._task, job.request_id),
        )
        if job.existing is not None:
            raise ResultExists if job.existing.request_digest == job.digest else IdConflict
        before = None if older is None else self._digest(older)
        # Without a mark the id belongs to the oldest message.
        if (owner or before or job.digest) != job.digest:
            job.is_copy = True
            raise IdConflict
        if before == job.digest:
            job.is_copy = True
            raise EarlierCopyInProgress

    def _digest(self, delivery: Message) -> str:
        try:
            return request_digest(self._admission.request(delivery))
        except InvalidRequest:
            return digest_of_bytes(delivery.body)


async def _all(*questions: Awaitable[Any]) -> list[Any]:
    """Ask several questions at the same time; raise what the first one of them raises."""
    # Not the plain gather: where the bus is lost all of them raise, and it would leave the others.
    answers = await asyncio.gather(*questions, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
