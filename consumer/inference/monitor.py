"""Follows one run from the event loop: publishes progress, and detects a stop or a stall."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from consumer.inference.cancel_token import CancelToken, Stopped, StopReason
from consumer.inference.progress import StallDetector, Update
from consumer.inference.run_queue import Ticket
from consumer.ports.model import Interrupted, RunnerOutput

PROGRESS_INTERVAL = 0.2  # seconds; at most 5 events a second, the latest step wins
MAX_INTERVAL = 0.25  # fraction of the stall timeout; see `StallDetector`
DRAIN_STEP_TIMEOUT = 5.0  # seconds in which a run must make its next step in a drain


class ThreadStalled(Exception):  # noqa: N818 - a state of the thread
    """The run made no step for `stall_timeout`. Python cannot end the thread."""


async def follow_run(
    ticket: Ticket,
    token: CancelToken,
    *,
    stall_timeout: float,
    publish: Callable[[Update], Awaitable[None]],
) -> RunnerOutput:
    """Wait for the output of a run that has begun, and publish its progress.

    Args:
        ticket: Ticket of the request.
        token: Cancel token of the request.
        stall_timeout: Seconds without a step after which a run counts as stalled.
        publish: Called with each update, at most every `PROGRESS_INTERVAL`. The last call precedes
            the return of this function.

    Raises:
        Stopped: The run has stopped for this request, or a drain does not wait longer.
        ThreadStalled: The run makes no step for `stall_timeout`.
        Exception: The exception of the run.
    """
    progress, ended = ticket.progress, ticket.ended
    stall = StallDetector(ticket.batch, max_interval=stall_timeout * MAX_INTERVAL)
    drain_since: float | None = None
    while not ended.done():
        await asyncio.wait({ended}, timeout=PROGRESS_INTERVAL)
        for update in progress.take():
            await publish(update)
        now = time.monotonic()
        if ended.done():
            break
        # The thread has stopped working for this request. Its batch may continue with others.
        if token.acknowledged or not progress.running:
            token.check()
        if stall.seconds_without_step(now) > stall_timeout:
            raise ThreadStalled
        if token.reason is StopReason.DRAIN:
            drain_since = drain_since or now
            if now - drain_since > DRAIN_STEP_TIMEOUT:
                raise Stopped(StopReason.DRAIN)
    try:
        output = ticket.take()
    except Interrupted:
        token.check()
        raise
    token.check()  # a stop during the last step counts too
    for update in progress.take():  # added while the previous update was published
        await publish(update)
    return output
