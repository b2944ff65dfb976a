"""The end of a job: its terminal event, the dead letter, and the only place that settles."""

from datetime import UTC, datetime
from typing import Any

import structlog

from consumer.admission import Job
from consumer.job import Decision, Publish, ResultTooLarge, Settlement, State, decide
from consumer.ports import DeadLetter, Events, MessageTooLarge, ModelDescription, ResultEvent
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    SucceededEvent,
    Task,
    Timings,
)

log = structlog.get_logger()


class Conclusion:
    """Carries decisions out: publish, reply, put aside, settle, in this order.

    The order is what makes a crash between any two of them harmless: the result has a fence of its
    own, the reply is a courtesy, the dead letter is deduplicated, and the settlement comes last.
    """

    def __init__(
        self, *, task: Task, worker: str, model: ModelDescription, events: Events, max_attempts: int
    ) -> None:
        self._task = task
        self._worker = worker
        self._model = model
        self._events = events
        self._max_attempts = max_attempts

    async def conclude(self, job: Job, decision: Decision) -> Decision:
        """Carry a decision out.

        Returns:
            The decision that was carried out in the end: another one than asked for when the
            result turned out too large for the bus.
        """
        job.advance(State.CONCLUDING)
        try:
            await self._announce(job, decision)
        except MessageTooLarge:
            log.warning("result_too_large")
            decision = decide(
                ResultTooLarge(), attempt=job.delivery.attempt, max_attempts=self._max_attempts
            )
            await self._announce(job, decision)
        if decision.dead_letter:
            await self._put_aside(job, decision)
        await self._settle(job, decision)
        return decision

    def event_fields(self, job: Job) -> dict[str, Any]:
        """What every event of a job carries; counts the sequence on."""
        sequence, job.sequence = job.sequence, job.sequence + 1
        return {
            "request_id": job.request_id,
            "task": self._task,
            "sequence": sequence,
            "time": datetime.now(UTC),
            "worker": self._worker,
            "attempt": job.delivery.attempt,
            "metadata": {} if job.request is None else job.request.metadata,
        }

    async def _announce(self, job: Job, decision: Decision) -> None:
        match decision.publish:
            case Publish.NONE:
                return
            case Publish.STORED_AGAIN:
                await self._reply(job, job.existing)
            case Publish.FAILED_REPLY_ONLY:
                await self._reply(job, self._event(job, decision))
            case Publish.SUCCEEDED | Publish.FAILED | Publish.CANCELLED:
                event = self._event(job, decision)
                trace_parent = job.envelope.trace_parent
                stored = await self._events.publish_result(event, trace_parent=trace_parent)
                if not stored:  # another worker with the same delivery was quicker
                    log.warning("result_stored_before")
                    found = await self._events.find_result(self._task, job.request_id)
                    event = event if found is None else found
                await self._reply(job, event)

    async def _reply(self, job: Job, event: ResultEvent | None) -> None:
        if job.envelope.reply_to is not None and event is not None:
            await self._events.reply(
                job.envelope.reply_to, event, trace_parent=job.envelope.trace_parent
            )

    def _event(self, job: Job, decision: Decision) -> ResultEvent:
        fields = {**self.event_fields(job), "request_digest": job.digest}
        if decision.publish is Publish.SUCCEEDED:
            return SucceededEvent(
                **fields,
                outputs=job.outputs,
                model=self._model.info,
                timings=Timings(
                    queued=job.queued,
                    inference=job.inference,
                    encode=job.encode,
                    upload=job.upload,
                ),
                warnings=job.warnings,
            )
        if decision.publish is Publish.CANCELLED:
            return CancelledEvent(**fields)
        if decision.failure is None:
            raise AssertionError("a failed event without a failure")
        return FailedEvent(**fields, failure=decision.failure)

    async def _put_aside(self, job: Job, decision: Decision) -> None:
        if decision.failure is None:
            raise AssertionError("a dead letter without a failure")
        letter = DeadLetter(
            code=decision.failure.code,
            reason=decision.failure.message,
            request_id=job.request_id,
            worker=self._worker,
        )
        await self._events.dead_letter(self._task, job.delivery, letter)

    async def _settle(self, job: Job, decision: Decision) -> None:
        match decision.settlement:
            case Settlement.ACK:
                await job.delivery.ack()
            case Settlement.NAK:
                await job.delivery.nak()
            case Settlement.TERM:
                code = "" if decision.failure is None else decision.failure.code
                await job.delivery.term(code)
            case Settlement.ABANDON:
                job.advance(State.ABANDONED)
                return
            case Settlement.KEEP:
                raise AssertionError("a job that is kept has not come to its end")
        job.advance(State.SETTLED)
