"""Follows one run from the event loop: its progress, its cancellation, and a thread that stalls."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from consumer.inference.cancel_token import CancelToken, Stopped, StopReason
from consumer.inference.progress import StallDetector, Update
from consumer.inference.run_queue import Ticket
from consumer.ports.model import Interrupted, RunnerOutput

PROGRESS_INTERVAL = 0.2  # seconds; at most 5 events a second, the latest step wins
LONGEST_LOOK = 0.25  # of the stall timeout
DRAIN_STEP_TIMEOUT = 5.0  # seconds that the thread has to come to its next step in a drain


class ThreadStalled(Exception):  # noqa: N818 - a state of the thread
    """No step for `stall_timeout`: the inference thread cannot be ended from outside."""


async def follow_run(
    ticket: Ticket,
    token: CancelToken,
    *,
    stall_timeout: float,
    publish: Callable[[Update], Awaitable[None]],
) -> RunnerOutput:
    """Wait for the output of a run that has begun, and publish its progress.

    Args:
        ticket: Of the request.
        token: Asks the run to stop at its next step.
        stall_timeout: Seconds without a step after which the inference thread is taken to hang.
        publish: Called with each update, at most every `PROGRESS_INTERVAL`, and with the last one
            before this function returns.

    Raises:
        Stopped: The run has stopped for this request, or the process must not wait longer.
        ThreadStalled: The inference thread does not come to its next step.
        Exception: What the run raised.
    """
    progress, ended = ticket.progress, ticket.ended
    stall = StallDetector(ticket.batch, longest_look=stall_timeout * LONGEST_LOOK)
    drain_since: float | None = None
    while not ended.done():
        await asyncio.wait({ended}, timeout=PROGRESS_INTERVAL)
        for update in progress.take():
            await publish(update)
        now = time.monotonic()
        if ended.done():
            break
        # The thread does no more for this request, although others of its batch may go on.
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
    token.check()  # the last step may have been made by then; the request has ended all the same
    for update in progress.take():  # added while the update before was published
        await publish(update)
    return output
