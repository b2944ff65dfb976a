"""The end of a job: its terminal event, the dead letter, and the only place that settles."""

import time
from datetime import UTC, datetime
from typing import Any

import structlog

from consumer.admission import Job
from consumer.job import (
    Broken,
    Conflict,
    Decision,
    Malformed,
    Outcome,
    Publish,
    QueueIsFull,
    ResultTooLarge,
    Settlement,
    State,
    decide,
)
from consumer.ports.bus import (
    DeadLetter,
    Events,
    MessageTooLarge,
    QueueFull,
    ResultEvent,
    ResultUnreadable,
)
from consumer.ports.model import ModelDescription
from consumer.ports.store import Artifacts
from consumer.ports.telemetry import Observer
from generation_contracts import (
    CancelledEvent,
    ChainLink,
    ChainPlace,
    FailedEvent,
    ImageArtifact,
    InvalidRequest,
    Request,
    SucceededEvent,
    Task,
    Timings,
    next_requests,
    request_digest,
)
from generation_contracts.chains import id_of, next_link, place_of

log = structlog.get_logger()

RETRY_DELAY_MOST = 60.0  # seconds
COPY_DELAY = 5.0  # seconds until a copy looks again whether the request before it has ended


class Conclusion:
    """Carries decisions out: put aside, publish, reply or go on, settle, in this order.

    The order is what makes a crash between any two of them harmless. The dead letter comes first:
    once the result is stored, a redelivery is only answered and acknowledged; a second letter is
    dropped by its id. The result has a fence of its own, the reply is a courtesy, and the
    settlement comes last. What is in the store then and no event tells of is removed.
    """

    def __init__(
        self,
        *,
        task: Task,
        worker: str,
        model: ModelDescription,
        events: Events,
        artifacts: Artifacts,
        max_attempts: int,
        retry_delay: float,
        observer: Observer,
    ) -> None:
        self._task = task
        self._worker = worker
        self._model = model
        self._events = events
        self._artifacts = artifacts
        self._max_attempts = max_attempts
        self._retry_delay = retry_delay
        self._observer = observer

    async def conclude(self, job: Job, decision: Decision) -> Decision:
        """Carry a decision out.

        Returns:
            The decision that was carried out in the end: another one than asked for when the
            result turned out too large for the bus.
        """
        job.advance(State.CONCLUDING)
        if decision.dead_letter:
            await self._dead_letter(job, decision)
        began = time.monotonic()
        try:
            standing = await self._announce(job, decision)
        except MessageTooLarge:
            log.warning("result_too_large")
            decision = decide(
                ResultTooLarge(), attempt=job.attempt, max_attempts=self._max_attempts
            )
            standing = await self._announce_the_bare_failure(job, decision)
        job.spent("publish", time.monotonic() - began)
        await self._settle(job, decision)
        if standing is not None:
            await self._discard_all_but(standing, job)
        return decision

    async def give_up(self, job: Job, exception: str) -> Decision | None:
        """Put a request aside whose end has failed each time, for a reason nobody has foreseen.

        Else it would come back, with everything behind it waiting, until the server gives it out
        no more. Never raises.

        Args:
            job: Of which nobody knows how far it came.
            exception: Name of the class of what was raised.

        Returns:
            What was carried out; None where that failed as well, or it had been settled.
        """
        if job.state in {State.SETTLED, State.ABANDONED}:
            return None
        if job.state is not State.CONCLUDING:
            job.advance(State.CONCLUDING)
        decision = decide(
            Broken(exception),
            attempt=job.attempt,
            max_attempts=job.attempt,
            is_copy=job.is_copy,
        )
        try:
            await self._dead_letter(job, decision)
            try:
                if not job.is_copy:
                    await self._announce_the_end(job, decision, Broken(exception))
            except Exception:
                log.exception("not_announced")
            await self._settle(job, decision)
        except Exception:
            log.exception("not_given_up")
            return None
        return decision

    async def _announce_the_end(self, job: Job, decision: Decision, why: Outcome) -> None:
        if job.request and job.request.then and isinstance(job.existing, SucceededEvent):
            # It has its event; it is the next step that whoever waits would wait for.
            await self._break_before_the_next(job, job.request, why)
        else:
            await self._announce_the_bare_failure(job, decision)

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
            "chain": None if job.request is None else place_of(job.request, job.request_id),
        }

    async def _announce(self, job: Job, decision: Decision) -> ResultEvent | None:
        """Publish and reply; the terminal event that stands for the request's id, if one does."""
        match decision.publish:
            case Publish.NONE:
                return None
            case Publish.STORED_AGAIN:
                await self._answer(job, job.existing)
                return job.existing
            case Publish.FAILED_REPLY_ONLY:
                await self._reply(job, self._event(job, decision))
                return job.existing
            case Publish.SUCCEEDED | Publish.FAILED | Publish.CANCELLED:
                event = self._event(job, decision)
                trace_parent = job.envelope.trace_parent
                try:
                    stored = await self._events.publish_result(event, trace_parent=trace_parent)
                except ResultUnreadable:
                    log.error("result_not_readable")  # noqa: TRY400 - nothing to show
                    return None
                if stored == event:
                    await self._answer(job, event)
                    return event
                log.warning("result_stored_before")
                job.existing = stored
                await self._answer(job, self._instead(job, event, stored))
                return stored

    async def _announce_the_bare_failure(self, job: Job, decision: Decision) -> ResultEvent | None:
        # Without what the sender brought in itself; else it would come back for ever.
        job.request = None
        try:
            return await self._announce(job, decision)
        except MessageTooLarge:
            log.exception("failure_too_large")
            return None

    def _instead(self, job: Job, event: ResultEvent, found: ResultEvent) -> ResultEvent:
        if found.request_digest == job.digest:  # another worker with the same request was quicker
            return found
        if isinstance(event, FailedEvent):
            return event
        # What stands is the end of another request: its outputs are not for this sender.
        conflict = decide(Conflict(), attempt=job.attempt, max_attempts=self._max_attempts)
        return self._event(job, conflict)

    async def _discard_all_but(self, standing: ResultEvent, job: Job) -> None:
        outputs = standing.outputs if isinstance(standing, SucceededEvent) else ()
        told = {output.key for output in outputs if isinstance(output, ImageArtifact)}
        for artifact in job.stored:
            if artifact.key not in told:
                await self._artifacts.discard(artifact)

    async def _answer(self, job: Job, event: ResultEvent | None) -> None:
        """Go on with the chain, where there is a next step and the event leads to it; else reply.

        A crash between the stored event and the next request is harmless: whoever gets the request
        then finds the event, comes here with it, and makes the same next requests.
        """
        if job.request is None or not job.request.then or not isinstance(event, SucceededEvent):
            await self._reply(job, event)
            return
        try:
            following = next_requests(job.request, job.request_id, event)
        except InvalidRequest as error:
            why = Malformed(str(error), error.problems)
            await self._break_before_the_next(job, job.request, why)
            return
        for task, request in following:
            await self._queue(job, task, request)

    async def _queue(self, job: Job, task: Task, request: Request) -> None:
        if request.chain is None:
            raise AssertionError("a next request without its place")
        try:
            await self._events.publish_request(
                task,
                request,
                reply_to=job.envelope.reply_to,
                trace_parent=job.envelope.trace_parent,
            )
        except MessageTooLarge:
            wrong = Malformed("the next request is too large for the bus")
            await self._break_chain(job, task, request.chain, wrong, request_digest(request))
        except QueueFull:
            full, digest = QueueIsFull(), request_digest(request)
            await self._break_chain(job, task, request.chain, full, digest)

    async def _break_before_the_next(self, job: Job, request: Request, why: Outcome) -> None:
        link, task = next_link(request, job.request_id), Task(request.then[0].task)
        await self._break_chain(job, task, link, why, job.digest)

    async def _break_chain(
        self, job: Job, task: Task, link: ChainLink, why: Outcome, digest: str
    ) -> None:
        """End a chain at a step that cannot be queued, in the name of that step.

        Its digest is what the step asks for: should it be queued after all, because the step before
        has come again, it is the same request, and gets this end.
        """
        failure = decide(why, attempt=1, max_attempts=1).failure
        if failure is None or job.request is None:
            raise AssertionError(f"{why} ends no chain")
        event = FailedEvent(
            request_id=id_of(link),
            task=task,
            sequence=0,
            time=datetime.now(UTC),
            worker=self._worker,
            attempt=1,
            metadata=job.request.metadata,
            chain=ChainPlace(id=link.id, step=link.step, of=link.step + len(job.request.then) - 1),
            request_digest=digest,
            failure=failure,
        )
        log.warning("chain_broken", chain=link.id, step=link.step, code=str(failure.code))
        try:
            stored = await self._events.publish_result(
                event, trace_parent=job.envelope.trace_parent
            )
        except ResultUnreadable:
            return
        if stored == event:
            self._observer.chain_broken(failure.code)
        await self._reply(job, stored if stored.request_digest == digest else event)

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
                parameters=dict(job.parameters),
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

    async def _dead_letter(self, job: Job, decision: Decision) -> None:
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
        # The next pull goes out with the settlement, not after its confirmation: one round trip.
        job.place.leave()
        match decision.settlement:
            case Settlement.ACK:
                await job.delivery.ack()
            case Settlement.NAK:
                await job.nak()
            case Settlement.RETRY:
                await self._retry_later(job, counts=decision.counts)
            case Settlement.RELEASE:
                await job.requeue()
            case Settlement.TERM:
                code = "" if decision.failure is None else decision.failure.code
                await job.delivery.term(code)
            case Settlement.ABANDON:
                job.advance(State.ABANDONED)
                return
            case Settlement.KEEP:
                raise AssertionError("a job that is kept has not come to its end")
        job.advance(State.SETTLED)

    async def _retry_later(self, job: Job, *, counts: bool) -> None:
        # Not a NAK with a delay: at max_ack_pending=1 the queue would stand still for the delay.
        attempts = job.attempts_so_far if counts else job.attempts_so_far - 1
        delay = COPY_DELAY
        if counts:
            delay = min(self._retry_delay * 2 ** (attempts - 1), RETRY_DELAY_MOST)
        try:
            await self._events.retry_later(
                self._task,
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
