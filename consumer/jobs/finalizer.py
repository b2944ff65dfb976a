"""The end of a job: dead letter, terminal event, reply, settlement. Only this module settles."""

import time
from datetime import UTC, datetime
from typing import Any

import structlog

from consumer.jobs.admission import Job
from consumer.jobs.chain_continuation import ChainContinuation, next_step_of
from consumer.jobs.outcomes import (
    Decision,
    IdConflict,
    InternalError,
    Publish,
    ResultTooLarge,
    Settlement,
)
from consumer.jobs.states import FINAL, State
from consumer.ports.bus import (
    DeadLetter,
    Events,
    MessageTooLarge,
    Queue,
    QueueFull,
    ResultEvent,
    ResultUnreadable,
)
from consumer.ports.model import ModelDescription
from consumer.ports.store import Artifacts
from consumer.ports.telemetry import Observer
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    StoredArtifact,
    SucceededEvent,
    Task,
    Timings,
)
from generation_contracts.chains import place_of

log = structlog.get_logger()

RETRY_DELAY_MOST = 60.0  # seconds
COPY_DELAY = 5.0  # seconds until a copy checks again whether the earlier request has ended


class Finalizer:
    """Carries decisions out: dead-letter, publish, reply or continue the chain, settle.

    This order makes a crash between any two steps harmless. The dead letter comes first: once the
    result is stored, a redelivery only replies and acknowledges. A second dead letter has the same
    id and is dropped. The results stream takes one event per request. The settlement comes last.
    Then the worker deletes stored outputs that no event mentions.
    """

    def __init__(
        self,
        *,
        task: Task,
        queue: str = "",
        worker: str,
        model: ModelDescription,
        events: Events,
        queues: Queue,
        artifacts: Artifacts,
        retry_delay: float,
        observer: Observer,
    ) -> None:
        self._task = task
        self._queue = queue or str(task)
        self._worker = worker
        self._model = model
        self._events = events
        self._artifacts = artifacts
        self._retry_delay = retry_delay
        self._chain = ChainContinuation(
            worker=worker, events=events, queues=queues, reply=self._reply, observer=observer
        )

    async def finalize(self, job: Job, decision: Decision) -> Decision:
        """Carry a decision out.

        Returns:
            The decision that was carried out. It differs from the argument when the result is too
            large for the bus.
        """
        job.advance(State.FINALIZING)
        if decision.dead_letter:
            await self._dead_letter(job, decision)
        started = time.monotonic()
        try:
            stored = await self._publish_terminal(job, decision)
        except MessageTooLarge:
            log.warning("result_too_large")
            decision = ResultTooLarge().decision
            stored = await self._publish_minimal_failure(job, decision)
        job.spent("publish", time.monotonic() - started)
        await self._settle(job, decision)
        if stored is not None:
            await self._discard_unpublished(job, stored)
        return decision

    async def finalize_failed(
        self, job: Job, error: InternalError, decision: Decision
    ) -> Decision | None:
        """End a request whose finalization raised in the last attempt. Never raises.

        Otherwise the server would redeliver the request until `max_deliver`, and the request would
        block the queue.

        Args:
            job: A job in an unknown state.
            error: Outcome of the next step of a chain, if the job's own result is stored.
            decision: The decision for `error`.

        Returns:
            The decision; None if this failed too, or if the delivery was settled before.
        """
        if job.state in FINAL:
            return None
        if job.state is not State.FINALIZING:
            job.advance(State.FINALIZING)
        try:
            await self._dead_letter(job, decision)
            try:
                if not job.is_copy:
                    await self._publish_failed_end(job, error, decision)
            except Exception:
                log.exception("terminal_event_not_published")
            await self._settle(job, decision)
        except Exception:
            log.exception("finalization_failed")
            return None
        return decision

    def event_fields(self, job: Job) -> dict[str, Any]:
        """Return the fields of the next event of a job, and increment the job's sequence."""
        sequence, job.sequence = job.sequence, job.sequence + 1
        return {
            "request_id": job.request_id,
            "task": self._task,
            "queue": None if self._queue == self._task else self._queue,
            "sequence": sequence,
            "time": datetime.now(UTC),
            "worker": self._worker,
            "attempt": job.delivery.attempt,
            "metadata": {} if job.request is None else job.request.metadata,
            "chain": None if job.request is None else place_of(job.request, job.request_id),
        }

    # -- the terminal event -----------------------------------------------------------------------

    async def _publish_terminal(self, job: Job, decision: Decision) -> ResultEvent | None:
        """Publish and reply; return the event that is stored for the request id, or None."""
        match decision.publish:
            case Publish.NONE:
                return None
            case Publish.REPLY_STORED:
                await self._continue_or_reply(job, job.existing)
                return job.existing
            case Publish.REPLY_FAILED:
                await self._reply(job, self._make_event(job, decision))
                return job.existing
            case Publish.SUCCEEDED | Publish.FAILED | Publish.CANCELLED:
                return await self._store_terminal(job, self._make_event(job, decision))

    async def _store_terminal(self, job: Job, event: ResultEvent) -> ResultEvent | None:
        try:
            stored = await self._events.publish_result(
                event, trace_parent=job.envelope.trace_parent
            )
        except ResultUnreadable:
            log.error("result_not_readable")  # noqa: TRY400 - the traceback adds nothing
            return None
        if stored == event:
            await self._continue_or_reply(job, event)
            return event
        log.warning("result_already_stored")
        job.existing = stored
        await self._continue_or_reply(job, self._resolve_conflict(job, event, stored))
        return stored

    async def _publish_minimal_failure(self, job: Job, decision: Decision) -> ResultEvent | None:
        # Without the metadata of the sender, so that the event is not too large again.
        job.request = None
        try:
            return await self._publish_terminal(job, decision)
        except MessageTooLarge:
            log.exception("failure_too_large")
            return None

    async def _publish_failed_end(self, job: Job, error: InternalError, decision: Decision) -> None:
        request = next_step_of(job, job.existing)
        if request is None:
            await self._publish_minimal_failure(job, decision)
        else:  # the event of this request is stored; the sender waits for the next step
            await self._chain.end_at_next(job, request, error)

    def _resolve_conflict(self, job: Job, event: ResultEvent, stored: ResultEvent) -> ResultEvent:
        """Return the event to reply with if a different event is stored under the id."""
        if stored.request_digest == job.digest:  # another worker stored the event of this request
            return stored
        if isinstance(event, FailedEvent):
            return event
        # The stored event belongs to another request, perhaps of another sender.
        return self._make_event(job, IdConflict().decision)

    async def _continue_or_reply(self, job: Job, event: ResultEvent | None) -> None:
        request = next_step_of(job, event)
        if request is not None and isinstance(event, SucceededEvent):
            await self._chain.queue_next(job, request, event)
        elif event is not None:
            await self._reply(job, event)

    async def _reply(self, job: Job, event: ResultEvent) -> None:
        if job.envelope.reply_to is not None:
            await self._events.reply(
                job.envelope.reply_to, event, trace_parent=job.envelope.trace_parent
            )

    def _make_event(self, job: Job, decision: Decision) -> ResultEvent:
        fields = {**self.event_fields(job), "request_digest": job.digest}
        if decision.publish is Publish.SUCCEEDED:
            return SucceededEvent(
                **fields,
                outputs=job.outputs,
                model=self._model.info,
                parameters=dict(job.parameters),
                timings=Timings(
                    queued=job.queued,
                    inference=job.inference,
                    encode=job.encode,
                    upload=job.upload,
                ),
                warnings=job.warnings,
                ai_generated=True,
            )
        if decision.publish is Publish.CANCELLED:
            return CancelledEvent(**fields)
        if decision.failure is None:
            raise AssertionError("a failed event without a failure")
        return FailedEvent(**fields, failure=decision.failure)

    # -- dead letter, outputs, settlement ---------------------------------------------------------

    async def _discard_unpublished(self, job: Job, stored: ResultEvent) -> None:
        outputs = stored.outputs if isinstance(stored, SucceededEvent) else ()
        published = {output.key for output in outputs if isinstance(output, StoredArtifact)}
        for artifact in job.stored:
            if artifact.key not in published:
                await self._artifacts.discard(artifact)

    async def _dead_letter(self, job: Job, decision: Decision) -> None:
        if decision.failure is None:
            raise AssertionError("a dead letter without a failure")
        letter = DeadLetter(
            code=decision.failure.code,
            reason=decision.failure.message,
            request_id=job.request_id,
            worker=self._worker,
        )
        await self._events.dead_letter(self._queue, job.delivery, letter)

    async def _settle(self, job: Job, decision: Decision) -> None:
        # The next pull is sent together with the settlement: this saves one round trip.
        job.slot.leave()
        match decision.settle:
            case Settlement.ACK:
                await job.delivery.ack()
            case Settlement.NAK:
                await job.nak()
            case Settlement.RETRY:
                await self._retry_later(job, counts=decision.counts)
            case Settlement.REQUEUE:
                await job.requeue()
            case Settlement.TERM:
                code = "" if decision.failure is None else decision.failure.code
                await job.delivery.term(code)
            case Settlement.ABANDON:
                job.advance(State.ABANDONED)
                return
        job.advance(State.SETTLED)

    async def _retry_later(self, job: Job, *, counts: bool) -> None:
        # Not a NAK with a delay: with max_ack_pending=1 the queue would wait for the delay.
        attempts = job.attempts_so_far if counts else job.attempts_so_far - 1
        delay = COPY_DELAY
        if counts:
            delay = min(self._retry_delay * 2 ** (attempts - 1), RETRY_DELAY_MOST)
        try:
            await self._events.retry_later(
                self._queue,
                job.delivery,
                request_id=job.request_id,
                attempts=max(0, attempts),
                delay=delay,
                owner=job.digest if counts and job.began else None,
            )
        except (MessageTooLarge, QueueFull) as error:
            log.warning("retry_not_delayed", error=type(error).__name__)
            await job.nak()
        else:
            await job.delivery.ack()
