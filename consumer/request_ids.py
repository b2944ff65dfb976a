"""Which delivery a request id belongs to.

A sender can publish an id twice, and whoever knows an id can publish other bytes under it. The id
belongs to the delivery that came first, until the id has its terminal event. Only that delivery may
store the event. Every other one is a copy: it is answered with the stored event, or with a failure
that is not stored.
"""

import asyncio
from typing import Any

from consumer.admission import Admission, Job
from consumer.ports import Delivery, Events, Queue, Workers
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
        """Whether a job that has failed before its run must leave its id to another delivery.

        Raises:
            EarlierCopyInProgress: Perhaps: a request with the id waits for its next attempt.
        """
        if job.is_copy or self._owners.setdefault(job.request_id, job) is not job:
            return True
        if await self._is_older(job.delivery, job.request_id):
            return True
        if await self._queue.waiting_for_retry(self._task, job.request_id) is not None:
            # It may be this very request, on its way back into the queue.
            raise EarlierCopyInProgress
        return False

    async def in_progress(self, delivery: Delivery, request_id: str) -> bool:
        """Whether the id of a request that is delivered no more is in progress all the same."""
        return (
            request_id in self._owners
            or await self._is_older(delivery, request_id)
            or await self._workers.holds(request_id)
        )

    def release(self, job: Job) -> None:
        """Free the id of a job that has ended."""
        if self._owners.get(job.request_id) is job:
            del self._owners[job.request_id]
        job.decided.set()

    async def _look_outside(self, job: Job) -> None:
        """Ask the streams whether the id has ended, or belongs to another message."""
        sequence = job.delivery.stream_sequence
        answers = await asyncio.gather(
            self._events.find_result(self._task, job.request_id),
            self._queue.older(self._task, job.request_id, sequence),
            self._queue.waiting_for_retry(self._task, job.request_id),
            return_exceptions=True,  # where one raises, the others do: the bus is lost
        )
        job.existing, older, retry = map(_given, answers)
        if job.existing is not None:
            raise ResultExists if job.existing.request_digest == job.digest else IdConflict
        for other in (older, retry):
            if other is not None and self._digest(other) != job.digest:
                job.is_copy = True
                raise IdConflict
        # A copy that waits for its retry may be this very request, on its way back into the queue.
        if older is not None:
            job.is_copy = True
            raise EarlierCopyInProgress

    async def _is_older(self, delivery: Delivery, request_id: str) -> bool:
        sequence = delivery.stream_sequence
        return await self._queue.older(self._task, request_id, sequence) is not None

    def _digest(self, delivery: Delivery) -> str:
        try:
            return request_digest(self._admission.request(delivery))
        except InvalidRequest:
            return digest_of_bytes(delivery.body)


def _given(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer
