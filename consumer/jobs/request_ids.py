"""Ownership of request ids by deliveries.

A sender can publish an id twice, and every sender that knows an id can publish other bytes under
it. The first delivery owns the id until the id has its terminal event. Only the owner may store the
event. Every other delivery is a copy: the worker replies to a copy with the stored event, or with a
failure that it does not store.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from consumer.jobs.admission import Admission, Job
from consumer.jobs.outcomes import EarlierCopyInProgress, IdConflict, ResultExists
from consumer.ports.bus import Events, Message, Queue, Workers
from generation_contracts import InvalidRequest, request_digest
from generation_contracts.requests import digest_of_bytes


class RequestIds:
    """The request ids of the jobs of one worker.

    Args:
        admission: Reads deliveries.
        events: Finds stored results.
        queue: The stored requests.
        workers: All workers of the installation.
    """

    def __init__(
        self, *, admission: Admission, events: Events, queue: Queue, workers: Workers
    ) -> None:
        self._admission = admission
        self._queue_name = admission.queue_name
        self._events = events
        self._queue = queue
        self._workers = workers
        self._owners: dict[str, Job] = {}

    async def acquire(self, job: Job) -> None:
        """Return once the job owns its request id.

        A copy of a request that is in progress in this worker waits until that request has ended.
        It does not occupy the device meanwhile.

        Raises:
            ResultExists: The id has a terminal event of this request.
            IdConflict: The id belongs to a request with another content.
            EarlierCopyInProgress: An earlier copy in the stream owns the id.
            Stopped: The job was asked to stop while it waited.
        """
        while (owner := self._owners.setdefault(job.request_id, job)) is not job:
            job.is_copy = True
            job.slot.step_aside()
            await job.cancel_token.race(owner.ownership_known.wait())
            if not owner.is_copy and owner.digest != job.digest:
                raise IdConflict
            await job.cancel_token.race(owner.ended.wait())
        job.is_copy = False
        job.slot.rejoin()
        try:
            await self._check_streams(job)
        finally:
            job.ownership_known.set()

    async def belongs_to_another(self, job: Job) -> bool:
        """Return whether another delivery owns the id of a job that failed before its run."""
        if job.is_copy or self._owners.setdefault(job.request_id, job) is not job:
            return True
        older, owner = await _gather(
            self._queue.older(self._queue_name, job.request_id, job.delivery),
            self._queue.owner(self._queue_name, job.request_id),
        )
        if owner is None:
            return older is not None
        # A mark is written for a retry, so only a retried delivery can match it.
        is_owner = owner == job.digest and job.delivery.attempt > job.delivery.deliveries
        return not is_owner or (older is not None and self._digest(older) == owner)

    async def in_progress(self, delivery: Message, request_id: str) -> bool:
        """Return whether the request of a max-deliver-exhausted delivery is in progress."""
        return (
            request_id in self._owners
            or await self._queue.older(self._queue_name, request_id, delivery) is not None
            or await self._workers.is_in_progress(request_id)
        )

    def release(self, job: Job) -> None:
        """Release the id of a job that has ended."""
        if self._owners.get(job.request_id) is job:
            del self._owners[job.request_id]
        job.ownership_known.set()

    async def _check_streams(self, job: Job) -> None:
        job.existing, older, owner = await _gather(
            self._events.find_result(self._queue_name, job.request_id),
            self._queue.older(self._queue_name, job.request_id, job.delivery),
            self._queue.owner(self._queue_name, job.request_id),
        )
        if job.existing is not None:
            raise ResultExists if job.existing.request_digest == job.digest else IdConflict
        oldest = None if older is None else self._digest(older)
        # Without a mark the oldest message owns the id.
        if (owner or oldest or job.digest) != job.digest:
            job.is_copy = True
            raise IdConflict
        if oldest == job.digest:
            job.is_copy = True
            raise EarlierCopyInProgress

    def _digest(self, delivery: Message) -> str:
        try:
            return request_digest(self._admission.request(delivery))
        except InvalidRequest:
            return digest_of_bytes(delivery.body)


async def _gather(*calls: Awaitable[Any]) -> list[Any]:
    """Await several calls at the same time; raise the first exception once all have ended."""
    # A plain gather leaves the other calls running when the first one raises.
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
